"""Loops over blocks, and what sums are kept in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def equal_blocks(count: int, most: int) -> int:
    """The fewest equal blocks that `count` things make where a block has at most `most`, or one if that is less."""
    return next(blocks for blocks in range(1, count + 1) if count % blocks == 0 and count // blocks <= max(1, most))


def scan(run: Callable[[Any, Any], tuple[Any, Any]], carry: Any, items: Any) -> tuple[Any, Any]:
    """`lax.scan`, without a loop where there is one turn."""
    if len(jax.tree.leaves(items)[0]) > 1:
        return jax.lax.scan(run, carry, items)
    carry, result = run(carry, jax.tree.map(lambda x: x[0], items))
    return carry, jax.tree.map(lambda x: x[None], result)


def wide(x: jax.Array) -> jnp.dtype:
    """The dtype of sums of numbers such as x: float32, or float64 where those are."""
    return jnp.promote_types(x.dtype, jnp.float32)
