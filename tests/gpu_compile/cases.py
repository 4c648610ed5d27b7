"""The programs that hold Hopper kernels, at the released model's shapes, as model and engine call them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from keye_jax.quantization.quantize import VALUES, scales_dtype
from keye_jax.quantization.schemes import FORMATS, Format, grid, standard
from pallas_kernels.decode_layer.mosaic_gpu import combine_experts, finish_projections, gather_tokens, route
from pallas_kernels.flash_attention.mosaic_gpu import paged_flash_attention
from pallas_kernels.grouped_matmul.mosaic_gpu import expert_mlp, grouped_matmul, quantized_expert_mlp
from pallas_kernels.indexer_scores.mosaic_gpu import indexer_scores
from pallas_kernels.nucleus.mosaic_gpu import nucleus
from pallas_kernels.select_topk.mosaic_gpu import select_topk
from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.shapes import PAGE_SIZE, float32, int32, spec
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention
from pallas_kernels.sparse_attention.mosaic_gpu.prefill import union_attention
from pallas_kernels.sparse_attention.mosaic_gpu.unions import build_unions
from pallas_kernels.topk_attention.mosaic_gpu import topk_attention

_SELECTION_STACK = 96
"""The selection holds a row in registers, or decides by its length, or has 64 registers with several teams of threads.
It keeps counts in memory."""


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A program with one Hopper kernel or several.

    Attributes:
      kernel: name of the operation or of its kernel.
      shape: words that tell this program from the others of its operation.
      function: a function of arrays.
      arguments: what is passed to it, `jax.ShapeDtypeStruct`.
      quick: whether `make test` compiles it too.
      stack: most bytes of a thread's registers that ptxas may keep in memory, for kernels that were measured so.
    """

    kernel: str
    shape: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    quick: bool = False
    stack: int = 0

    def __str__(self) -> str:
        return f"{self.kernel}, {self.shape}"


def _words(batch: int, queries: int, context: int) -> str:
    return f"{batch} x {queries} queries, {context // 1024}K"


def _scores(
    batch: int, queries: int, context: int, *, fill: bool = True, skip_below: int = 0, quick: bool = False
) -> KernelCase:
    return KernelCase(
        "indexer_scores",
        _words(batch, queries, context) + ("" if fill else ", not filled") + (", some skipped" if skip_below else ""),
        functools.partial(indexer_scores, scale=MODEL.index_scale, fill=fill, skip_below=skip_below),
        MODEL.indexer_arguments(batch, queries, context),
        quick=quick,
        stack=0 if queries == 1 else 16,  # an address, read again for each 256 keys
    )


def _float8_scores(batch: int, queries: int, context: int) -> KernelCase:
    def score(*arguments):
        return indexer_scores(*arguments[:5], scale=MODEL.index_scale, key_scales=arguments[5], fill=False)

    arguments = MODEL.indexer_arguments(batch, queries, context, jnp.float8_e4m3fn)
    arguments = *arguments, float32(*arguments[2].shape[:2])
    return KernelCase("indexer_scores", _words(batch, queries, context) + ", fp8", score, arguments)


def _other_scores(heads: int, dim: int) -> KernelCase:
    arguments = spec(2, 100, heads, dim), float32(2, 100, heads), spec(128, PAGE_SIZE, dim), int32(2, 64), int32(2)
    words = f"{heads} heads of {dim}"
    return KernelCase("indexer_scores", words, functools.partial(indexer_scores, scale=0.125), arguments)


def _selection(rows: int, context: int, *, quick: bool = False) -> KernelCase:
    arguments = float32(rows, context), int32(rows)
    words = f"{rows} x {context // 1024}K"
    function = functools.partial(select_topk, k=MODEL.top_k)
    return KernelCase("select_topk", words, function, arguments, quick=quick, stack=_SELECTION_STACK)


