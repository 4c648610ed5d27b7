"""Attention and experts."""

import functools
from unittest import mock

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels.flash_attention import mosaic_tpu as dense
from pallas_kernels.grouped_matmul import mosaic_tpu as experts
from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.shapes import PAGE_SIZE, int32, spec
from pallas_kernels.sparse_attention import mosaic_tpu as listed
from pallas_kernels.topk_attention.mosaic_tpu import attention as unions
from pallas_kernels.topk_attention.mosaic_tpu import unions as lists
from tests.tpu_compile.cases import CompileCase, Simulation

PAIR_FLOPS = 4 * MODEL.heads * MODEL.head_dim
"""FLOPs of one query and one key: two products."""
STEP_KEYS = 2048
"""Keys that are repeated of the unit of dense prefill. Units of this number and of twice as many are simulated."""
BLOCK, UNIT_ENTRIES, UNIT_CONTEXT = 256, 4096, 131_072
"""Of sparse prefill: queries of a block, entries of its union that are repeated, and its context. Units of this number
of entries and of twice as many are simulated."""
ROW_BYTES = 2 * MODEL.kv_heads * MODEL.head_dim * 2
"""Bytes of one position's keys and values."""


def _pages(batch: int, context: int) -> jax.ShapeDtypeStruct:
    """At most 8 GiB of pages, which fit a v5e. Sequences may share pages."""
    return MODEL.kv_pages(min(batch * context, 2**22))


