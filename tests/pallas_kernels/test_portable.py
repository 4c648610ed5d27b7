"""The portable implementations' ways on GPUs, run on any platform."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

import pallas_kernels
from keye_jax.quantization.schemes import FORMATS
from pallas_kernels import portable
from pallas_kernels.flash_attention import xla as flash
from pallas_kernels.grouped_matmul import xla as grouped
from pallas_kernels.indexer_scores import xla as indexer
from pallas_kernels.select_topk import counting
from pallas_kernels.select_topk.xla import select_topk
from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.shapes import float32, int32
from pallas_kernels.sparse_attention import xla as sparse
from tests.pallas_kernels.calls import calls
from tests.pallas_kernels.selection_oracle import selection
from tests.pallas_kernels.test_grouped_matmul import SIZES, by_group, check
from tests.pallas_kernels.test_quantized_experts import matrices

CALLS = {str(call): call for call in calls()}


@pytest.fixture
def for_gpus(monkeypatch):
    monkeypatch.setattr(portable, "on_gpus", lambda gpu, elsewhere, *arrays: gpu(*arrays))


def loss(call, *arrays):
    found = jax.tree.leaves(call(*arrays, implementation="xla"))
    return sum(jnp.sum(jnp.where(jnp.isfinite(x), jnp.sin(x), 0)) for x in found), found


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("operation", CALLS)
def test_results_and_gradients_are_those_of_other_platforms(operation, monkeypatch, request):
    """With workspaces so small that every loop takes several turns."""
    call = CALLS[operation]
    arrays = list(call.arrays.values())

    def run():
        if call.differentiable:
            function = jax.value_and_grad(functools.partial(loss, call), argnums=call.differentiable, has_aux=True)
        else:
            function = functools.partial(loss, call)
        return jax.jit(function)(*arrays)

    expected = run()
    request.getfixturevalue("for_gpus")
    for module in (sparse, indexer, flash):
        monkeypatch.setattr(module, "_GPU_WORKSPACE_BYTES", 2**18)
    got = run()
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("for_gpus")
class TestGroupedMatmul:
    @pytest.mark.parametrize("case", SIZES)
    @pytest.mark.parametrize("way", ["all matrices", "blocks"])
    def test_group_sizes(self, rng, case, way, monkeypatch):
        """Blocks in several turns; the last blocks are of no group."""
        rows, sizes = SIZES[case]
        if way == "blocks":
            monkeypatch.setattr(grouped, "_SOME_ROWS", 0)
            monkeypatch.setattr(grouped, "_WORKSPACE_BYTES", 40_000)
        lhs, rhs = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((rows, 24), (len(sizes), 24, 40)))
        got = jax.jit(lambda *arrays: grouped.grouped_matmul(*arrays))(lhs, rhs, jnp.asarray(sizes, jnp.int32))
        check(got, by_group(lhs, rhs, sizes), rows, 1e-5)
        assert not np.asarray(got)[sum(sizes) :].any()

    def test_a_row_has_the_same_bits_wherever_it_is(self, rng, monkeypatch):
        monkeypatch.setattr(grouped, "_SOME_ROWS", 0)
        lhs, rhs = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((600, 64), (4, 64, 48)))
        run = jax.jit(lambda *arrays: grouped.grouped_matmul(*arrays))
        alone = run(lhs, rhs, jnp.array([1, 0, 0, 0], jnp.int32))[0]
        among = run(jnp.roll(lhs, 300, axis=0), rhs, jnp.array([500, 60, 0, 40], jnp.int32))[300]
        np.testing.assert_array_equal(np.asarray(alone, np.float32), np.asarray(among, np.float32))


@pytest.mark.usefixtures("for_gpus")
class TestSelectTopk:
    @pytest.mark.parametrize("kind", ["random", "close", "ties", "zeros", "equal", "infinities"])
    @pytest.mark.parametrize(("size", "k"), [(20_001, 2048), (31, 7), (10, 64)])
    def test_against_a_sort(self, rng, kind, size, k):
        scores = rng.normal(size=(8, size))
        match kind:
            case "close":
                scores = 1 + scores * 2**-12
            case "ties":
                scores = np.round(scores)
            case "zeros":
                scores = np.where(rng.random(scores.shape) < 0.5, 0.0, -0.0)
            case "equal":
                scores = np.full_like(scores, -3.5)
            case "infinities":
                scores = np.where(scores > 2, np.inf, np.where(scores < 0, -np.inf, scores))
        scores = scores.astype(np.float32)
        lengths = np.clip([size, size - 1, k + 1, k, k - 1, 1, 0, size // 2], 0, size).astype(np.int32)
        got = jax.jit(functools.partial(select_topk, k=k))(scores, lengths)
        np.testing.assert_array_equal(got, selection(scores, lengths, k))

    def test_numbers_out_of_range(self):
        scores = jnp.array([[1.0, jnp.nan, 3.0, -jnp.nan, jnp.inf]] * 3)
        got = jax.jit(functools.partial(select_topk, k=3))(scores, jnp.array([9, -1, 3]))
        assert got.tolist() == [[1, 3, 4], [-1, -1, -1], [0, 1, 2]]


class TestSparseAttention:
    def test_under_a_mask(self, monkeypatch, request):
        """All rows of the context under a mask, a few queries a turn, or the selected rows alone."""
        call = CALLS["sparse_attention"]
        expected = call(*call.arrays.values(), implementation="xla")
        request.getfixturevalue("for_gpus")
        monkeypatch.setattr(sparse, "_all_is_less", lambda *arrays: True)
        monkeypatch.setattr(sparse, "_GPU_WORKSPACE_BYTES", 4 * 8 * 4 * 640 * 5)
        got = jax.jit(lambda *arrays: call(*arrays, implementation="xla"))(*call.arrays.values())
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

    def test_short_contexts_are_masked(self):
        """Of the released model: prompts are, up to 16K; steps of decode, whose queries share no rows, are not."""
        for queries, context, expected in ((2048, 8192, True), (2048, 16_384, True), (2048, 32_768, False)):
            assert self.masked(queries, context) == expected
        assert not self.masked(1, 8192)

    @staticmethod
    def masked(queries, context):
        q, kv, indices = MODEL.queries(1, queries), MODEL.kv_pages(context), int32(1, queries, MODEL.top_k)
        arrays: list[Any] = [q, kv, indices, MODEL.page_table(1, context)]
        return sparse._all_is_less(*arrays)


def primitives(jaxpr, *, loops=True):
    """Every equation of a program, those of its calls included, and those of its loops if `loops`."""
    for equation in jaxpr.eqns:
        yield equation
        if not loops and equation.primitive.name in ("scan", "while"):
            continue
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from primitives(getattr(value, "jaxpr", value), loops=loops)


def released(queries, context):
    """Every operation at the released model's shapes."""
    q, kv, table = MODEL.queries(1, queries), MODEL.kv_pages(context), MODEL.page_table(1, context)
    indexed = (int32(1, queries, MODEL.top_k), table)
    vision = [jax.ShapeDtypeStruct((4, 1024, MODEL.vision_heads, MODEL.vision_dim), jnp.bfloat16)] * 3
    rows, gate_up, down, sizes = MODEL.expert_arguments(queries)
    attention = {"scale": MODEL.scale}
    return {
        "indexer_scores": (MODEL.indexer_arguments(1, queries, context), attention),
        "select_topk": ((float32(1, queries, context), int32(1, queries)), {"k": MODEL.top_k}),
        "sparse_attention": ((q, kv, *indexed), attention),
        "topk_attention": (
            (q, float32(1, queries, context), int32(1, queries), kv, table),
            attention | {"top_k": MODEL.top_k},
        ),
        "flash_attention": ((*vision, int32(4)), attention),
        "paged_flash_attention": ((q, kv, table, int32(1)), attention),
        "grouped_matmul": ((rows, gate_up, sizes), {}),
        "expert_mlp": ((rows, gate_up, down, sizes), {}),
    }


