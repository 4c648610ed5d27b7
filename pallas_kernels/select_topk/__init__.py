from pallas_kernels.select_topk.api import select_topk

__all__ = ["select_topk"]
