"""The operations of sparse attention and mixture-of-experts layers. They do not need `keye_jax`.

Every operation is one function of this package, with `implementation=None`: the best implementation that runs here and
supports the arguments runs. A name forces one; `dispatch.OPERATIONS` lists the names an operation has.

An operation's folder shows its platforms: `api.py` is the public function, `xla.py` the portable implementation, and
`mosaic_gpu`, `cudnn`, `mosaic_tpu` and `sparse_core` are a file or a folder each. `gpu/` and `tpu.py` hold what the
kernels of one platform share. `shapes.py` holds the sizes of the released model.

Dimensions in docstrings: b batch, t query, s key position, n heads, k key/value heads, d head dim, e experts, f expert
hidden size, p pages, m pages of one sequence.

Keys live in pages: an array `[p, page_size, ...]`, and a page table int32 `[b, m]`. Its entry `[b, i]` is the number of
the page that holds positions `i * page_size` to `(i + 1) * page_size - 1` of sequence b. The identity table is a
contiguous sequence.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels.decode_layer import Routed, combine_experts, finish_projections, gather_tokens, route
    from pallas_kernels.dispatch import available, resolve
    from pallas_kernels.errors import ArgumentError, UnsupportedError
    from pallas_kernels.flash_attention import flash_attention, paged_flash_attention
    from pallas_kernels.grouped_matmul import (
        QuantizedRows,
        expert_mlp,
        grouped_matmul,
        quantize_rows,
        quantized_expert_mlp,
        quantized_grouped_matmul,
    )
    from pallas_kernels.indexer_scores import hadamard, indexer_scores, quantize
    from pallas_kernels.nucleus import nucleus
    from pallas_kernels.quantized import QuantizedMatrices
    from pallas_kernels.select_topk import select_topk
    from pallas_kernels.sparse_attention import sparse_attention
    from pallas_kernels.topk_attention import topk_attention

__all__ = [
    "ArgumentError",
    "QuantizedMatrices",
    "QuantizedRows",
    "Routed",
    "UnsupportedError",
    "available",
    "combine_experts",
    "expert_mlp",
    "finish_projections",
    "flash_attention",
    "gather_tokens",
    "grouped_matmul",
    "hadamard",
    "indexer_scores",
    "nucleus",
    "paged_flash_attention",
    "quantize",
    "quantize_rows",
    "quantized_expert_mlp",
    "quantized_grouped_matmul",
    "resolve",
    "route",
    "select_topk",
    "sparse_attention",
    "topk_attention",
]


def _public(module: str, name: str) -> property:
    """A name that is looked up when it is used, so that importing the package imports nothing.

    It hides the folder of the same name, which Python would set here when the folder is imported.
    """
    return property(
        lambda _: getattr(importlib.import_module(f"pallas_kernels.{module}"), name), lambda _package, _folder: None
    )


_MODULES = {
    "decode_layer.api": ("Routed", "combine_experts", "finish_projections", "gather_tokens", "route"),
    "dispatch": ("available", "resolve"),
    "errors": ("ArgumentError", "UnsupportedError"),
    "flash_attention.api": ("flash_attention", "paged_flash_attention"),
    "grouped_matmul.activations": ("QuantizedRows", "quantize_rows"),
    "grouped_matmul.api": ("expert_mlp", "grouped_matmul"),
    "grouped_matmul.quantized": ("quantized_expert_mlp", "quantized_grouped_matmul"),
    "indexer_scores.api": ("indexer_scores",),
    "indexer_scores.quantize": ("hadamard", "quantize"),
    "nucleus.api": ("nucleus",),
    "quantized": ("QuantizedMatrices",),
    "select_topk.api": ("select_topk",),
    "sparse_attention.api": ("sparse_attention",),
    "topk_attention.api": ("topk_attention",),
}
_names = {name: _public(module, name) for module, names in _MODULES.items() for name in names}
sys.modules[__name__].__class__ = type("Package", (types.ModuleType,), _names)
