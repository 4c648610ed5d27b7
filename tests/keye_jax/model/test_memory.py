"""What the compiler says it needs for sparse attention at the released model's sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from keye_jax.kv_cache import PAGE_SIZE, Pages
from keye_jax.model.attention import AttentionInputs, AttentionOptions, attend_sparse
from keye_jax.model.context import Keys

GIB = 2**30


def temporary_bytes(context: int, *, queries: int = 2048) -> int:
    """Temporaries of one layer's scores, selection and attention, with `context` tokens in the cache."""
    pages = context // PAGE_SIZE

    def spec(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def attend(
        inputs: AttentionInputs, pages: Pages, table: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        scales = {"scale": 128**-0.5, "index_scale": 64**-0.5}
        found = attend_sparse(inputs, Keys(pages, table, start), top_k=2048, **scales, options=AttentionOptions())
        return found.out, found.lse

    compiled = (
        jax.jit(attend)
        .lower(
            AttentionInputs(
                q=spec(1, queries, 32, 128),
                k=spec(1, queries, 4, 128),
                v=spec(1, queries, 4, 128),
                index_q=spec(1, queries, 16, 64),
                gates=spec(1, queries, 16, dtype=jnp.float32),
                index_keys=spec(1, queries, 64),
                index_scales=None,
            ),
            Pages(spec(pages, PAGE_SIZE, 8, 128), spec(pages, PAGE_SIZE, 64)),
            spec(1, pages, dtype=jnp.int32),
            spec(1, dtype=jnp.int32),
        )
        .compile()
    )
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_a_layer_of_128k_tokens_needs_less_than_3_gib():
    assert temporary_bytes(131_072) < 3 * GIB


@pytest.mark.parametrize("context", [32_768, 131_072])
def test_four_times_the_context_needs_at_most_four_and_a_half_times_the_memory(context):
    assert temporary_bytes(4 * context) <= 4.5 * temporary_bytes(context)


def test_memory_does_not_grow_with_the_number_of_queries():
    assert temporary_bytes(131_072, queries=8192) < 1.5 * temporary_bytes(131_072, queries=2048)
