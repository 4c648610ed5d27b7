from pallas_kernels.flash_attention.api import flash_attention, paged_flash_attention

__all__ = ["flash_attention", "paged_flash_attention"]