@pytest.mark.usefixtures("for_gpus")
@pytest.mark.parametrize(("queries", "context"), [(2048, 8192), (2048, 131_072), (1, 32_768), (64, 32_768)])
@pytest.mark.parametrize("operation", CALLS)
def test_the_device_decides_no_loops_end(operation, queries, context):
    """Loops of a known number of turns are scans. Nothing is sorted, and no forward product has float32 operands."""
    arguments, static = released(queries, context)[operation]
    run = functools.partial(getattr(pallas_kernels, operation), implementation="xla", **static)
    found = list(primitives(jax.make_jaxpr(run)(*arguments).jaxpr))
    assert not {"while", "sort", "top_k"} & {equation.primitive.name for equation in found}
    products: list[Any] = [equation for equation in found if equation.primitive.name == "dot_general"]
    if operation != "indexer_scores":  # It multiplies float32 gates by float32 dot products.
        assert all(x.aval.dtype == jnp.bfloat16 for equation in products for x in equation.invars)
    for equation in products:
        assert equation.params["preferred_element_type"] == jnp.float32


@pytest.mark.usefixtures("for_gpus")
@pytest.mark.parametrize(("queries", "context"), [(2048, 8192), (2048, 131_072)])
@pytest.mark.parametrize("operation", CALLS)
def test_no_loop_begins_with_large_constants(operation, queries, context):
    """On GPUs they are in memory from a program's beginning, in a model those of every layer.

    A scan's stacked results are among them: JAX begins them with zeros.
    """
    arguments, static = released(queries, context)[operation]
    run = functools.partial(getattr(pallas_kernels, operation), implementation="xla", **static)
    constant, begun = set(), []
    for equation in primitives(jax.make_jaxpr(run)(*arguments).jaxpr, loops=False):
        known = [x for x in equation.invars if isinstance(x, Literal) or x in constant]
        if equation.primitive.name == "scan":
            parts = equation.params["jaxpr"].jaxpr.outvars
            both: list[Any] = list(zip(equation.outvars, parts, strict=True))
            begun += [*known, *(out for out, part in both if out.aval.shape != part.aval.shape)]
        elif len(known) == len(equation.invars):
            constant.update(equation.outvars)
    assert not [str(x.aval) for x in begun if x.aval.size * x.aval.dtype.itemsize > 2**22]


