from pallas_kernels.nucleus.api import MOST_TOP_K, nucleus

__all__ = ["MOST_TOP_K", "nucleus"]
