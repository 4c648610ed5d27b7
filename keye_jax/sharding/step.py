"""How one compiled step lies over a mesh of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from keye_jax.sharding.collectives import Axes, only, without
from keye_jax.sharding.mesh_rules import MeshRules


@dataclasses.dataclass(frozen=True)
class StepSharding:
    """The mesh axes that each dimension of a step's arrays is split over; static and hashable.

    A step reads rows: runs of neighbouring tokens of one sequence. Where the pages of a sequence lie is a matter of the
    rules alone, the same for every step: along `home` on one shard, along `cache_sequence` in turns, page by page.
    On one device there are no axes, and every method leaves what it is given as it is.

    Attributes:
      rules: the mesh and its rules.
      batch: axes along which a row lies where its sequence's pages are.
      query_sequence: axes over which the rows of any sequence are dealt out.
      reads_prompts: whether rows have several tokens, which see the pages of other shards.
    """

    rules: MeshRules
    batch: Axes
    query_sequence: Axes
    reads_prompts: bool

    @classmethod
    def prefill(cls, rules: MeshRules) -> StepSharding:
        """Of a step that reads prompts."""
        shared = rules.axes("query_sequence")
        return cls(rules, without(rules.axes("batch"), shared), shared, reads_prompts=True)

    @classmethod
    def decode(cls, rules: MeshRules) -> StepSharding:
        """Of a step that reads one token of each sequence."""
        return cls(rules, rules.axes("batch"), (), reads_prompts=False)

    @property
    def rows(self) -> Axes:
        """Axes that split the step's rows."""
        return self.batch + self.query_sequence

    @property
    def home(self) -> Axes:
        """Axes along which all pages of a sequence lie on one shard."""
        return self.rules.axes("batch")

    @property
    def cache_sequence(self) -> Axes:
        """Axes along which page j of a sequence lies on shard j modulo their number."""
        return self.rules.cache_sequence

    @property
    def pages(self) -> Axes:
        """Axes that split the pool's pages."""
        return self.home + self.cache_sequence

    @property
    def broadcast(self) -> Axes:
        """Axes along which a row needs pages that one other shard has."""
        return only(self.home, self.query_sequence)

    @property
    def gathers_pages(self) -> bool:
        """Whether each device needs pages of others for the time of a layer."""
        return self.reads_prompts and bool(self.cache_sequence or self.broadcast)

    @property
    def heads(self) -> Axes:
        return self.rules.axes("heads")

    @property
    def kv_heads(self) -> Axes:
        return self.rules.axes("kv_heads")

    @property
    def experts(self) -> Axes:
        return self.rules.axes("experts")

    @property
    def expert_hidden(self) -> Axes:
        return self.rules.axes("expert_hidden")

    @property
    def expert_parts(self) -> Axes:
        """Axes along which devices have other parts of the experts."""
        return self.experts + self.expert_hidden

    @property
    def vocab(self) -> Axes:
        return self.rules.axes("vocab")

    @property
    def vision_patches(self) -> Axes:
        return self.rules.axes("vision_patches")

    def size(self, axes: Axes) -> int:
        """Into how many parts `axes` split."""
        return self.rules.parts(axes)

    def constrain(self, x: jax.Array, *dimensions: Axes) -> jax.Array:
        """`x` with its dimensions split over these axes; () and missing ones are not split."""
        if self.rules.devices == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.rules.mesh, spec(*dimensions)))

    def shard_map(self, body: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`body` on each device's parts."""
        if self.rules.devices == 1:
            return body
        return jax.shard_map(body, mesh=self.rules.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def shard_module(self, module: Any, body: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        """`body(module, *arguments)` on each device's parts, of parameters those that the rules give it.

        Args:
          module: an nnx module, or a tuple of modules.
        """
        if self.rules.devices == 1:
            return lambda *arguments: body(module, *arguments)
        graph, state = nnx.split(module)
        leaves, tree = jax.tree.flatten(state)
        variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        specs = [self.rules.spec(*axes) for x in variables for axes in _leaf_axes(x)]
        assert len(specs) == len(leaves)

        def run(leaves: list[jax.Array], *arguments: Any) -> Any:
            return body(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), *arguments)

        call = self.shard_map(run, (specs, *in_specs), out_specs)
        return lambda *arguments: call(leaves, *arguments)


def _leaf_axes(variable: nnx.Variable) -> list[tuple[str | None, ...]]:
    """Logical axes of the arrays of a parameter: one, or several where training puts another value in its place."""
    axes, value = variable.get_metadata("axes"), variable.get_value()
    return value.leaf_axes(axes) if hasattr(value, "leaf_axes") else [axes]


def spec(*dimensions: Axes) -> PartitionSpec:
    """The partition of an array whose dimensions are split over these axes; () and missing ones are not split."""
    return PartitionSpec(*(axes or None for axes in dimensions))