class TestMapBlocks:
    @pytest.mark.parametrize("number", [1, 3])
    def test_is_a_map(self, rng, number):
        blocks = (jnp.asarray(rng.normal(size=(number, 4, 5)), jnp.float32), jnp.arange(number))
        after = jnp.asarray([[7, 8]])

        def function(block):
            x, index = block
            return {"sum": jnp.sum(x, axis=0) + index, "index": index}

        got = jax.jit(lambda blocks: portable.map_blocks(function, blocks, after))(blocks)
        expected = jax.lax.map(function, blocks)
        jax.tree.map(np.testing.assert_array_equal, got, expected)

    def test_numbers_that_are_none_are_overwritten(self):
        got = portable.map_blocks(lambda x: x + 1, jnp.arange(3.0), jnp.asarray([jnp.nan]))
        assert got.tolist() == [1, 2, 3]


def test_programs_for_gpus_count_and_others_sort():
    lowered = {
        platform: jax.jit(functools.partial(select_topk, k=8))
        .trace(float32(2, 64), int32(2))
        .lower(lowering_platforms=(platform,))
        .as_text()
        for platform in ("cpu", "cuda", "rocm", "tpu")
    }
    assert {platform for platform, text in lowered.items() if "top_k" in text} == {"cpu", "tpu"}


@pytest.mark.usefixtures("for_gpus", "quick_to_compile")
@pytest.mark.parametrize("format", FORMATS)
def test_matrices_of_fewer_bits(format, monkeypatch):
    """Several turns of a few blocks, whose matrices alone become numbers."""
    stored, numbers = matrices(format, 160, 96)
    lhs = jnp.asarray(np.random.default_rng(0).normal(size=(300, 160)), jnp.float32)
    sizes = jnp.asarray([70, 200, 0, 15, 5], jnp.int32)
    monkeypatch.setattr(grouped, "_WORKSPACE_BYTES", 2 * 160 * 96 * 4)
    got = jax.jit(pallas_kernels.quantized_grouped_matmul)(lhs, stored, sizes)
    expected = pallas_kernels.grouped_matmul(lhs, numbers.astype(jnp.float32), sizes)
    scale = np.abs(expected).max()
    # The numbers are compared in bfloat16.
    np.testing.assert_allclose(got, expected, atol=2**-7 * float(scale))
    text = jax.jit(pallas_kernels.quantized_grouped_matmul).lower(lhs, stored, sizes).as_text()
    assert "tensor<5x160x96xf32>" not in text


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_small_top_k_is_top_k(rows):
    """Above and below the number of rows where the method changes; values repeat."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, (rows, 128)), jnp.float32)
    for got, expected in zip(portable.small_top_k(x, 8), jax.lax.top_k(x, 8), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize(
    ("choose", "compared"),
    [
        (lambda x: portable.small_top_k(x, 8), "stablehlo.compare"),
        (lambda x: counting.select_topk(x, jnp.full(2, 100), 8), "stablehlo.while"),
    ],
    ids=["small_top_k", "counting"],
)
def test_values_are_computed_before_they_are_compared(choose, compared):
    """A kernel of a GPU that computes a value in two places may round it in two ways. So a barrier comes between."""
    text = jax.jit(lambda x: choose(jax.nn.softmax(x))).lower(jnp.zeros((2, 128))).as_text()
    barrier = text.index("stablehlo.optimization_barrier")
    assert text.rindex("stablehlo.exponential") < barrier < text.rindex(compared)
    assert compared == "stablehlo.while" or barrier < text.index(compared)
