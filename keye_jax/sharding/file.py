"""Sharding files: mesh axes with their sizes, and which part of the model goes over which of them.

    mesh:                       # axes from the outermost to the innermost, whose devices are neighbours
      data: 2
      sequence: auto            # whatever devices are left; at most one axis
    rules:                      # logical axis: a mesh axis, a list of them, or null for "not split", as when left out
      batch: data
      cache_sequence: sequence
      experts: [data, sequence]
    exchange:
      experts: all_gather       # or all_to_all, or auto
    across_slices: data         # the axis that runs from one TPU slice to the next; left out within one slice

Every mistake is a `UserError` that names the file, the field, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError, shorten
from keye_jax.parsing import read_yaml

AUTO = "auto"

LOGICAL_AXES = {
    "batch": "sequences, each with all of its pages",
    "query_sequence": "rows of a chunk of prompts",
    "cache_sequence": "pages of a sequence, in turns",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "experts": "experts",
    "expert_hidden": "the hidden dimension inside an expert",
    "vocab": "the vocabulary",
    "vision_patches": "images and frames in the vision encoder",
    "parameters": "in training, weights, gradients and moments, besides what their own axes split",
}
"""What a rule can be for."""

EXPERT_EXCHANGES = (AUTO, "all_gather", "all_to_all")
"""How tokens reach their experts: all tokens to all devices, or each to its experts' owners."""