def _prefill(queries: int, context: int, union: int, *, quick: bool = False) -> CompileCase:
    """Attention after the selection, of blocks of 256 queries whose unions have `union` entries."""

    def function(q, kv, table, words, rows, entries, dense):
        found = lists.Unions(words, rows, entries, dense, BLOCK)
        return unions.union_attention(q, kv, table, found, scale=MODEL.scale)

    def arguments(queries: int, context: int):
        blocks = queries // BLOCK
        return (
            MODEL.queries(1, queries),
            _pages(1, context),
            MODEL.page_table(1, context),
            int32(blocks, context // 128, lists.WORDS, 128),
            int32(blocks, context // 128, 128),
            int32(blocks),
            int32(blocks),
        )

    def simulated(entries, *arguments, dense):
        turns = entries // 1024
        fixed = {
            "_turns": lambda *_: (turns - 2, turns),
            "_dense": lambda *_: dense,
            # The simulation loses semaphores in a loop.
            "_for_each_turn": lambda first, end, body, _: [body(turn, None) for turn in range(first, end)],
        }
        with mock.patch.multiple(unions, **fixed):
            return function(*arguments)

    dense = int(union == context)
    return CompileCase(
        "union_attention",
        f"{queries} queries, {context // 1024}K, unions of {union // 1024}K",
        function,
        arguments(queries, context),
        flops=queries * MODEL.top_k * PAIR_FLOPS,
        nbytes=queries // BLOCK * union * ROW_BYTES,
        simulation=Simulation(
            functools.partial(simulated, 2 * UNIT_ENTRIES, dense=dense),
            arguments(BLOCK, UNIT_CONTEXT),
            queries // BLOCK,
            repeats=union // UNIT_ENTRIES - 1,
            name=f"{UNIT_ENTRIES} positions of pages" if dense else f"{UNIT_ENTRIES} entries of a union",
            less_work=Simulation(
                functools.partial(simulated, UNIT_ENTRIES, dense=dense), arguments(BLOCK, UNIT_CONTEXT)
            ),
        ),
        quick=quick,
    )


def _decode(batch: int, context: int, *, quick: bool = False) -> CompileCase:
    def arguments(batch: int, context: int):
        return (
            MODEL.queries(batch, 1),
            _pages(batch, context),
            int32(batch, 1, MODEL.top_k),
            MODEL.page_table(batch, context),
        )

    function = functools.partial(listed.sparse_attention, scale=MODEL.scale)

    def simulated(*arguments):
        with mock.patch.object(listed, "_turns", lambda *_: MODEL.top_k // listed.TURN):
            return function(*arguments)

    return CompileCase(
        "sparse_attention",
        f"{batch} x 1 query, {context // 1024}K",
        function,
        arguments(batch, context),
        flops=batch * MODEL.top_k * PAIR_FLOPS,
        nbytes=batch * MODEL.top_k * ROW_BYTES,
        simulation=Simulation(simulated, arguments(1, context), batch, name=f"sparse decode, {context}"),
        quick=quick,
    )


def _dense(batch: int, queries: int, context: int, *, quick: bool = False) -> CompileCase:
    """Dense attention of a context's last `queries` queries to its pages."""

    def arguments(batch: int, queries: int, context: int):
        return (
            MODEL.queries(batch, queries),
            _pages(batch, context),
            MODEL.page_table(batch, context),
            int32(batch),
        )

    function = functools.partial(dense.paged_flash_attention, scale=MODEL.scale)
    unit, keys = min(queries, 256), STEP_KEYS if queries > 1 else 4 * STEP_KEYS

    def simulated(*arguments):
        context = arguments[2].shape[1] * PAGE_SIZE
        with mock.patch.object(dense, "_query_start", lambda *_: context - unit):
            return function(*arguments)

    return CompileCase(
        "paged_flash_attention",
        f"{batch} x {queries} queries, {context // 1024}K",
        function,
        arguments(batch, queries, context),
        flops=batch * queries * context * PAIR_FLOPS,
        nbytes=batch * context * ROW_BYTES,
        # A block of queries, or a sequence's only query, is on one core.
        simulation=Simulation(
            simulated,
            arguments(1, unit, 2 * keys),
            batch * queries // unit,
            repeats=context // keys - 1,
            name=f"dense, {unit} x {keys}",
            less_work=Simulation(simulated, arguments(1, unit, keys)),
        ),
        quick=quick,
    )


def _splash(queries: int, context: int) -> CompileCase:
    """JAX's splash attention of a context's last `queries` queries to contiguous keys, to compare with."""

    blocks = splash_attention.BlockSizes(block_q=1024, block_kv=1024, block_kv_compute=512)

    def function(q, k, v):
        mask = splash_attention.CausalMask((q.shape[1], k.shape[1]), offset=k.shape[1] - q.shape[1])
        masks = splash_attention.MultiHeadMask([mask] * q.shape[0])
        return splash_attention.make_splash_mha_single_device(masks, block_sizes=blocks)(q, k, v)

    def simulated(q, k, v):
        """Without a mask: the simulation would take every block of a mask for hidden."""
        return SplashAttentionKernel(
            MaskInfo(None, None, None, None, None),
            None,
            None,
            block_sizes=blocks,
            is_mqa=False,
            save_residuals=False,
            mask_value=-1e30,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=None,
            interpret=False,
        )(q, k, v)

    def arguments(heads: int, kv_heads: int, queries: int, context: int):
        keys = spec(kv_heads, context, MODEL.head_dim)
        return spec(heads, queries, MODEL.head_dim), keys, keys

    unit, keys = 1024, STEP_KEYS
    return CompileCase(
        "splash_attention",
        f"1 x {queries} queries, {context // 1024}K",
        function,
        arguments(MODEL.heads, MODEL.kv_heads, queries, context),
        flops=queries * context * PAIR_FLOPS,
        nbytes=context * ROW_BYTES,
        # A unit is the queries of one head in one block.
        simulation=Simulation(
            simulated,
            arguments(1, 1, unit, 2 * keys),
            MODEL.heads * (queries // unit),
            repeats=context // keys - 1,
            name="splash",
            less_work=Simulation(simulated, arguments(1, 1, unit, keys)),
        ),
    )


def _vision(images: int, patches: int, *, quick: bool = False) -> CompileCase:
    heads, dim = MODEL.vision_heads, MODEL.vision_dim
    array = spec(images, patches, heads, dim)
    function = functools.partial(dense.flash_attention, scale=MODEL.vision_scale)
    return CompileCase(
        "flash_attention",
        f"{images} x {patches} patches",
        function,
        (array, array, array, int32(images)),
        flops=4 * images * heads * patches**2 * dim,
        nbytes=8 * images * patches * heads * dim,
        quick=quick,
    )


def _experts(tokens: int, *, quick: bool = False) -> CompileCase:
    rows = tokens * MODEL.experts_per_token
    weights = MODEL.hidden * MODEL.expert_hidden
    return CompileCase(
        "expert_mlp",
        f"{tokens} tokens",
        experts.expert_mlp,
        MODEL.expert_arguments(tokens),
        flops=6 * rows * weights,
        nbytes=6 * min(rows, MODEL.experts) * weights + 4 * rows * MODEL.hidden,
        quick=quick,
    )


CASES = [
    _prefill(2048, 32_768, 16_384),
    _prefill(2048, 131_072, 16_384, quick=True),
    _prefill(2048, 131_072, 32_768),
    _prefill(2048, 131_072, 131_072),
    _prefill(2048, 262_144, 32_768),
    _splash(2048, 32_768),
    _splash(2048, 131_072),
    _dense(1, 2048, 131_072, quick=True),
    _dense(1, 2048, 262_144),
    _dense(1, 1, 131_072),
    _dense(8, 1, 131_072),
    _dense(64, 1, 131_072),
    _dense(64, 1, 262_144),
    _decode(1, 131_072),
    _decode(8, 131_072, quick=True),
    _decode(64, 131_072),
    _decode(64, 262_144),
    _vision(8, 1024, quick=True),
    _experts(1),
    _experts(8, quick=True),
    _experts(64),
    _experts(2048),
]
