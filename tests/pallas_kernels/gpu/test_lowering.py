"""GPU kernels lowered for sm_90 at the released model's shapes: all of Mosaic's own checks, without a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.flash_attention.mosaic_gpu import paged_flash_attention
from pallas_kernels.grouped_matmul.mosaic_gpu import expert_mlp, gate_up_silu, grouped_matmul
from pallas_kernels.indexer_scores.mosaic_gpu import indexer_scores
from pallas_kernels.select_topk.mosaic_gpu import select_topk
from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.shapes import PAGE_SIZE, float32, int32, spec
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention
from pallas_kernels.sparse_attention.mosaic_gpu.prefill import union_attention
from pallas_kernels.sparse_attention.mosaic_gpu.unions import build_unions
from pallas_kernels.topk_attention.mosaic_gpu import topk_attention


def lower(function, *arguments):
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in program.as_text()


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize(
    ("batch", "queries", "context"), [(1, 2048, 131_072), (1, 1001, 262_144), (8, 1, 131_072), (64, 1, 32_768)]
)
def test_indexer_scores(fill, batch, queries, context):
    lower(functools.partial(indexer_scores, scale=0.125, fill=fill), *MODEL.indexer_arguments(batch, queries, context))


@pytest.mark.parametrize(
    ("batch", "queries", "context"), [(1, 2048, 131_072), (1, 8, 131_072), (1, 1001, 262_144), (8, 1, 131_072)]
)
def test_float8_indexer_scores(batch, queries, context):
    arguments = MODEL.indexer_arguments(batch, queries, context, jnp.float8_e4m3fn)

    def score(*arguments):
        return indexer_scores(*arguments[:5], scale=0.125, key_scales=arguments[5])

    lower(score, *arguments, float32(*arguments[2].shape[:2]))


@pytest.mark.parametrize(("heads", "dim"), [(8, 32), (24, 96), (32, 128), (64, 64)])
def test_indexer_scores_of_other_models(heads, dim):
    arguments = spec(2, 100, heads, dim), float32(2, 100, heads), spec(128, PAGE_SIZE, dim), int32(2, 64), int32(2)
    lower(functools.partial(indexer_scores, scale=0.125), *arguments)


@pytest.mark.parametrize(("rows", "context"), [(1024, 131_072), (4096, 32_768), (64, 262_144), (1, 131_072)])
def test_selection(rows, context):
    lower(functools.partial(select_topk, k=MODEL.top_k), float32(rows, context), int32(rows))


@pytest.mark.parametrize("context", [32_768, 131_072, 262_144, 524_288])
def test_unions(context):
    indices, table = int32(1, 2048, MODEL.top_k), MODEL.page_table(1, context)
    lower(functools.partial(build_unions, page_size=PAGE_SIZE, limit=16 * MODEL.top_k), indices, table)


@pytest.mark.parametrize("q_per_kv", [1, 2, 4, 8, 16])
def test_union_attention(q_per_kv):
    kv, lists = MODEL.kv_pages(2048 * PAGE_SIZE), int32(128, 16 * MODEL.top_k)
    q = spec(2048, MODEL.kv_heads * q_per_kv, MODEL.head_dim)
    lower(functools.partial(union_attention, scale=0.1), q, kv, lists, lists, int32(128))


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_sparse_decode(batch):
    context = 512 * PAGE_SIZE
    arguments = (
        MODEL.queries(batch, 1),
        MODEL.kv_pages(batch * context),
        int32(batch, 1, MODEL.top_k),
        MODEL.page_table(batch, context),
    )
    lower(functools.partial(sparse_attention, scale=0.1), *arguments)


@pytest.mark.parametrize(("batch", "queries", "context"), [(1, 2048, 131_072), (1, 777, 32_768), (8, 1, 131_072)])
def test_topk_attention(batch, queries, context):
    arguments = (
        MODEL.queries(batch, queries),
        float32(batch, queries, context),
        int32(batch, queries),
        MODEL.kv_pages(batch * context),
        MODEL.page_table(batch, context),
    )
    lower(functools.partial(topk_attention, top_k=MODEL.top_k, scale=0.1), *arguments)


@pytest.mark.parametrize("tokens", [1, 64, 1024, 16_384])
def test_experts(tokens):
    rows, gate_up, down, sizes = MODEL.expert_arguments(tokens)
    lower(grouped_matmul, rows, gate_up, sizes)
    lower(gate_up_silu, rows, gate_up, sizes)
    lower(expert_mlp, rows, gate_up, down, sizes)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_dense_decode(batch):
    context = 131_072
    arguments = MODEL.queries(batch, 1), MODEL.kv_pages(batch * context), MODEL.page_table(batch, context), int32(batch)
    lower(functools.partial(paged_flash_attention, scale=0.1), *arguments)
