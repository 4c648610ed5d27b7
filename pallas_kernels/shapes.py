"""The sizes of the released model, and the shapes of the operations' arguments at these sizes.

Benchmarks, tests and the programs compiled for TPUs take their sizes from here. The operations themselves do not: they
read sizes from their arguments.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

PAGE_SIZE = 64
"""Positions of one page of the cache."""


def spec(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array that is only traced; bfloat16 unless said otherwise."""
    return jax.ShapeDtypeStruct(shape, dtype)


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    """An int32 array that is only traced."""
    return spec(*shape, dtype=jnp.int32)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """A float32 array that is only traced."""
    return spec(*shape, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class ModelShapes:
    """Sizes of a model with sparse attention and experts. Methods return the arguments of an operation, to be traced.

    Attributes:
      heads: query heads of the decoder's attention.
      kv_heads: heads of keys and values.
      head_dim: elements of one head.
      index_heads: query heads of the indexer; its keys have one head.
      index_dim: elements of one indexer head.
      top_k: positions that a query selects.
      hidden: elements of one token's activations.
      vocab: tokens of the vocabulary.
      experts: experts of one layer.
      experts_per_token: experts that one token is routed to.
      expert_hidden: elements between an expert's two matrix products.
      vision_heads: heads of the vision encoder's attention, of queries and of keys.
      vision_dim: elements of one head of the vision encoder.
    """

    heads: int
    kv_heads: int
    head_dim: int
    index_heads: int
    index_dim: int
    top_k: int
    hidden: int
    vocab: int
    experts: int
    experts_per_token: int
    expert_hidden: int
    vision_heads: int
    vision_dim: int

    @property
    def q_per_kv(self) -> int:
        """Query heads that share a head of keys and values."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """Factor on the dot products of the decoder's attention."""
        return self.head_dim**-0.5

    @property
    def index_scale(self) -> float:
        """Factor on the indexer's scores."""
        return self.index_dim**-0.5

    @property
    def vision_scale(self) -> float:
        """Factor on the dot products of the vision encoder's attention."""
        return self.vision_dim**-0.5

    def page_table(self, batch: int, context: int) -> jax.ShapeDtypeStruct:
        """int32 `[b, m]` for sequences of `context` positions."""
        return int32(batch, context // PAGE_SIZE)

    def kv_pages(self, positions: int) -> jax.ShapeDtypeStruct:
        """Pages of keys and values `[p, page_size, 2 * k, d]` for `positions` positions of all sequences together."""
        return spec(positions // PAGE_SIZE, PAGE_SIZE, 2 * self.kv_heads, self.head_dim)

    def queries(self, batch: int, queries: int) -> jax.ShapeDtypeStruct:
        """`[b, t, n, d]`."""
        return spec(batch, queries, self.heads, self.head_dim)

    def indexer_arguments(self, batch: int, queries: int, context: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
        """q, weights, keys, page table and query start of `indexer_scores`; `dtype` is that of q and keys."""
        return (
            spec(batch, queries, self.index_heads, self.index_dim, dtype=dtype),
            float32(batch, queries, self.index_heads),
            spec(batch * context // PAGE_SIZE, PAGE_SIZE, self.index_dim, dtype=dtype),
            self.page_table(batch, context),
            int32(batch),
        )

    def expert_arguments(self, tokens: int) -> tuple[Any, ...]:
        """lhs, gate and up, down, and group sizes of `expert_mlp`; every token goes to `experts_per_token` experts."""
        return (
            spec(tokens * self.experts_per_token, self.hidden),
            spec(self.experts, self.hidden, 2 * self.expert_hidden),
            spec(self.experts, self.expert_hidden, self.hidden),
            int32(self.experts),
        )

    def projected_arguments(self, tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of `finish_projections` by name, without pages."""
        angles, index_angles = float32(tokens, self.head_dim // 2), float32(tokens, self.index_dim // 2)
        return {
            "q": spec(tokens, self.heads, self.head_dim),
            "k": spec(tokens, self.kv_heads, self.head_dim),
            "v": spec(tokens, self.kv_heads, self.head_dim),
            "index": spec(tokens, self.index_heads * (self.index_dim + 1)),
            "index_k": spec(tokens, self.index_dim),
            "q_norm": spec(self.head_dim),
            "k_norm": spec(self.head_dim),
            "index_q_norm": spec(self.index_dim),
            "index_k_norm": spec(self.index_dim),
            "index_k_bias": spec(self.index_dim),
            "cos": angles,
            "sin": angles,
            "index_cos": index_angles,
            "index_sin": index_angles,
        }


KEYE_VL_2 = ModelShapes(
    heads=32,
    kv_heads=4,
    head_dim=128,
    index_heads=16,
    index_dim=64,
    top_k=2048,
    hidden=2048,
    vocab=151_936,
    experts=128,
    experts_per_token=8,
    expert_hidden=768,
    vision_heads=16,
    vision_dim=72,
)
"""Kwai Keye-VL-2.0-30B-A3B."""
