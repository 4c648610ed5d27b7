"""What `keye-jax bench` reads: a model of random weights made on the device, and a made-up video."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye
from keye_jax.processor.positions import mrope_positions
from keye_jax.quantization.weights import QuantizedWeight, arrays_of, leaf_axes, random_grid, random_values, with_arrays
from keye_jax.runtime.prefill import Segment
from keye_jax.sharding import MeshRules

WEIGHT_SCALE = 0.02
"""Standard deviation of random matrices, as such models are initialised with."""

FRAME = 16
"""Side of a frame of the made-up video, in tokens."""

NOISE = 0.4
"""Share of each token's embedding that is its own; with 1 tokens are unrelated. With 0.4, sixteen neighbouring queries
of a model of the released size selected 7,830 of 131,072 keys together (mean of the layers; docs/performance.md)."""


def random_model(config: KeyeConfig, seed: int = 0, rules: MeshRules | None = None) -> Keye:
    """A model of random weights, the same on any mesh, made where they are kept, one array at a time."""
    graph, state = nnx.split(Keye.abstract(config))
    flat = []
    for index, (path, variable) in enumerate(nnx.to_flat_state(state)):
        value = variable.get_value()
        if isinstance(value, QuantizedWeight):
            flat.append(
                (path, variable.replace(_random_weight(value, variable.get_metadata("axes"), rules, seed, index)))
            )
            continue
        shape, dtype = variable.shape, variable.dtype
        sharding = rules.sharding(*variable.get_metadata("axes")) if rules else None
        if len(shape) == 1:
            array = _full(shape, 0 if path[-1] == "bias" else 1, dtype, sharding)
        else:
            array = _normal(np.uint32(seed), np.uint32(index), shape, dtype, sharding)
        flat.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _random_weight(
    weight: QuantizedWeight, axes: tuple[str, ...], rules: MeshRules | None, seed: int, index: int
) -> QuantizedWeight:
    """A weight of fewer bits with random values; scales are such that it is as large as other weights."""
    wanted = leaf_axes(weight, axes, rules) if rules else {}
    scale, zero = random_grid(weight.dtype)
    arrays = {}
    for role, array in arrays_of(weight).items():
        sharding = rules.sharding(*wanted[role]) if rules else None
        if role == "values":
            arrays[role] = _values(np.uint32(seed), np.uint32(index), array.shape, array.dtype, sharding)
        else:
            arrays[role] = _full(array.shape, scale if role == "scales" else zero, array.dtype, sharding)
    return with_arrays(weight, arrays)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _values(
    seed: jax.Array, index: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | None
) -> jax.Array:
    return on_devices(random_values(jax.random.fold_in(jax.random.key(seed), index), shape, dtype), sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _full(shape: tuple[int, ...], value: float, dtype: jnp.dtype, sharding: Sharding | None) -> jax.Array:
    return on_devices(jnp.full(shape, value, dtype), sharding)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _normal(
    seed: jax.Array, index: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | None
) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), index)
    return on_devices((jax.random.normal(key, shape) * WEIGHT_SCALE).astype(dtype), sharding)


def on_devices(x: jax.Array, sharding: Sharding | None) -> jax.Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A made-up video of frames of 16 x 16 tokens.

    Attributes:
      input_ids: int32 `[t]`, the token that frames stand for.
      positions: int32 `[3, t]`.
      embeds: `[t, embed]`, in the place of what the vision encoder would give.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    embeds: jax.Array

    @classmethod
    def video(
        cls, config: KeyeConfig, tokens: int, *, noise: float = NOISE, seed: int = 0, rules: MeshRules | None = None
    ) -> Prompt:
        """`tokens` tokens whose embeddings drift from one random vector to the next within a frame.

        Args:
          noise: from 0 to 1, the part of each embedding that is its own.
          rules: of the runtime that reads it.
        """
        ids = np.full(tokens, config.video_token_id, np.int32)
        side = FRAME * config.vision_config.spatial_merge_size
        frames = np.tile([[1, side, side]], (-(-tokens // FRAME**2), 1))
        whole = np.full(len(frames) * FRAME**2, config.video_token_id, np.int32)
        positions, _ = mrope_positions(
            whole,
            np.zeros((0, 3), np.int32),
            frames,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            merge_size=config.vision_config.spatial_merge_size,
        )
        everywhere = rules.sharding() if rules else None
        embeds = _drift(np.uint32(seed), tokens, config.hidden_size, noise, config.jax_dtype, everywhere)
        return cls(ids, positions[:, :tokens], embeds)

    def segment(self, pages: np.ndarray) -> Segment:
        """It as the tokens of a new sequence that holds these pages."""
        return Segment(self.input_ids, self.positions, pages, self.embeds)

    def upto(self, tokens: int) -> Prompt:
        """Its first tokens."""
        return Prompt(self.input_ids[:tokens], self.positions[:, :tokens], self.embeds[:tokens])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _drift(
    seed: jax.Array, tokens: int, width: int, noise: float, dtype: jnp.dtype, sharding: Sharding | None
) -> jax.Array:
    anchors_key, noise_key = jax.random.split(jax.random.key(seed))
    anchors = jax.random.normal(anchors_key, (tokens // FRAME**2 + 2, width))
    frame, phase = jnp.divmod(jnp.arange(tokens), FRAME**2)
    angle = (phase / FRAME**2 * jnp.pi / 2)[:, None]
    smooth = jnp.cos(angle) * anchors[frame] + jnp.sin(angle) * anchors[frame + 1]
    own = jax.random.normal(noise_key, smooth.shape)
    return on_devices(((1 - noise**2) ** 0.5 * smooth + noise * own).astype(dtype), sharding)
