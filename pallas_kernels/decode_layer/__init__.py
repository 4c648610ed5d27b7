"""What a decoder layer computes of single tokens beside its attention and its experts, in few launches."""

from pallas_kernels.decode_layer.api import Routed, combine_experts, finish_projections, gather_tokens, route

__all__ = ["Routed", "combine_experts", "finish_projections", "gather_tokens", "route"]
