"""A model's weights by dotted path, and the model that a step makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from keye_jax.model.keye import Keye
from keye_jax.sharding import MeshRules
from keye_jax.train.lora import LowRank, pair_names

type Weights = dict[str, jax.Array]
"""Arrays by dotted path, such as `decoder.layers.0.attention.q_proj.weight`."""


@dataclasses.dataclass(frozen=True, eq=False)
class ModelDef:
    """A model without its weights.

    Attributes:
      graph: of its modules.
      state: its variables, with shapes in place of arrays.
      axes: logical axes of each weight.
    """

    graph: nnx.GraphDef[Keye]
    state: nnx.State
    axes: Mapping[str, tuple[str | None, ...]]

    @classmethod
    def split(cls, model: Keye) -> tuple[Self, Weights]:
        """The model without its weights, and the weights."""
        graph, state = nnx.split(model)
        flat = {dotted(path): variable for path, variable in nnx.to_flat_state(state)}
        weights = {path: variable.get_value() for path, variable in flat.items()}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        return cls(graph, shapes, {path: variable.get_metadata("axes") for path, variable in flat.items()}), weights

    def merge(self, weights: Mapping[str, jax.Array], lora_scale: float = 0.0) -> Keye:
        """The model with weights.

        Args:
          weights: all of the model's, and the low-rank pairs of some of them, by `pair_names`.
          lora_scale: what the product of a pair is scaled by.
        """
        flat = []
        for path, variable in nnx.to_flat_state(self.state):
            name = dotted(path)
            value: Any = weights[name]
            a, b = pair_names(name)
            if a in weights:
                value = LowRank(value, weights[a], weights[b], lora_scale)
            flat.append((path, variable.replace(value)))
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def dotted(path: Sequence[Any]) -> str:
    """The name of a path of the model's state."""
    return ".".join(map(str, path))


def cast(weights: Weights, dtypes: Mapping[str, jnp.dtype]) -> Weights:
    """Weights in the dtypes of the forward pass; those that `dtypes` does not name stay as they are."""
    return {path: value.astype(dtypes.get(path, value.dtype)) for path, value in weights.items()}


def training_sharding(rules: MeshRules, shape: tuple[int, ...], axes: Sequence[str | None]) -> NamedSharding | None:
    """Where a weight, its gradient and its moments lie in training; None where there is no mesh.

    They lie as the rules split the weight's own axes. Besides, the rule `parameters` splits the longest dimension that
    its mesh axes divide, so that no two devices keep the same part; a step gathers what it needs (ZeRO).
    """
    split = [rules.axes(name) for name in axes]
    extra = rules.axes("parameters")
    extra = tuple(axis for axis in extra if all(axis not in each for each in split))
    if extra:
        parts = rules.parts(extra)
        sides = [side // rules.parts(each) for side, each in zip(shape, split, strict=True)]
        fitting = [index for index, side in enumerate(sides) if side % parts == 0]
        if fitting:
            longest = max(fitting, key=lambda index: sides[index])
            split[longest] = (*split[longest], *extra)
    return rules.over(*split)
