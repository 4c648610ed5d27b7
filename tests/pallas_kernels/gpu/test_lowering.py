"""GPU kernels lowered for sm_90 at the released model's shapes: all of Mosaic's own checks, without a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.grouped_matmul.mosaic_gpu import expert_mlp, gate_up_silu, grouped_matmul
from pallas_kernels.indexer_scores.mosaic_gpu import indexer_scores
from pallas_kernels.select_topk.mosaic_gpu import select_topk
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention
from pallas_kernels.sparse_attention.mosaic_gpu.prefill import union_attention
from pallas_kernels.sparse_attention.mosaic_gpu.unions import build_unions
from pallas_kernels.topk_attention.mosaic_gpu import topk_attention

PAGE, TOP_K = 64, 2048


def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


integers = functools.partial(spec, dtype=jnp.int32)
floats = functools.partial(spec, dtype=jnp.float32)


def lower(function, *arguments):
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in program.as_text()


def index_arguments(batch, queries, context):
    pages = context // PAGE
    q, gates = spec(batch, queries, 16, 64), floats(batch, queries, 16)
    return q, gates, spec(batch * pages, PAGE, 64), integers(batch, pages), integers(batch)


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize(
    ("batch", "queries", "context"), [(1, 2048, 131_072), (1, 1001, 262_144), (8, 1, 131_072), (64, 1, 32_768)]
)
def test_indexer_scores(fill, batch, queries, context):
    lower(functools.partial(indexer_scores, scale=0.125, fill=fill), *index_arguments(batch, queries, context))


@pytest.mark.parametrize(
    ("batch", "queries", "context"), [(1, 2048, 131_072), (1, 8, 131_072), (1, 1001, 262_144), (8, 1, 131_072)]
)
def test_float8_indexer_scores(batch, queries, context):
    q, gates, keys, table, start = index_arguments(batch, queries, context)
    q, keys = (spec(*x.shape, dtype=jnp.float8_e4m3fn) for x in (q, keys))

    def score(*arguments):
        return indexer_scores(*arguments[:5], scale=0.125, key_scales=arguments[5])

    lower(score, q, gates, keys, table, start, floats(*keys.shape[:2]))


@pytest.mark.parametrize(("heads", "dim"), [(8, 32), (24, 96), (32, 128), (64, 64)])
def test_indexer_scores_of_other_models(heads, dim):
    arguments = spec(2, 100, heads, dim), floats(2, 100, heads), spec(128, PAGE, dim), integers(2, 64), integers(2)
    lower(functools.partial(indexer_scores, scale=0.125), *arguments)


@pytest.mark.parametrize(("rows", "context"), [(1024, 131_072), (4096, 32_768), (64, 262_144), (1, 131_072)])
def test_selection(rows, context):
    lower(functools.partial(select_topk, k=TOP_K), floats(rows, context), integers(rows))


@pytest.mark.parametrize("context", [32_768, 131_072, 262_144, 524_288])
def test_unions(context):
    indices, table = integers(1, 2048, TOP_K), integers(1, context // PAGE)
    lower(functools.partial(build_unions, page_size=PAGE, limit=16 * TOP_K), indices, table)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_union_attention(group):
    kv, lists = spec(2048, PAGE, 8, 128), integers(128, 16 * TOP_K)
    lower(functools.partial(union_attention, scale=0.1), spec(2048, 4 * group, 128), kv, lists, lists, integers(128))


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_sparse_decode(batch):
    arguments = (
        spec(batch, 1, 32, 128),
        spec(batch * 512, PAGE, 8, 128),
        integers(batch, 1, TOP_K),
        integers(batch, 512),
    )
    lower(functools.partial(sparse_attention, scale=0.1), *arguments)


@pytest.mark.parametrize(("batch", "queries", "context"), [(1, 2048, 131_072), (1, 777, 32_768), (8, 1, 131_072)])
def test_topk_attention(batch, queries, context):
    pages = context // PAGE
    arguments = (
        spec(batch, queries, 32, 128),
        floats(batch, queries, context),
        integers(batch, queries),
        spec(batch * pages, PAGE, 8, 128),
        integers(batch, pages),
    )
    lower(functools.partial(topk_attention, top_k=TOP_K, scale=0.1), *arguments)


@pytest.mark.parametrize("tokens", [1, 64, 1024, 16_384])
def test_experts(tokens):
    rows, sizes = tokens * 8, integers(128)
    gate_up, down = spec(128, 2048, 1536), spec(128, 768, 2048)
    lower(grouped_matmul, spec(rows, 2048), gate_up, sizes)
    lower(gate_up_silu, spec(rows, 2048), gate_up, sizes)
    lower(expert_mlp, spec(rows, 2048), gate_up, down, sizes)
