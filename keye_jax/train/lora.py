"""Low-rank pairs beside frozen weights (LoRA, arXiv 2106.09685), on linear maps and on experts.

The forward pass uses `weight + scale * pair` in place of a weight. The sum is made where a layer uses the weight, so it
lives as long as the layer's other values do. Experts have a pair each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import mapping
from convert.adapter import Adapter, Pair, adaptable, pair_sides
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.train.config import LoraConfig
from keye_jax.train.patterns import chosen

_A, _B = ".lora_a", ".lora_b"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A weight with a low-rank pair, in place of the array in a parameter.

    Attributes:
      base: the weight `[*outputs, *inputs]`, or of experts `[e, inputs, outputs]`.
      a: `[r, *inputs]`, or `[e, inputs, r]`.
      b: `[*outputs, r]`, or `[e, r, outputs]`.
      scale: of their product.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def of_experts(self) -> bool:
        return self.a.ndim + self.b.ndim > self.base.ndim + 2

    def __getitem__(self, index: Any) -> jax.Array:
        return self.merged()[index]

    def merged(self) -> jax.Array:
        """`base + scale * pair`, summed in float32, in the dtype of the weight."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        pair = jnp.einsum("eir,ero->eio", a, b) if self.of_experts else jnp.tensordot(b, a, 1)
        return (self.base.astype(jnp.float32) + self.scale * pair).astype(self.base.dtype)

    def leaf_axes(self, axes: Sequence[str | None]) -> list[tuple[str | None, ...]]:
        """Logical axes of the three arrays, from those of the weight."""
        return [tuple(axes), *_pair_axes(axes, None if self.of_experts else self.a.ndim - 1)]


def pair_names(path: str) -> tuple[str, str]:
    """The names of the two arrays of a weight's pair."""
    return path + _A, path + _B


def weight_name(path: str) -> str:
    """The weight that an array of a pair belongs to; any other path is returned as it is."""
    return path.removesuffix(_A).removesuffix(_B)


def targets(config: LoraConfig, model: KeyeConfig, source: str) -> dict[str, mapping.Tensor]:
    """The weights that get a pair, by dotted path.

    Raises:
      UserError: a pattern names no linear map and no experts.
    """
    possible = adaptable(model)
    for pattern in config.targets:
        if not pattern.startswith("!") and not any(chosen((pattern,), path) for path in possible):
            raise UserError(
                f"{source}: lora.targets has {pattern!r}; it must match linear maps or experts, which can have a pair"
            )
    return {path: tensor for path, tensor in possible.items() if chosen(config.targets, path)}


def pair_layout(
    tensor: mapping.Tensor, axes: Sequence[str | None], rank: int
) -> list[tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Shape and logical axes of the two arrays of a pair.

    Args:
      axes: those of the weight.
    """
    shape, inputs = tensor.shape, _num_inputs(tensor)
    if inputs is None:
        shapes = ((shape[0], shape[1], rank), (shape[0], rank, shape[2]))
    else:
        split = len(shape) - inputs
        shapes = ((rank, *shape[split:]), (*shape[:split], rank))
    return list(zip(shapes, _pair_axes(axes, inputs), strict=True))


def init_pair(tensor: mapping.Tensor, config: LoraConfig, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A new pair, float32: A uniform within 1 / sqrt(inputs), as in PEFT, and B zero, so the model is unchanged."""
    (a, _), (b, _) = pair_layout(tensor, (None,) * len(tensor.shape), config.rank)
    bound = 1 / math.sqrt(pair_sides(tensor)[0])
    return jax.random.uniform(key, a, jnp.float32, -bound, bound), jnp.zeros(b, jnp.float32)


def to_adapter(weights: Mapping[str, Any], config: LoraConfig, model: KeyeConfig) -> Adapter:
    """The pairs among `weights` in PEFT's shapes, float32."""
    pairs, tensors = {}, adaptable(model)
    for path, tensor in tensors.items():
        name_a, name_b = pair_names(path)
        if name_a not in weights:
            continue
        a, b = (np.asarray(weights[name], np.float32) for name in (name_a, name_b))
        inputs, outputs = pair_sides(tensor)
        if _num_inputs(tensor) is None:
            a, b = a.swapaxes(1, 2), b.transpose(2, 1, 0)
        pairs[path] = Pair(np.ascontiguousarray(a).reshape(-1, inputs), np.ascontiguousarray(b).reshape(outputs, -1))
    return Adapter(config.rank, config.scale, pairs)


def from_adapter(adapter: Adapter, model: KeyeConfig) -> dict[str, np.ndarray]:
    """The pairs of an adapter by the names of `pair_names`, float32."""
    arrays, tensors = {}, adaptable(model)
    for path, pair in adapter.pairs.items():
        tensor, rank = tensors[path], adapter.rank
        (shape_a, _), (shape_b, _) = pair_layout(tensor, (None,) * len(tensor.shape), rank)
        a, b = pair.a.astype(np.float32), pair.b.astype(np.float32)
        if _num_inputs(tensor) is None:
            a = a.reshape(len(a) // rank, rank, -1).swapaxes(1, 2)
            b = b.reshape(len(b), rank, -1).transpose(2, 1, 0)
        names = pair_names(path)
        arrays |= {
            names[0]: np.ascontiguousarray(a).reshape(shape_a),
            names[1]: np.ascontiguousarray(b).reshape(shape_b),
        }
    return arrays


def _num_inputs(tensor: mapping.Tensor) -> int | None:
    """How many of a weight's last dimensions are inputs; None for experts."""
    if tensor.part == "experts":
        return None
    inputs = pair_sides(tensor)[0]
    return next(n for n in range(1, len(tensor.shape)) if math.prod(tensor.shape[-n:]) == inputs)


def _pair_axes(axes: Sequence[str | None], inputs: int | None) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    if inputs is None:
        return (axes[0], axes[1], None), (axes[0], None, axes[2])
    split = len(axes) - inputs
    return (None, *axes[split:]), (*axes[:split], None)
