"""`python -m pallas_kernels.bench.float8`: the part of a bfloat16 indexer's selections that a float8 indexer shares.

Index queries, keys and gates are random and normal, as norms leave them. The queries are the last of the context.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.indexer_scores import hadamard, indexer_scores, quantize
from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.shapes import PAGE_SIZE


@functools.partial(jax.jit, static_argnames=("queries", "context", "top_k"))
def agreement(seed: int, *, queries: int, context: int, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Compares the two indexers on random inputs.

    Args:
      seed: seed of the inputs.
      queries: number of queries t, the last of the context.
      context: number of keys, a multiple of `PAGE_SIZE`.
      top_k: positions that a query selects.

    Returns:
      float32 `[t]`, the fraction of a query's positions that both select; and a float32 scalar, the norm of the
      scores' difference relative to the norm of the bfloat16 scores.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (1, queries, MODEL.index_heads, MODEL.index_dim), jnp.bfloat16)
    k = jax.random.normal(keys[1], (context // PAGE_SIZE, PAGE_SIZE, MODEL.index_dim), jnp.bfloat16)
    gates = jax.random.normal(keys[2], (1, queries, MODEL.index_heads), jnp.float32)
    table = jnp.arange(context // PAGE_SIZE, dtype=jnp.int32)[None]
    start = jnp.asarray([context - queries], jnp.int32)
    score = functools.partial(indexer_scores, scale=MODEL.index_scale)
    exact = score(q, gates, k, table, start)
    q, q_scales = quantize(hadamard(q))
    k, k_scales = quantize(hadamard(k))
    coarse = score(q, gates * q_scales, k, table, start, key_scales=k_scales)

    def selected(scores: jax.Array) -> jax.Array:
        rows = jnp.arange(queries)[:, None]
        return jnp.zeros((queries, context), bool).at[rows, jax.lax.top_k(scores[0], top_k)[1]].set(True)

    overlap = jnp.sum(selected(exact) & selected(coarse), axis=-1) / top_k
    seen = jnp.isfinite(exact)
    error = jnp.linalg.norm(jnp.where(seen, coarse - exact, 0)) / jnp.linalg.norm(jnp.where(seen, exact, 0))
    return overlap, error


def main() -> None:
    """Parses the command line and prints a line for each context."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench.float8", description=__doc__)
    parser.add_argument(
        "--context",
        type=int,
        action="append",
        help="number of keys, a multiple of 64; may be repeated; default: 32768 and 131072",
    )
    parser.add_argument("--queries", type=int, default=64, help="number of queries (default: %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=MODEL.top_k, help="positions a query selects (default: %(default)s)"
    )
    arguments = parser.parse_args()
    for context in arguments.context or (32_768, 131_072):
        if arguments.queries < 1 or arguments.top_k < 1:
            parser.error("--queries and --top-k must be at least 1")
        if context % PAGE_SIZE or context <= arguments.queries + arguments.top_k:
            parser.error(f"--context is {context}; it must be a multiple of {PAGE_SIZE} above queries + top-k")
        overlap, error = agreement(0, queries=arguments.queries, context=context, top_k=arguments.top_k)
        overlap = np.asarray(overlap)
        print(
            f"{context:,} keys, {arguments.queries} queries, top {arguments.top_k}: "
            f"{overlap.mean():.2%} in common (least {overlap.min():.2%}); scores differ by {float(error):.2%} in norm"
        )


if __name__ == "__main__":
    main()
