from pallas_kernels.grouped_matmul.api import expert_mlp, grouped_matmul
from pallas_kernels.grouped_matmul.quantized import quantized_expert_mlp, quantized_grouped_matmul

__all__ = ["expert_mlp", "grouped_matmul", "quantized_expert_mlp", "quantized_grouped_matmul"]