def _unions(context: int) -> KernelCase:
    function = functools.partial(build_unions, page_size=PAGE_SIZE, limit=16 * MODEL.top_k, split=True)
    arguments = int32(1, 2048, MODEL.top_k), MODEL.page_table(1, context)
    return KernelCase("build_unions", f"{context // 1024}K", function, arguments)


def _union_attention(q_per_kv: int, *, quick: bool = False) -> KernelCase:
    lists = int32(128, 16 * MODEL.top_k)
    q = spec(2048, MODEL.kv_heads * q_per_kv, MODEL.head_dim)
    return KernelCase(
        "union_attention",
        f"{q_per_kv} heads on a KV head",
        functools.partial(union_attention, scale=MODEL.scale),
        (q, MODEL.kv_pages(2048 * PAGE_SIZE), lists, lists, int32(128, 3)),
        quick=quick,
    )


def _sparse(batch: int, context: int, *, quick: bool = False) -> KernelCase:
    return KernelCase(
        "sparse_attention",
        _words(batch, 1, context),
        functools.partial(sparse_attention, scale=MODEL.scale),
        (
            MODEL.queries(batch, 1),
            MODEL.kv_pages(batch * context),
            int32(batch, 1, MODEL.top_k),
            MODEL.page_table(batch, context),
        ),
        quick=quick,
    )


def _float8_sparse(batch: int, context: int) -> KernelCase:
    def attend(*arguments):
        return sparse_attention(*arguments[:4], kv_scales=arguments[4], scale=MODEL.scale)

    pages = MODEL.kv_pages(batch * context)
    return KernelCase(
        "sparse_attention",
        _words(batch, 1, context) + ", fp8",
        attend,
        (
            MODEL.queries(batch, 1),
            spec(*pages.shape, dtype=jnp.float8_e4m3fn),
            int32(batch, 1, MODEL.top_k),
            MODEL.page_table(batch, context),
            float32(*pages.shape[:3]),
        ),
    )


def _topk(batch: int, queries: int, context: int) -> KernelCase:
    return KernelCase(
        "topk_attention",
        _words(batch, queries, context),
        functools.partial(topk_attention, top_k=MODEL.top_k, scale=MODEL.scale),
        (
            MODEL.queries(batch, queries),
            float32(batch, queries, context),
            int32(batch, queries),
            MODEL.kv_pages(batch * context),
            MODEL.page_table(batch, context),
        ),
        stack=_SELECTION_STACK,
    )


def _experts(tokens: int, *, quick: bool = False) -> list[KernelCase]:
    """Both kernels of `expert_mlp`, and the product of gate and up alone.

    Each program has a kernel of its own: Mosaic of JAX 0.12 prints the PTX of one kernel once in a process.
    """
    rows, gate_up, down, sizes = MODEL.expert_arguments(tokens)
    words = f"{tokens} tokens"
    return [
        KernelCase("grouped_matmul", f"{words}, gate and up", grouped_matmul, (rows, gate_up, sizes)),
        KernelCase("expert_mlp", words, expert_mlp, (rows, gate_up, down, sizes), quick=quick),
    ]


