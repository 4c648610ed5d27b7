"""Attention and experts."""

import functools
from unittest import mock

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels.flash_attention import mosaic_tpu as dense
from pallas_kernels.grouped_matmul import mosaic_tpu as experts
from pallas_kernels.sparse_attention import mosaic_tpu as listed
from pallas_kernels.topk_attention import mosaic_tpu as unions
from tests.tpu_compile.cases import PAGE, TOP_K, Case, Simulation, floats, integers, spec

HEADS, KV_HEADS, DIM = 32, 4, 128
SCALE = DIM**-0.5
PAIR_FLOPS = 4 * HEADS * DIM
"""Of one query with one key: two products."""
UNIT_KEYS = 2048
"""Of what is simulated of a prefill."""
ROW_BYTES = 2 * KV_HEADS * DIM * 2
"""A position's keys and values."""


def _pages(batch: int, context: int) -> jax.ShapeDtypeStruct:
    """At most 8 GiB of pages, which a v5e holds: sequences may share them."""
    return spec(min(batch * context, 2**22) // PAGE, PAGE, 2 * KV_HEADS, DIM)


def _prefill(batch: int, queries: int, context: int, *, quick: bool = False) -> Case:
    """Attention, once each query's threshold is known."""

    def arguments(batch: int, queries: int, context: int):
        rows = batch, queries
        return (
            spec(*rows, HEADS, DIM),
            floats(*rows, context),
            floats(*rows),
            integers(*rows),
            integers(*rows),
            _pages(batch, context),
            integers(batch, context // PAGE),
        )

    unit, keys = unions.QUERIES, UNIT_KEYS

    def simulated(*arguments):
        # At the end of a block, and so many sums that tpu7x's model of the unit that adds lanes gives up.
        with mock.patch.object(unions, "_sum_of_lanes", lambda x: x[:, :1]):
            return unions.threshold_attention(*arguments, scale=SCALE, one_pass=True)

    return Case(
        "union_attention",
        f"{batch} x {queries} queries, {context // 1024}K",
        functools.partial(unions.threshold_attention, scale=SCALE),
        arguments(batch, queries, context),
        flops=batch * queries * TOP_K * PAIR_FLOPS,
        nbytes=4 * batch * queries * context + batch * context * ROW_BYTES,
        simulation=Simulation(simulated, arguments(1, unit, keys), batch * queries // unit * (context // keys)),
        quick=quick,
    )


def _decode(batch: int, context: int, *, quick: bool = False) -> Case:
    def arguments(batch: int, context: int):
        return (
            spec(batch, 1, HEADS, DIM),
            _pages(batch, context),
            integers(batch, 1, TOP_K),
            integers(batch, context // PAGE),
        )

    function = functools.partial(listed.sparse_attention, scale=SCALE)
    return Case(
        "sparse_attention",
        f"{batch} x 1 query, {context // 1024}K",
        function,
        arguments(batch, context),
        flops=batch * TOP_K * PAIR_FLOPS,
        nbytes=batch * TOP_K * ROW_BYTES,
        simulation=Simulation(function, arguments(1, context), batch),
        quick=quick,
    )


def _dense(batch: int, queries: int, context: int, *, quick: bool = False) -> Case:
    """Dense attention over pages by the last `queries` of a context."""

    def arguments(batch: int, queries: int, context: int):
        return (
            spec(batch, queries, HEADS, DIM),
            _pages(batch, context),
            integers(batch, context // PAGE),
            integers(batch),
        )

    function = functools.partial(dense.paged_flash_attention, scale=SCALE)
    unit, keys = min(queries, 256), UNIT_KEYS if queries > 1 else 8 * UNIT_KEYS

    def simulated(*arguments):
        with mock.patch.object(dense, "_query_start", lambda *_: keys - unit):
            return function(*arguments)

    return Case(
        "paged_flash_attention",
        f"{batch} x {queries} queries, {context // 1024}K",
        function,
        arguments(batch, queries, context),
        flops=batch * queries * context * PAIR_FLOPS,
        nbytes=batch * context * ROW_BYTES,
        simulation=Simulation(simulated, arguments(1, unit, keys), batch * queries // unit * (context // keys)),
        quick=quick,
    )


def _splash(queries: int, context: int) -> Case:
    """JAX's splash attention by the last `queries` of a context in one piece: what is compared with."""

    blocks = splash_attention.BlockSizes(block_q=1024, block_kv=1024, block_kv_compute=512)

    def function(q, k, v):
        mask = splash_attention.CausalMask((q.shape[1], k.shape[1]), offset=k.shape[1] - q.shape[1])
        masks = splash_attention.MultiHeadMask([mask] * q.shape[0])
        return splash_attention.make_splash_mha_single_device(masks, block_sizes=blocks)(q, k, v)

    def simulated(q, k, v):
        """Without a mask: the simulation would take every block of one for hidden."""
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
        keys = spec(kv_heads, context, DIM)
        return spec(heads, queries, DIM), keys, keys

    unit, keys = 1024, UNIT_KEYS
    return Case(
        "splash_attention",
        f"1 x {queries} queries, {context // 1024}K",
        function,
        arguments(HEADS, KV_HEADS, queries, context),
        flops=queries * context * PAIR_FLOPS,
        nbytes=context * ROW_BYTES,
        # One head's queries of a block.
        simulation=Simulation(simulated, arguments(1, 1, unit, keys), HEADS * (queries // unit) * (context // keys)),
    )


def _vision(images: int, patches: int, *, quick: bool = False) -> Case:
    heads, dim = 16, 72
    array = spec(images, patches, heads, dim)
    function = functools.partial(dense.flash_attention, scale=dim**-0.5)
    return Case(
        "flash_attention",
        f"{images} x {patches} patches",
        function,
        (array, array, array, integers(images)),
        flops=4 * images * heads * patches**2 * dim,
        nbytes=8 * images * patches * heads * dim,
        quick=quick,
    )


def _experts(tokens: int, *, quick: bool = False) -> Case:
    count, chosen, hidden, inner = 128, 8, 2048, 768
    rows = tokens * chosen
    return Case(
        "expert_mlp",
        f"{tokens} tokens",
        experts.expert_mlp,
        (spec(rows, hidden), spec(count, hidden, 2 * inner), spec(count, inner, hidden), integers(count)),
        flops=6 * rows * hidden * inner,
        nbytes=6 * min(rows, count) * hidden * inner + 4 * rows * hidden,
        quick=quick,
    )


CASES = [
    _prefill(1, 2048, 131_072, quick=True),
    _prefill(1, 2048, 262_144),
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
