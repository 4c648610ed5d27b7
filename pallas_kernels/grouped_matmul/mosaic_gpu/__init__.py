"""Grouped matmul on Hopper GPUs (Pallas Mosaic GPU).

`dense` takes matrices in bfloat16 and `quantized` those of fewer bits. Both are persistent kernels over the same
`units`. `fragments` makes bfloat16 of fewer bits, and `steps` has the rest of what threads of `quantized` do.
"""

from pallas_kernels.grouped_matmul.mosaic_gpu.dense import MatmulConfig, expert_mlp, gate_up_silu, grouped_matmul
from pallas_kernels.grouped_matmul.mosaic_gpu.quantized import quantized_expert_mlp, quantized_grouped_matmul

__all__ = [
    "MatmulConfig",
    "expert_mlp",
    "gate_up_silu",
    "grouped_matmul",
    "quantized_expert_mlp",
    "quantized_grouped_matmul",
]
