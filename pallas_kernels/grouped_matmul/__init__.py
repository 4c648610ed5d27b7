from pallas_kernels.grouped_matmul.api import expert_mlp, grouped_matmul

__all__ = ["expert_mlp", "grouped_matmul"]
