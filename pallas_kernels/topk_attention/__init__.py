from pallas_kernels.topk_attention.api import topk_attention

__all__ = ["topk_attention"]
