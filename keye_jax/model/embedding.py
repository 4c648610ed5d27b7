"""Token embeddings, whose table may lie on several devices, and the choice of single tokens of a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.model.layers import param
from keye_jax.sharding.collectives import only, rank, sum_over, without
from keye_jax.sharding.step import StepSharding, spec

_FEW_ROWS = 1024
"""Of at most so many rows the gradient is a product: a GPU scatters onto few rows slowly, and in no fixed order."""


class Embedding(nnx.Module):
    """A table `weight [vocab, embed]`."""

    def __init__(self, size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = param(rngs, (size, width), ("vocab", "embed"), dtype)

    def __call__(self, ids: jax.Array, step: StepSharding) -> jax.Array:
        """`[b, t, embed]` of ids `[b, t]`."""
        return embed_sharded(self.weight[...], ids, step)


def embed_sharded(table: jax.Array, ids: jax.Array, step: StepSharding) -> jax.Array:
    """Each device looks up the tokens whose rows it has; the sum is the result. The table is not gathered.

    Args:
      table: `[vocab, embed]`.
      ids: int32 `[b, t]`.

    Returns:
      `[b, t, embed]`, split as the step's rows are.
    """
    if not step.vocab:
        return step.constrain(_look_up(table, ids), step.rows)

    def body(table: jax.Array, ids: jax.Array) -> jax.Array:
        own = ids - rank(step.vocab) * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        rows = jnp.where(here[..., None], _look_up(table, jnp.clip(own, 0, table.shape[0] - 1)), 0)
        # Each device looked up all of the rows that are to be split over devices of the table.
        rows = sum_over(rows, (), scatter=only(step.rows, step.vocab), axis=0)
        return sum_over(rows, without(step.vocab, step.rows))

    apart, together = without(step.rows, step.vocab), only(step.rows, step.vocab)
    rows = step.shard_map(body, (spec(step.vocab), spec(apart)), spec(apart + together))(table, ids)
    return step.constrain(rows, step.rows)


@jax.custom_vjp
def _look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of `table [vocab, embed]`. The gradient is summed in float32; of a small table in an order that is fixed."""
    return jnp.take(table, ids, axis=0)


def _look_up_forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _look_up(table, ids), (table, ids)


def _look_up_backward(saved: tuple[jax.Array, jax.Array], d_rows: jax.Array) -> tuple[jax.Array, None]:
    table, ids = saved[0], saved[1].reshape(-1)
    d_rows = d_rows.reshape(len(ids), -1)
    if len(table) <= _FEW_ROWS:
        chosen = (ids[:, None] == jnp.arange(len(table))).astype(d_rows.dtype)
        d_table = jnp.einsum("tv,te->ve", chosen, d_rows, preferred_element_type=jnp.float32)
    else:
        d_table = jnp.zeros(table.shape, jnp.float32).at[ids].add(d_rows.astype(jnp.float32))
    return d_table.astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def take_tokens(x: jax.Array, index: jax.Array, step: StepSharding) -> jax.Array:
    """Single tokens of a step, on every device.

    Args:
      x: `[b, t, d]`.
      index: int32 `[n]`, each from 0 to `b * t - 1`, counted row by row.

    Returns:
      `[n, d]`.
    """

    def body(x: jax.Array, index: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1])
        if not step.rows:
            return tokens[index]
        own = index - rank(step.rows) * len(tokens)
        here = (own >= 0) & (own < len(tokens))
        return sum_over(jnp.where(here[:, None], tokens[jnp.clip(own, 0, len(tokens) - 1)], 0), step.rows)

    return step.shard_map(body, (spec(step.rows), spec()), spec())(x, index)
