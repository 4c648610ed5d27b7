"""Where portable implementations differ between platforms.

A GPU waits for the host before every turn of a loop whose end the device decides, and is idle with little work a turn.
So on GPUs loops have a known number of turns and a large workspace, even if some turns then compute nothing that
anybody reads. Other platforms stop early, and keep a small workspace in their caches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.meshes import vary_like

_FEW_ROWS = 64
"""At most this number is ranked by comparing all values with all in one pass; sorting takes a GPU several kernels."""


def on_gpus(gpu: Callable[..., Any], elsewhere: Callable[..., Any], *arrays: Any) -> Any:
    """`gpu(*arrays)` in a program for GPUs of any maker, `elsewhere(*arrays)` in others.

    Args:
      gpu, elsewhere: functions of the arrays, with results of the same shapes and dtypes.
      arrays: trees of arrays; all vary over the same mesh axes.
    """
    return _by_platform({"cuda": gpu, "rocm": gpu}, elsewhere, arrays)


def on_tpus(tpu: Callable[..., Any], elsewhere: Callable[..., Any], *arrays: Any) -> Any:
    """`tpu(*arrays)` in a program for TPUs, `elsewhere(*arrays)` in others; as `on_gpus`."""
    return _by_platform({"tpu": tpu}, elsewhere, arrays)


def _by_platform(functions: dict[str, Callable[..., Any]], elsewhere: Callable[..., Any], arrays: Any) -> Any:
    leaves = jax.tree.leaves(arrays)

    def varying(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: vary_like(function(*arrays), *leaves)

    branches = {platform: varying(function) for platform, function in functions.items()}
    return jax.lax.platform_dependent(*arrays, **branches, default=varying(elsewhere))


def map_blocks(function: Callable[[Any], Any], blocks: Any, after: jax.Array) -> Any:
    """`jax.lax.map(function, blocks)`, whose results have no memory before `after` is computed.

    A loop overwrites its first results. `jax.lax.map` begins with zeros, and on GPUs XLA makes the constants of all
    layers at a program's beginning: results of every layer would be in memory all the time.

    Args:
      function: of a block, without its leading axis. It has a gradient as a `jax.lax.scan` has.
      blocks: a tree of arrays, stacked along a leading axis, at least one.
      after: an array of any shape, not empty, that is computed late.
    """
    number = jax.tree.leaves(blocks)[0].shape[0]

    def block(index: jax.Array | int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), blocks)

    def turn(index: jax.Array, done: Any) -> Any:
        return jax.tree.map(
            lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, index, 0), done, function(block(index))
        )

    shapes = jax.eval_shape(function, block(0))
    begun = jax.tree.map(lambda x: fill_after((number, *x.shape), x.dtype, after), shapes)
    return jax.lax.fori_loop(0, number, turn, vary_like(begun, *jax.tree.leaves(shapes)))


def fill_after(shape: tuple[int, ...], dtype: Any, after: jax.Array) -> jax.Array:
    """An array to be overwritten, filled with the first number of `after`, so not made before that is computed."""
    return jnp.full(shape, after[(0,) * after.ndim].astype(dtype))


def small_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of `[rows, n]`: values and positions `[rows, k]`, largest first, of equal ones the lower."""
    rows, width = x.shape
    if rows > _FEW_ROWS:
        return jax.lax.top_k(x, k)
    # Computed once: a kernel that computes a value in two places may round it in two ways, and it is ahead of itself.
    x = jax.lax.optimization_barrier(x)
    at = jnp.arange(width)
    ahead = (x[:, None, :] > x[:, :, None]) | ((x[:, None, :] == x[:, :, None]) & (at < at[:, None]))
    wanted = jnp.sum(ahead, axis=-1)[:, None, :] == jnp.arange(k)[:, None]
    return jnp.sum(jnp.where(wanted, x[:, None, :], 0), axis=-1), jnp.sum(jnp.where(wanted, at, 0), axis=-1)
