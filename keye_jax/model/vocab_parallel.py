"""Token embeddings from a table whose rows lie on different devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from keye_jax.model.parallel import Parallel, only, rank, spec, sum_over, without


def look_up(table: jax.Array, ids: jax.Array, parallel: Parallel) -> jax.Array:
    """Each device looks up those tokens whose rows it has; the sum is the result. The table is not gathered.

    Args:
      table: `[vocab, embed]`.
      ids: int32 `[b, t]`.

    Returns:
      `[b, t, embed]`, tokens split as the step's are.
    """
    p = parallel

    def body(table: jax.Array, ids: jax.Array) -> jax.Array:
        own = ids - rank(p.vocab) * table.shape[0]
        there = (own >= 0) & (own < table.shape[0])
        rows = jnp.where(there[..., None], table[jnp.clip(own, 0, table.shape[0] - 1)], 0)
        # Of the tokens that are to be split over devices of the table, each device looked up all.
        rows = sum_over(rows, (), scatter=only(p.batch, p.vocab), axis=0)
        rows = sum_over(rows, (), scatter=only(p.query_sequence, p.vocab), axis=1)
        return sum_over(rows, without(p.vocab, p.tokens))

    apart = [(without(axes, p.vocab), only(axes, p.vocab)) for axes in (p.batch, p.query_sequence)]
    in_spec, out_spec = spec(*(outer for outer, _ in apart)), spec(*(outer + inner for outer, inner in apart))
    rows = p.shard_map(body, (spec(p.vocab), in_spec), out_spec)(table, ids)
    return p.constrain(rows, p.batch, p.query_sequence)
