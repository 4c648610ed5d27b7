"""From the vision encoder's patches to the decoder's embeddings: one token for each 2 x 2 patches."""

from __future__ import annotations

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
        tokens = hidden.shape[1] // self.merge**2
        width = sizes[:, 1, None]
        index = jnp.arange(tokens)[None]
        row, column = index // (width // self.merge), index % (width // self.merge)
        inside = jnp.arange(self.merge)
        patch_rows = row[..., None, None] * self.merge + inside[:, None]
        patch_columns = column[..., None, None] * self.merge + inside
        patches = (patch_rows * width[..., None, None] + patch_columns).reshape(len(sizes), -1)
        merged = jnp.take_along_axis(hidden, patches[..., None], axis=1, mode="clip")
        merged = self.norm(merged.reshape(hidden.shape[0], tokens, -1))
        return self.linear2(jax.nn.gelu(self.linear1(merged), approximate=False))
