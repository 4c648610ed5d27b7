"""Which rows belong to which group."""

import jax
import jax.numpy as jnp


def group_ends(rows: int, group_sizes: jax.Array) -> jax.Array:
    """The end of each group's rows, int32 `[e]`.

    A size below 0 counts as 0. Groups for which too few rows are left get those, or none.
    """
    return jnp.minimum(jnp.cumsum(jnp.clip(group_sizes, 0, rows)), rows)