TOGETHER = (
    ("batch", "heads"),
    ("query_sequence", "heads"),
    ("cache_sequence", "heads"),
    ("experts", "expert_hidden"),
)
"""Logical axes that one array has together: no mesh axis can serve both.

`batch` may share an axis with `query_sequence`: devices that read a prompt then fetch its pages from its home. Along an
axis of `batch` the rule of `cache_sequence` has no effect: all pages of a sequence lie on one shard there.
"""


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """What a sharding file says.

    Attributes:
      source: what messages call it: its path.
      mesh: axes from the outermost to the innermost with their sizes, None for "auto".
      rules: the mesh axes of each logical axis that has any.
      experts: one of `EXPERT_EXCHANGES`.
      across_slices: the mesh axis that runs over TPU slices, or None.
    """

    source: str
    mesh: tuple[tuple[str, int | None], ...]
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    experts: str = AUTO
    across_slices: str | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> ShardingConfig:
        """Reads a sharding file.

        Raises:
          UserError: it is not YAML, or a field is impossible.
          FileNotFoundError: there is no such file.
        """
        return cls.from_dict(read_yaml(path), source=str(path))

    @classmethod
    def from_dict(cls, values: Any, *, source: str = "sharding") -> ShardingConfig:
        """Reads what a sharding file holds. Raises UserError as `from_file` does."""
        read = _Reader(source)
        top = read.mapping("the file", values, ("mesh", "rules", "exchange", "across_slices"))
        if "mesh" not in top:
            raise UserError(f"{source}: mesh is missing; it must name at least one axis and its size")
        mesh = tuple((name, read.size(name, size)) for name, size in read.mapping("mesh", top["mesh"]).items())
        if not mesh:
            read.fail("mesh", {}, "at least one axis and its size")
        automatic = [name for name, size in mesh if size is None]
        if len(automatic) > 1:
            read.fail("mesh", f"auto for {' and '.join(automatic)}", "auto for one axis at most")
        names = [name for name, _ in mesh]
        given = read.mapping("rules", {} if top.get("rules") is None else top["rules"], tuple(LOGICAL_AXES))
        rules = {name: read.axes(f"rules.{name}", value, names) for name, value in given.items()}
        rules = {name: axes for name, axes in rules.items() if axes}
        for together in TOGETHER:
            read.refuse_repeats(rules, *together)
        if rules.get("heads") != rules.get("kv_heads"):
            read.fail("rules.kv_heads", given.get("kv_heads"), "that of rules.heads: query heads lie with their keys")
        exchange = read.mapping("exchange", {} if top.get("exchange") is None else top["exchange"], ("experts",))
        experts = exchange.get("experts", AUTO)
        if experts not in EXPERT_EXCHANGES:
            read.fail("exchange.experts", experts, f"one of {', '.join(EXPERT_EXCHANGES)}")
        across = top.get("across_slices")
        if across is not None and across not in names:
            read.fail("across_slices", across, f"an axis of the mesh: {', '.join(names)}")
        return cls(source, mesh, tuple(rules.items()), experts, across)

    def axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes that the logical axis `name` is split over."""
        return dict(self.rules).get(name, ())

    def with_sizes(self, **sizes: int) -> ShardingConfig:
        """The same rules on a mesh of other sizes; axes that are not named keep theirs."""
        unknown = sizes.keys() - dict(self.mesh).keys()
        assert not unknown, f"no such axes: {unknown}"
        return dataclasses.replace(self, mesh=tuple((name, sizes.get(name, size)) for name, size in self.mesh))

    def sizes(self, devices: int) -> dict[str, int]:
        """The mesh's sizes on a number of devices; all are used where an axis is "auto".

        Raises:
          UserError: the mesh needs more devices, or "auto" cannot use them evenly.
        """
        fixed = math.prod(size for _, size in self.mesh if size is not None)
        automatic = next((name for name, size in self.mesh if size is None), None)
        stated = " x ".join(f"{name} {size or AUTO}" for name, size in self.mesh)
        if fixed > devices:
            raise UserError(f"{self.source}: the mesh ({stated}) needs {fixed} devices; there are {devices}")
        if automatic is not None and devices % fixed:
            raise UserError(
                f"{self.source}: mesh.{automatic} is auto, but {devices} devices cannot be shared out over the other "
                f"axes ({stated}): their product {fixed} must divide {devices}"
            )
        return {name: devices // fixed if size is None else size for name, size in self.mesh}

    def check(self, model: KeyeConfig, sizes: Mapping[str, int]) -> None:
        """Holds the rules to a model, on a mesh of these sizes.

        Raises:
          UserError: a dimension of the model cannot be split evenly as a rule says; the message says what would do.
        """
        dimensions = {
            "heads": (model.num_attention_heads, "num_attention_heads"),
            "kv_heads": (model.num_key_value_heads, "num_key_value_heads"),
            "experts": (model.num_experts, "num_experts"),
            "expert_hidden": (model.moe_intermediate_size, "moe_intermediate_size"),
            "vocab": (model.vocab_size, "vocab_size"),
        }
        for name, axes in self.rules:
            if name not in dimensions:
                continue
            dimension, field = dimensions[name]
            parts = math.prod(sizes[axis] for axis in axes)
            if dimension % parts:
                over = " x ".join(f"{axis} {sizes[axis]}" for axis in axes)
                raise UserError(
                    f"{self.source}: rules.{name} splits {field} {dimension} into {parts} ({over}), which does not "
                    f"divide it; {_divisors(dimension, max(sizes.values()) * 2)} would"
                )


def _divisors(number: int, most: int) -> str:
    found = [str(n) for n in range(1, min(number, most) + 1) if number % n == 0]
    return f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else found[0]


class _Reader:
    """Checks values, and fails in the name of their file."""

    def __init__(self, source: str):
        self._source = source

    def fail(self, field: str, value: Any, allowed: str) -> NoReturn:
        raise UserError(f"{self._source}: {field} is {shorten(value)}; it must be {allowed}")

    def mapping(self, field: str, value: Any, known: tuple[str, ...] | None = None) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
            self.fail(field, value, "a mapping of names")
        for key in value:
            if known is not None and key not in known:
                raise UserError(f"{self._source}: {field} has {key!r}; known are {', '.join(known)}")
        return dict(value)

    def size(self, name: str, value: Any) -> int | None:
        if value == AUTO:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(f"mesh.{name}", value, "a positive integer or auto")
        return value

    def axes(self, field: str, value: Any, names: list[str]) -> tuple[str, ...]:
        axes = [] if value is None else value if isinstance(value, list) else [value]
        for axis in axes:
            if axis not in names:
                self.fail(field, axis, f"an axis of the mesh: {', '.join(names)}")
        if len(set(axes)) < len(axes):
            self.fail(field, axes, "axes that differ: each can split it once")
        return tuple(axes)

    def refuse_repeats(self, rules: Mapping[str, tuple[str, ...]], first: str, second: str) -> None:
        for axis in rules.get(first, ()):
            if axis in rules.get(second, ()):
                raise UserError(
                    f"{self._source}: mesh axis {axis} is used twice, by rules.{first} and rules.{second}, which split "
                    "the same array; one of them must go over another axis"
                )
