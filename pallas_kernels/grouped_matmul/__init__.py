from pallas_kernels.grouped_matmul.activations import QuantizedRows, quantize_rows
from pallas_kernels.grouped_matmul.api import expert_mlp, grouped_matmul
from pallas_kernels.grouped_matmul.groups import sort_rows, take_rows
from pallas_kernels.grouped_matmul.quantized import quantized_expert_mlp, quantized_grouped_matmul

__all__ = [
    "QuantizedRows",
    "expert_mlp",
    "grouped_matmul",
    "quantize_rows",
    "quantized_expert_mlp",
    "quantized_grouped_matmul",
    "sort_rows",
    "take_rows",
]