def _quantized_experts(tokens: int, format: Format, *, float8_rows: bool = False, quick: bool = False) -> KernelCase:
    """`quantized_expert_mlp` with matrices as `keye-jax quantize` makes them."""
    rows, *shapes, sizes = MODEL.expert_arguments(tokens)
    arrays, blocks = [], []
    for matrices, parts in zip(shapes, (2, 1), strict=True):
        experts, inputs, outputs = matrices.shape
        block = standard(format).block(inputs, outputs, parts=parts)
        stored = inputs // 2 if format == "int4" else inputs
        arrays += [spec(experts, stored, outputs, dtype=VALUES[format])]
        arrays += [spec(experts, *grid(block, inputs, outputs), dtype=scales_dtype(format))]
        blocks.append(block)

    def run(rows, gate_up, gate_up_scales, down, down_scales, sizes, row_scales=None):
        return quantized_expert_mlp(
            rows,
            row_scales,
            gate_up,
            gate_up_scales,
            None,
            down,
            down_scales,
            None,
            sizes,
            gate_up_block=blocks[0],
            down_block=blocks[1],
            dtype=jnp.bfloat16,
        )

    words = f"{tokens} tokens, {format}" + (" by fp8" if float8_rows else "")
    # Of row tiles of 128: where a unit lies, stored before its steps and loaded behind them.
    stack = 32 if float8_rows and tokens > 1024 else 0
    arguments = (rows, *arrays, sizes)
    if float8_rows:
        rows = spec(*rows.shape, dtype=jnp.float8_e4m3fn)
        arguments = (rows, *arrays, sizes, float32(rows.shape[0], rows.shape[1] // 128))
    return KernelCase("quantized_expert_mlp", words, run, arguments, quick=quick, stack=stack)


def _dense(batch: int, context: int) -> KernelCase:
    return KernelCase(
        "paged_flash_attention",
        _words(batch, 1, context),
        functools.partial(paged_flash_attention, scale=MODEL.scale),
        (
            MODEL.queries(batch, 1),
            MODEL.kv_pages(batch * context),
            MODEL.page_table(batch, context),
            int32(batch),
        ),
    )


def _finished(tokens: int, *, paged: bool = True, quick: bool = False) -> KernelCase:
    arrays = MODEL.projected_arguments(tokens)
    cache = {"kv_pages": None, "index_pages": None, "slots": None}
    if paged:
        pages = spec(512, PAGE_SIZE, MODEL.index_dim)
        cache = {"kv_pages": MODEL.kv_pages(512 * PAGE_SIZE), "index_pages": pages, "slots": int32(tokens)}
    names = [*arrays, *(name for name in cache if paged)]

    def run(*given):
        arguments: dict[str, Any] = dict.fromkeys(cache) | dict(zip(names, given, strict=True))
        return finish_projections(**arguments, eps=1e-6, index_eps=1e-6)

    words = f"{tokens} tokens" + ("" if paged else ", no pages")
    given = (*arrays.values(), *(x for x in cache.values() if x is not None))
    return KernelCase("finish_projections", words, run, given, quick=quick)


def _route(tokens: int, *, own: int | None = None, quick: bool = False) -> KernelCase:
    rows, router = spec(tokens, MODEL.hidden), spec(MODEL.experts, MODEL.hidden)
    arguments = rows, rows, spec(MODEL.hidden), router, spec(tokens, dtype=jnp.bool_), int32()

    def function(x, update, norm, router, valid, first_own):
        how = {"top_k": MODEL.experts_per_token, "eps": 1e-6, "normalise": True, "own": own}
        return route(x, update, norm, router, valid, None if own is None else first_own, **how)

    words = f"{tokens} tokens" + ("" if own is None else f", {own} experts here")
    return KernelCase("route", words, function, arguments, quick=quick)


def _combine(
    tokens: int, experts: int = MODEL.experts_per_token, *, devices: int = 1, quick: bool = False
) -> KernelCase:
    x, places = spec(tokens, MODEL.hidden), (tokens, experts)
    arguments = spec(tokens * experts, MODEL.hidden), int32(*places), float32(*places), x, spec(MODEL.hidden)
    words, exchange = f"{tokens} x {experts} rows", (int32(2 * devices + 1),) if devices > 1 else ()

    def function(rows, row_of, weights, x, norm, addresses=None):
        return combine_experts(rows, row_of, weights, x, norm, addresses, eps=1e-6, axes=(), summed=())

    words += f", {devices} devices" if devices > 1 else ""
    return KernelCase("combine_experts", words, function, (*arguments, *exchange), quick=quick)


def _gather(tokens: int, devices: int, *, quick: bool = False) -> KernelCase:
    x, words = spec(tokens // devices, MODEL.hidden), f"{tokens} tokens, {devices} devices"
    function = functools.partial(gather_tokens, axes=())
    return KernelCase("gather_tokens", words, function, (x, x, int32(2 * devices + 1)), quick=quick)


def _nucleus(rows: int, *, quick: bool = False) -> KernelCase:
    arguments = float32(rows, MODEL.vocab), int32(rows), float32(rows), int32(rows)
    return KernelCase("nucleus", f"{rows} x {MODEL.vocab}", nucleus, arguments, quick=quick)


CASES = [
    _scores(1, 2048, 131_072, quick=True),
    _scores(1, 2048, 131_072, fill=False),
    _scores(1, 8192, 8192, fill=False, skip_below=2048),
    _scores(64, 128, 32_768, fill=False, skip_below=2048),
    _scores(1, 1001, 262_144),
    _scores(1, 1001, 262_144, fill=False),
    _scores(8, 1, 131_072, quick=True),
    _scores(8, 1, 131_072, fill=False),
    _scores(1, 1, 131_072),
    _scores(64, 1, 32_768),
    _scores(64, 1, 32_768, fill=False),
    _float8_scores(1, 2048, 131_072),
    _float8_scores(1, 8, 131_072),
    _float8_scores(1, 1001, 262_144),
    _float8_scores(8, 1, 131_072),
    _selection(1024, 131_072, quick=True),
    _selection(4096, 32_768),
    _selection(32, 262_144),
    _selection(64, 262_144),
    _selection(1, 131_072),
    *(_nucleus(rows, quick=rows == 32) for rows in [1, 8, 32, 64]),
    *(_unions(context) for context in [32_768, 131_072, 262_144, 524_288]),
    *(_union_attention(q_per_kv, quick=q_per_kv == 8) for q_per_kv in [1, 2, 4, 8, 16]),
    *(_sparse(batch, 32_768, quick=batch == 8) for batch in [1, 8, 64]),
    *(_float8_sparse(batch, 32_768) for batch in [1, 8, 64]),
    _topk(1, 2048, 131_072),
    _topk(1, 777, 32_768),
    _topk(8, 1, 131_072),
    _topk(1, 8192, 8192),
    _topk(8, 128, 32_768),
    _topk(1, 2048, 65_536),
    *_experts(1),
    *_experts(64),
    *_experts(1024),
    *_experts(16_384, quick=True),
    *(
        _quantized_experts(tokens, format, quick=(tokens, format) == (2048, "int4"))
        for format in FORMATS
        for tokens in [1, 16, 64, 2048, 16_384]
    ),
    *(
        _quantized_experts(tokens, "fp8", float8_rows=True, quick=tokens == 16_384)
        for tokens in [1, 64, 512, 2048, 16_384]
    ),
    *(_dense(batch, 131_072) for batch in [1, 8, 64]),
    *(_finished(tokens, quick=tokens == 16) for tokens in [1, 4, 16, 64]),
    *(_finished(tokens, paged=False) for tokens in [1, 16]),
    *(_route(tokens, quick=tokens in (8, 16)) for tokens in [1, 4, 8, 16, 64]),
    *(_route(tokens, own=own, quick=tokens == 16) for tokens, own in [(2, 64), (16, 64), (64, 16)]),
    *(_combine(tokens, quick=tokens == 1) for tokens in [1, 64]),
    *(_combine(4, experts) for experts in [7, 32]),
    *(_combine(tokens, devices=devices, quick=tokens == 16) for tokens, devices in [(2, 2), (16, 2), (64, 4), (64, 8)]),
    *(_gather(tokens, devices, quick=tokens == 16) for tokens, devices in [(2, 2), (16, 2), (64, 4), (64, 8)]),
]
"""What the released model runs, alone and in an engine."""

OTHER_MODELS = [_other_scores(heads, dim) for heads, dim in [(8, 32), (24, 96), (32, 128), (64, 64)]]
"""What other models would run. More than 16 heads do not fit registers."""
