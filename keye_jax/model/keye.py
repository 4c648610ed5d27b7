"""The whole network: vision encoder, projector and decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.decoder import Decoder
from keye_jax.model.projector import Projector
from keye_jax.model.vision import VisionEncoder
from keye_jax.quantization.weights import QuantizedWeight, arrays_of, with_arrays
from keye_jax.sharding.step import StepSharding


class Keye(nnx.Module):
    """Keye-VL-2.0.

    Attributes:
      vision: patches to hidden states.
      projector: hidden states to token embeddings.
      decoder: embeddings to logits.
    """

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        self.vision = VisionEncoder(config.vision_config, dtype=config.jax_dtype, rngs=rngs)
        self.projector = Projector(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    @classmethod
    def abstract(cls, config: KeyeConfig) -> Keye:
        """The model with shapes and dtypes in place of arrays."""
        return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))

    @classmethod
    def parameter_count(cls, config: KeyeConfig) -> int:
        """Numbers that the model holds (a checkpoint also stores a table that it does not use)."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(cls.abstract(config))))

    @classmethod
    def from_params(cls, config: KeyeConfig, params: Mapping[str, Any]) -> Keye:
        """The model with `params`, arrays nested by module path as in a converted checkpoint.

        Raises:
          ValueError: an array is missing, unexpected or of another shape than the configuration gives.
        """
        graph, state = nnx.split(cls.abstract(config))
        wanted = dict(arrays_by_name(state))
        given = flatten_params(params)
        problems = [f"{name} is missing" for name in wanted.keys() - given.keys()]
        problems += [f"{name} is unexpected" for name in given.keys() - wanted.keys()]
        for name in wanted.keys() & given.keys():
            if given[name].shape != wanted[name].shape:
                problems.append(f"{name} has shape {given[name].shape}, not {wanted[name].shape}")
        if problems:
            raise ValueError(f"parameters do not fit the configuration: {'; '.join(sorted(problems))}")
        flat = []
        for path, variable in nnx.to_flat_state(state):
            name, value = ".".join(map(str, path)), variable.get_value()
            if isinstance(value, QuantizedWeight):
                new = with_arrays(value, {role: given[f"{name}.{role}"] for role in arrays_of(value)})
            else:
                new = given[name]
            flat.append((path, variable.replace(new)))
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def embed(self, ids: jax.Array, vision_embeds: jax.Array, vision_index: jax.Array, step: StepSharding) -> jax.Array:
        """Embeddings of rows of a prompt: of tokens, and of vision where the prompt has a pad.

        Args:
          ids: int32 `[b, t]`.
          vision_embeds: `[v, embed]`, at least one row.
          vision_index: int32 `[b, t]`, the row of `vision_embeds` that stands there, or -1 for a token.
          step: how the result lies over devices.

        Returns:
          `[b, t, embed]`.
        """
        seen = vision_embeds[jnp.maximum(vision_index, 0)]
        return jnp.where((vision_index >= 0)[..., None], seen, self.decoder.embed_tokens(ids, step))


def arrays_by_name(state: nnx.State) -> Iterator[tuple[str, Any]]:
    """The arrays of a model's state by dotted path; of a weight of fewer bits each by its role, such as `.scales`."""
    for path, variable in nnx.to_flat_state(state):
        name, value = ".".join(map(str, path)), variable.get_value()
        if isinstance(value, QuantizedWeight):
            yield from ((f"{name}.{role}", array) for role, array in arrays_of(value).items())
        else:
            yield name, value


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested arrays by dotted module path."""
    flat = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten_params(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
