"""The vision encoder: a SigLIP variant for any resolution, with 2-D rotary positions (SigLIP, arXiv 2303.15343)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import VisionConfig
from keye_jax.model.layers import LayerNorm, Linear, param
from keye_jax.model.rope import apply_rope, vision_angles
from pallas_kernels.dispatch import resolve
from pallas_kernels.flash_attention import flash_attention


def interpolate_positions(table: jax.Array, rows: jax.Array, columns: jax.Array, sizes: jax.Array) -> jax.Array:
    """The square position table resized to each image's grid, at given places of it.

    Bilinear, corners not aligned, no antialias: what torch's `interpolate` computes. Place i of n maps to
    `(i + 0.5) * base / n - 0.5`, clamped to the table.

    Args:
      table: `[base * base, d]`.
      rows, columns: int32 `[f, p]`.
      sizes: int32 `[f, 2]`, height and width of each grid.

    Returns:
      float32 `[f, p, d]`.
    """
    base = round(table.shape[0] ** 0.5)
    table = table.astype(jnp.float32).reshape(base, base, -1)

    def source(places: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = (places.astype(jnp.float32) + 0.5) * (base / size.astype(jnp.float32))[:, None] - 0.5
        x = jnp.clip(x, 0.0, base - 1)
        low = jnp.floor(x).astype(jnp.int32)
        return low, jnp.minimum(low + 1, base - 1), (x - low)[..., None]

    top, bottom, down = source(rows, sizes[:, 0])
    left, right, across = source(columns, sizes[:, 1])
    upper = table[top, left] * (1 - across) + table[top, right] * across
    lower = table[bottom, left] * (1 - across) + table[bottom, right] * across
    return upper * (1 - down) + lower * down


class VisionAttention(nnx.Module):
    """Bidirectional attention within an image."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = {"vision_embed": config.hidden_size}
        heads = {"vision_heads": config.num_attention_heads, "vision_head_dim": config.head_dim}
        self.scale = config.head_dim**-0.5
        self.q_proj = Linear(hidden, heads, bias=True, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden, heads, bias=True, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(hidden, heads, bias=True, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(heads, hidden, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, lengths: jax.Array, implementation: str | None) -> jax.Array:
        q, k = apply_rope(self.q_proj(x), angles), apply_rope(self.k_proj(x), angles)
        own = resolve("flash_attention", implementation)
        out = flash_attention(q, k, self.v_proj(x), lengths, scale=self.scale, implementation=own)
        return self.o_proj(out)


class VisionMLP(nnx.Module):
    """`fc2(gelu(fc1(x)))` with the tanh form of GELU."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden, inner = {"vision_embed": config.hidden_size}, {"vision_hidden": config.intermediate_size}
        self.fc1 = Linear(hidden, inner, bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(inner, hidden, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class VisionLayer(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, axis="vision_embed", dtype=dtype)
        self.attention = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, axis="vision_embed", dtype=dtype)
        self.mlp = VisionMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, lengths: jax.Array, implementation: str | None) -> jax.Array:
        x = x + self.attention(self.norm1(x), angles, lengths, implementation)
        return x + self.mlp(self.norm2(x))


class VisionEncoder(nnx.Module):
    """Patches of images, or of frames, which are images to it, to hidden states.

    Attributes:
      position_embedding: `[base * base, embed]`, resized to each image's grid.
    """

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        pixels = {"patch_pixels": config.num_channels * config.patch_size**2}
        hidden = {"vision_embed": config.hidden_size}
        self.patch_embedding = Linear(pixels, hidden, bias=True, dtype=dtype, rngs=rngs)
        self.position_embedding = PositionTable(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([VisionLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, axis="vision_embed", dtype=dtype)

    def __call__(
        self,
        pixels: jax.Array,
        sizes: jax.Array,
        *,
        implementation: str | None = None,
        rematerialise: Callable[[Callable], Callable] | None = None,
    ) -> jax.Array:
        """Encodes f images, each by itself.

        Args:
          pixels: float32 `[f, p, channels * patch * patch]`, normalised, patches in raster order; an image of fewer
            than p patches is padded behind.
          sizes: int32 `[f, 2]`, height and width of each image in patches; `[1, 2]` where all have the same.
          rematerialise: makes each layer one that keeps less for its backward pass.

        Returns:
          `[f, p, embed]`; rows behind an image's patches mean nothing.
        """
        width = sizes[:, 1:]
        index = jnp.arange(pixels.shape[1])[None]
        rows, columns = index // width, index % width
        x = self.patch_embedding(pixels.astype(self.patch_embedding.weight.dtype))
        positions = interpolate_positions(self.position_embedding.weight[...], rows, columns, sizes)
        x = (x.astype(jnp.float32) + positions).astype(x.dtype)
        angles = vision_angles(rows, columns, self.head_dim, self.rope_theta)
        lengths = jnp.broadcast_to(sizes[:, 0] * sizes[:, 1], len(pixels))
        for layer in self.layers:
            run = functools.partial(layer, implementation=implementation)
            x = (rematerialise(run) if rematerialise else run)(x, angles, lengths)
        return self.final_norm(x)


class PositionTable(nnx.Module):
    """A learned square table `weight [base * base, embed]`."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (config.base_grid**2, config.hidden_size)
        self.weight = param(rngs, shape, ("vision_positions", "vision_embed"), dtype)
