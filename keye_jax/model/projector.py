"""From the vision encoder's patches to the decoder's embeddings: one token for each 2 x 2 patches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.layers import LayerNorm, Linear

_NORM_EPS = 1e-5


class Projector(nnx.Module):
    """Merges neighbouring patches, then LayerNorm, Linear, exact GELU, Linear."""

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        dtype, width = config.jax_dtype, config.vision_config.merged_size
        self.merge = config.vision_config.spatial_merge_size
        merged = {"merged_embed": width}
        self.norm = LayerNorm(width, _NORM_EPS, axis="merged_embed", dtype=dtype)
        self.linear1 = Linear(merged, {"merged_hidden": width}, bias=True, dtype=dtype, rngs=rngs)
        self.linear2 = Linear(
            {"merged_hidden": width}, {"embed": config.hidden_size}, bias=True, dtype=dtype, rngs=rngs
        )

    def __call__(self, hidden: jax.Array, sizes: jax.Array) -> jax.Array:
        """`(h p1 w p2) d -> (h w) (p1 p2 d)`, then the layers.

        Args:
          hidden: `[f, p, vision_embed]`, patches in raster order, p a multiple of merge * merge.
          sizes: int32 `[f, 2]`, height and width of each image in patches, multiples of merge;
            `[1, 2]` where all have the same.

        Returns:
          `[f, p / (merge * merge), embed]`, tokens in raster order; those behind an image's own mean nothing.
        """
        merged = self.norm(_merge_patches(self.merge, hidden, sizes))
        return self.linear2(jax.nn.gelu(self.linear1(merged), approximate=False))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merge_patches(merge: int, hidden: jax.Array, sizes: jax.Array) -> jax.Array:
    """`(h p1 w p2) d -> (h w) (p1 p2 d)` of each image. Its gradient is a gather too, which costs less than a scatter.

    Arguments as for `Projector.__call__`.

    Returns:
      `[f, p / (merge * merge), merge * merge * vision_embed]`.
    """
    tokens, width = hidden.shape[1] // merge**2, sizes[:, 1, None]
    index = jnp.arange(tokens)[None]
    row, column = index // (width // merge), index % (width // merge)
    inside = jnp.arange(merge)
    patch_rows = row[..., None, None] * merge + inside[:, None]
    patch_columns = column[..., None, None] * merge + inside
    patches = (patch_rows * width[..., None, None] + patch_columns).reshape(len(sizes), -1)
    merged = jnp.take_along_axis(hidden, patches[..., None], axis=1, mode="clip")
    return merged.reshape(hidden.shape[0], tokens, -1)


def _merge_patches_forward(merge: int, hidden: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _merge_patches(merge, hidden, sizes), sizes


def _merge_patches_backward(merge: int, sizes: jax.Array, d_merged: jax.Array) -> tuple[jax.Array, None]:
    patches = d_merged.shape[1] * merge**2
    index, (height, width) = jnp.arange(patches)[None], (sizes[:, :1], sizes[:, 1:])
    row, column = index // width, index % width
    token = row // merge * (width // merge) + column // merge
    place = token * merge**2 + row % merge * merge + column % merge
    d_hidden = d_merged.reshape(len(d_merged), patches, -1)
    d_hidden = jnp.take_along_axis(d_hidden, place[..., None], axis=1, mode="clip")
    return jnp.where((index < height * width)[..., None], d_hidden, 0), None


_merge_patches.defvjp(_merge_patches_forward, _merge_patches_backward)
