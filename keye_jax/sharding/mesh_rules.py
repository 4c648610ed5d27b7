"""A mesh of devices with the rules that split arrays over it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.sharding.collectives import Axes, without
from keye_jax.sharding.file import AUTO, ShardingConfig

FEW_EXPERT_RANKS = 8
"""With at most this number of shards of experts, "auto" sends all tokens to all of them."""


@dataclasses.dataclass(frozen=True)
class MeshRules:
    """A mesh of devices with the rules that split arrays over it.

    It is hashable, so static in compiled steps. Two that were made of the same file and devices are equal.

    Attributes:
      mesh: the devices, or only their number along each axis.
      rules: the mesh axes of each logical axis that is split. Axes of one device are left out.
      expert_exchange: "all_gather" or "all_to_all".
      platform: what the devices are to JAX: "cpu", "gpu" or "tpu".
    """

    mesh: Mesh | AbstractMesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    expert_exchange: str = "all_gather"
    platform: str = "cpu"

    @classmethod
    def create(
        cls, sharding: ShardingConfig, model: KeyeConfig | None = None, devices: Sequence[Any] | None = None
    ) -> MeshRules:
        """The mesh of a sharding file over the devices there are.

        Args:
          model: what the rules are held to, if given.
          devices: those to use; all there are if left out. In one process a mesh may use only the first of them.

        Raises:
          UserError: there are too few devices, or they cannot be shared out as the file says, or the model cannot.
        """
        devices = list(jax.devices() if devices is None else devices)
        sizes = sharding.sizes(len(devices))
        if model is not None:
            sharding.check(model, sizes)
        needed = math.prod(sizes.values())
        _check_all_are_used(sharding, needed, len(devices), len({device.process_index for device in devices}))
        return cls._on(Mesh(_arrange(sharding, sizes, devices[:needed]), tuple(sizes)), sharding, devices[0].platform)

    @classmethod
    def abstract(
        cls,
        sharding: ShardingConfig,
        model: KeyeConfig,
        devices: int,
        platform: str,
        *,
        processes: int = 1,
        stand_ins: Sequence[Any] = (),
    ) -> MeshRules:
        """What `create` would make of this number of devices, to compute with. No array can be put there.

        Args:
          processes: how many have the devices.
          stand_ins: objects with the attributes of JAX devices that say where in a network a device is, if it matters.

        Raises:
          UserError: as `create` does.
        """
        sizes = sharding.sizes(devices)
        sharding.check(model, sizes)
        needed = math.prod(sizes.values())
        _check_all_are_used(sharding, needed, devices, processes)
        if stand_ins:
            _arrange(sharding, sizes, list(stand_ins[:needed]))
        axis_types = (AxisType.Auto,) * len(sizes)
        return cls._on(AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types), sharding, platform)

    @classmethod
    def _on(cls, mesh: Mesh | AbstractMesh, sharding: ShardingConfig, platform: str) -> MeshRules:
        sizes = mesh.shape
        rules = {name: tuple(axis for axis in axes if sizes[axis] > 1) for name, axes in sharding.rules}
        exchange = sharding.experts
        if exchange == AUTO:
            ranks = math.prod(sizes[axis] for axis in rules.get("experts", ()))
            exchange = "all_gather" if ranks <= FEW_EXPERT_RANKS else "all_to_all"
        return cls(mesh, tuple((name, axes) for name, axes in rules.items() if axes), exchange, platform)

    @classmethod
    def single_device(cls, platform: str | None = None) -> MeshRules:
        """No mesh: all on the default device, whose platform is JAX's default unless named."""
        return cls(AbstractMesh((), ()), (), platform=platform or jax.default_backend())

    @property
    def devices(self) -> int:
        """How many devices there are; 1 where there is no mesh."""
        return math.prod(self.mesh.shape.values())

    def axes(self, name: str | None) -> Axes:
        """Mesh axes of more than one device that the logical axis `name` is split over, the outermost first."""
        return () if name is None else dict(self.rules).get(name, ())

    @property
    def cache_sequence(self) -> Axes:
        """Axes that split the pages of one sequence: those of the rule that do not split sequences."""
        return without(self.axes("cache_sequence"), self.axes("batch"))

    def parts(self, axes: Axes) -> int:
        """Into how many parts mesh `axes` split."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def size(self, name: str | None) -> int:
        """Into how many parts the logical axis `name` is split."""
        return self.parts(self.axes(name))

    def spec(self, *names: str | None) -> PartitionSpec:
        """The partition of an array with these logical axes; None, or a name without a rule, is not split."""
        return PartitionSpec(*(self.axes(name) or None for name in names))

    def sharding(self, *names: str | None) -> NamedSharding | None:
        """`spec` on the mesh: of no names, a copy on every device. None where there is no mesh."""
        return self.over(*(self.axes(name) for name in names))

    def over(self, *dimensions: Axes) -> NamedSharding | None:
        """Of an array whose dimensions are split over these mesh axes; None where there is no mesh."""
        if not self.mesh.shape:
            return None
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in dimensions)))


def unused(rules: MeshRules, devices: int) -> str | None:
    """A sentence about the devices that a mesh leaves idle; None if it uses all."""
    idle = devices - rules.devices
    if not idle:
        return None
    verb = "is" if idle == 1 else "are"
    return f"the mesh uses {rules.devices} of {devices} devices; {idle} {verb} idle, and --sharding can use them"


def _check_all_are_used(sharding: ShardingConfig, needed: int, devices: int, processes: int) -> None:
    if needed < devices and processes > 1:
        raise UserError(
            f"{sharding.source}: the mesh uses {needed} of {devices} devices, which {processes} processes have; it "
            "must use all of them"
        )


def _arrange(sharding: ShardingConfig, sizes: dict[str, int], devices: list[Any]) -> np.ndarray:
    """The devices in the mesh's shape, neighbours in the network next to each other on its inner axes."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    shape = tuple(sizes.values())
    if len(slices) <= 1:
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except (AssertionError, NotImplementedError, ValueError) as error:
            found = " x ".join(map(str, shape))
            raise UserError(f"{sharding.source}: mesh is {found}; these {len(devices)} devices form none") from error
    across = sharding.across_slices
    if across is None or sizes[across] % len(slices):
        raise UserError(
            f"{sharding.source}: across_slices is {across!r}, but the devices are in {len(slices)} slices; it must be "
            f"a mesh axis whose size is a multiple of {len(slices)}"
        )
    between = tuple(len(slices) if axis == across else 1 for axis in sizes)
    within = tuple(size // count for size, count in zip(shape, between, strict=True))
    try:
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        found = " x ".join(map(str, within))
        raise UserError(f"{sharding.source}: mesh is {found} in a slice; the devices of a slice form none") from error
