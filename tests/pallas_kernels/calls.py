"""One small call of every operation, for tests of what all operations have in common."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import pallas_kernels

BATCH, QUERIES, HEADS, KV_HEADS, DIM, PAGES, PAGE_SIZE, TABLE = 8, 17, 4, 2, 8, 40, 4, 160
CONTEXT = PAGE_SIZE * TABLE


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call.

    Attributes:
      operation: name of the function.
      arrays: its arguments by name, float32 or int32.
      static: further arguments.
      by_batch: names of arguments whose first axis is the batch.
      constant: names of arguments of floats that have no gradient.
    """

    operation: str
    arrays: dict[str, jax.Array]
    static: dict[str, Any]
    by_batch: tuple[str, ...]
    constant: tuple[str, ...] = ()

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        function: Callable = getattr(pallas_kernels, self.operation)
        return function(**dict(zip(self.arrays, arrays, strict=True)), **self.static | static)

    def specs(self, axis: str) -> tuple[Any, Any]:
        """How arguments and results lie where `axis` divides the batch."""
        arrays = tuple(P(axis) if name in self.by_batch else P() for name in self.arrays)
        return arrays, P(axis) if self.by_batch else P()

    @property
    def differentiable(self) -> list[int]:
        """Places of the arguments that have a gradient."""
        names = [name for name, x in self.arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)]
        return [list(self.arrays).index(name) for name in names if name not in self.constant]

    def __str__(self) -> str:
        return self.operation


def calls() -> list[Call]:
    """The calls, with inputs that take more than one turn of every loop."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def whole(low: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(low, high, shape), jnp.int32)

    q, kv = random(BATCH, QUERIES, HEADS, DIM), random(PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM)
    table, start = whole(0, PAGES, BATCH, TABLE), whole(0, CONTEXT - QUERIES, BATCH)
    scores, lengths = random(BATCH, QUERIES, CONTEXT), whole(0, CONTEXT + 1, BATCH, QUERIES)
    distinct = np.argsort(rng.random((BATCH, QUERIES, CONTEXT)), axis=-1)[..., :6]
    indices = jnp.asarray(np.where(rng.random(distinct.shape) < 0.2, -1, distinct), jnp.int32)
    index = {"q": q, "weights": random(BATCH, QUERIES, HEADS), "keys": random(PAGES, PAGE_SIZE, DIM)}
    index |= {"page_table": table, "query_start": start, "key_scales": jnp.exp(random(PAGES, PAGE_SIZE))}
    lhs, sizes = random(48, DIM), jnp.asarray([20, 0, 22], jnp.int32)
    dense = {"q": q, "k": random(BATCH, 40, KV_HEADS, DIM), "v": random(BATCH, 40, KV_HEADS, DIM)}
    scale = {"scale": 0.5}
    rows = {"scores": scores, "lengths": lengths}
    return [
        Call("indexer_scores", index, scale, ("q", "weights", "page_table", "query_start")),
        Call("select_topk", rows, {"k": 6}, ("scores", "lengths"), ("scores",)),
        Call(
            "sparse_attention",
            {"q": q, "kv": kv, "indices": indices, "page_table": table},
            scale,
            ("q", "indices", "page_table"),
        ),
        Call(
            "topk_attention",
            {"q": q, **rows, "kv": kv, "page_table": table},
            scale | {"top_k": 6},
            ("q", "scores", "lengths", "page_table"),
            ("scores",),
        ),
        Call("flash_attention", dense | {"lengths": whole(0, 41, BATCH)}, scale, (*dense, "lengths")),
        Call(
            "paged_flash_attention",
            {"q": q, "kv": kv, "page_table": table, "query_start": start},
            scale,
            ("q", "page_table", "query_start"),
        ),
        Call("grouped_matmul", {"lhs": lhs, "rhs": random(3, DIM, 6), "group_sizes": sizes}, {}, ()),
        Call(
            "expert_mlp",
            {"lhs": lhs, "gate_up": random(3, DIM, 12), "down": random(3, 6, DIM), "group_sizes": sizes},
            {},
            (),
        ),
    ]
