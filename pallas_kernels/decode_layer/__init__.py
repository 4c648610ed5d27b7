"""What a decoder layer computes of single tokens beside its attention and its experts, in few launches."""

from pallas_kernels.decode_layer.api import decode_projections, output_projection, route

__all__ = ["decode_projections", "output_projection", "route"]
