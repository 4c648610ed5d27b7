"""How one compiled step lies over a mesh of devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from keye_jax.sharding import Layout

type Axes = tuple[str, ...]

STRIPE = 256
"""Neighbouring tokens of a chunk that stay on one device, at most: a multiple of what kernels take together."""

STRIPE_MULTIPLE = 16
"""A device's tokens of a chunk are a multiple of this, so that stripes are."""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The mesh axes that each dimension of a step's arrays is split over; static and hashable.

    A layout's rules are for all steps. Of one step the number of sequences and of tokens is known: sequences that
    cannot be shared out evenly stay whole, an axis that splits the sequences does not split their tokens or positions
    too, and a single token a sequence is not split at all.

    Attributes:
      mesh: the devices, or only their number along each axis.
      batch, query_sequence, cache_sequence, heads, kv_heads, experts, expert_hidden, vocab, vision_patches: mesh axes,
        outermost first.
      expert_exchange: "all_gather" or "all_to_all".
      platform: of the devices, to JAX.
    """

    mesh: Mesh | AbstractMesh
    batch: Axes
    query_sequence: Axes
    cache_sequence: Axes
    heads: Axes
    kv_heads: Axes
    experts: Axes
    expert_hidden: Axes
    vocab: Axes
    vision_patches: Axes
    expert_exchange: str
    platform: str

    @classmethod
    def of(cls, layout: Layout, batch: int, tokens: int) -> Parallel:
        """A step that reads `tokens` tokens of each of `batch` sequences."""
        over, parts = [], 1
        for axis in layout.axes("batch"):
            parts *= layout.mesh.shape[axis]
            if batch % parts:
                break
            over.append(axis)

        def left(name: str) -> Axes:
            return tuple(axis for axis in layout.axes(name) if axis not in over)

        return cls(
            mesh=layout.mesh,
            batch=tuple(over),
            query_sequence=() if tokens == 1 else left("query_sequence"),
            cache_sequence=left("cache_sequence"),
            heads=layout.axes("heads"),
            kv_heads=layout.axes("kv_heads"),
            experts=layout.axes("experts"),
            expert_hidden=layout.axes("expert_hidden"),
            vocab=layout.axes("vocab"),
            vision_patches=layout.axes("vision_patches"),
            expert_exchange=layout.expert_exchange,
            platform=layout.platform,
        )

    @property
    def tokens(self) -> Axes:
        """Axes that split a step's tokens, of any sequence."""
        return self.batch + self.query_sequence

    @property
    def pages(self) -> Axes:
        """Axes that split the cache's pages: those of different sequences, then those of different positions."""
        return self.batch + self.cache_sequence

    def size(self, axes: Axes) -> int:
        """Into how many parts `axes` split."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def sharding(self, *dimensions: Axes) -> NamedSharding:
        """Of an array whose dimensions are split over these axes, () for not at all; missing ones are not split."""
        return NamedSharding(self.mesh, spec(*dimensions))

    def constrain(self, x: jax.Array, *dimensions: Axes) -> jax.Array:
        """`x`, laid out as `sharding` says."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*dimensions))

    def shard_map(self, body: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`body` on each device's parts."""
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def shard_module(self, module: Any, body: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        """`body(module, *arguments)` on each device's parts; of parameters, those that the rules give it.

        Args:
          module: an nnx module, or a tuple of some.
        """
        graph, state = nnx.split(module)
        leaves, tree = jax.tree.flatten(state)
        variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        assert len(variables) == len(leaves)
        specs = [spec(*(getattr(self, axis, ()) for axis in x.get_metadata("axes"))) for x in variables]

        def run(leaves: list[jax.Array], *arguments: Any) -> Any:
            return body(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), *arguments)

        call = self.shard_map(run, (specs, *in_specs), out_specs)
        return lambda *arguments: call(leaves, *arguments)

    # The order of a chunk's tokens.

    def stripe(self, tokens: int) -> int:
        """Tokens of a stripe of a chunk of so many."""
        return math.gcd(tokens // self.size(self.query_sequence), STRIPE)

    def token_order(self, tokens: int) -> np.ndarray:
        """Where each token of a chunk's array stands in the chunk, int32 `[tokens]`.

        Later queries see more keys. For equal work, neighbouring stripes of tokens are on different devices: of n,
        device r holds stripes r, r + n, r + 2 n and so on, which lie one behind the other in the array.
        """
        ranks, stripe = self.size(self.query_sequence), self.stripe(tokens)
        return np.arange(tokens, dtype=np.int32).reshape(-1, ranks, stripe).swapaxes(0, 1).reshape(-1)

    def in_order(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """`x` with its tokens, on `axis`, as they stand in the chunk."""
        ranks, stripe = self.size(self.query_sequence), self.stripe(x.shape[axis])
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        return x.reshape(*before, ranks, -1, stripe, *after).swapaxes(axis, axis + 1).reshape(x.shape)


def spec(*dimensions: Axes) -> PartitionSpec:
    """The partition of an array whose dimensions are split over these axes, () for not at all."""
    return PartitionSpec(*(axes or None for axes in dimensions))


def only(axes: Axes, among: Axes) -> Axes:
    """Those of `axes` that are `among` others."""
    return tuple(axis for axis in axes if axis in among)


def without(axes: Axes, others: Axes) -> Axes:
    """Those of `axes` that are not among `others`."""
    return tuple(axis for axis in axes if axis not in others)


def rank(axes: Axes) -> jax.Array | int:
    """This device's number along `axes`, inside `Parallel.shard_map`."""
    return jax.lax.axis_index(axes) if axes else 0


def all_gather(x: jax.Array, axes: Axes, axis: int) -> jax.Array:
    """The parts of all devices along mesh `axes`, one behind the other on `axis`."""
    if not axes:
        return x
    # Not every platform's collectives know float8.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x
    with jax.named_scope("collectives"):
        bits = jax.lax.all_gather(bits, axes, axis=axis, tiled=True)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def sum_over(x: jax.Array, axes: Axes, scatter: Axes = (), axis: int = 0) -> jax.Array:
    """The sum over mesh axes `axes` and `scatter`; of the latter each device keeps its part of `axis`."""
    with jax.named_scope("collectives"):
        if scatter:
            x = jax.lax.psum_scatter(x, scatter, scatter_dimension=axis, tiled=True)
        return jax.lax.psum(x, axes) if axes else x


def as_words(x: jax.Array) -> jax.Array:
    """Bits of `x [..., n]` as uint32 `[..., n * itemsize / 4]`: numbers of different types travel together."""
    pairs = 4 // x.dtype.itemsize
    if pairs > 1:
        x = x.reshape(*x.shape[:-1], -1, pairs)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def from_words(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Undoes `as_words`."""
    x = jax.lax.bitcast_convert_type(words, dtype)
    return x.reshape(*words.shape[:-1], -1) if x.ndim > words.ndim else x
