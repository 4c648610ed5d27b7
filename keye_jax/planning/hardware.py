"""Accelerators that a job can be planned for, and what their makers say of them."""

from __future__ import annotations

import dataclasses
import re

from keye_jax.errors import UserError, shorten
from keye_jax.planning.slices import StandIn, devices_of, known_slices, sides_of, stand_ins

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      platform: what it is to JAX: "cpu", "gpu" or "tpu".
      memory: bytes; None for what this machine has.
      flops: peak bfloat16 floating point operations a second, dense.
      bandwidth: bytes a second from and to memory.
      interconnect: bytes a second to other devices, in one direction, all links together.
      source: where the figures come from.
      description: of a GPU, what XLA's compiler must know of it to compile for it elsewhere, a `GpuTargetConfigProto`
        in text; None for one that programs are not compiled for elsewhere.
      implementations: of the kernels, those that it can run, best first.
    """

    platform: str
    memory: float | None
    flops: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None
    source: str = ""
    description: str | None = None
    implementations: tuple[str, ...] = ("xla",)


def _hopper(memory: float, bandwidth: float) -> str:
    """A GPU of NVIDIA's compute capability 9.0, SXM."""
    return f"""
        platform_name: "CUDA"
        gpu_device_info {{
          cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          device_memory_size: {memory:.0f} memory_bandwidth: {bandwidth:.0f} l2_cache_size: {50 * 2**20}
          shared_memory_per_core: {228 * 1024}
          shared_memory_per_block: {48 * 1024} shared_memory_per_block_optin: {227 * 1024}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""


_NVIDIA, _GEFORCE = "NVIDIA's data sheet", "NVIDIA's paper on the architecture, GeForce"
_CLOUD = "Google Cloud's TPU documentation"
_HOPPER, _CUDA, _TPU = ("mosaic_gpu", "cudnn", "xla"), ("cudnn", "xla"), ("mosaic_tpu", "xla")
_ANY_GPU = _HOPPER[::-1]
"""Of a GPU that is only described, what surely runs comes first."""

CHIPS = {
    "cpu": Chip("cpu", None),
    "h100": Chip(*("gpu", 80e9, 989e12, 3.35e12, 450e9, f"{_NVIDIA}, H100 SXM"), _hopper(80e9, 3.35e12), _HOPPER),
    "h200": Chip(*("gpu", 141e9, 989e12, 4.8e12, 450e9, f"{_NVIDIA}, H200 SXM"), _hopper(141e9, 4.8e12), _HOPPER),
    "b200": Chip("gpu", 180e9, 2.25e15, 8e12, 900e9, f"{_NVIDIA}, DGX B200", implementations=_CUDA),
    "a100": Chip("gpu", 80e9, 312e12, 2.039e12, 300e9, f"{_NVIDIA}, A100 SXM 80 GB", implementations=_CUDA),
    # These have no NVLink: what goes between two of them goes over PCI Express, 16 lanes.
    "l40s": Chip("gpu", 48e9, 362e12, 864e9, 32e9, f"{_NVIDIA}, L40S", implementations=_CUDA),
    "rtx4090": Chip("gpu", 24e9, 165e12, 1.008e12, 32e9, f"{_GEFORCE} RTX 4090", implementations=_CUDA),
    "rtx5090": Chip("gpu", 32e9, 209.5e12, 1.792e12, 64e9, f"{_GEFORCE} RTX 5090", implementations=_CUDA),
    "mi300x": Chip("gpu", 192e9, 1307e12, 5.3e12, 448e9, "AMD's data sheet, Instinct MI300X"),
    "v5e": Chip("tpu", 16 * GIB, 197e12, 819e9, 200e9, f"{_CLOUD}, v5e", implementations=_TPU),
    "v5p": Chip("tpu", 95 * GIB, 459e12, 2765e9, 600e9, f"{_CLOUD}, v5p", implementations=_TPU),
    "v6e": Chip("tpu", 32 * GIB, 918e12, 1638e9, 400e9, f"{_CLOUD}, v6e", implementations=_TPU),
    # A chip of two cores, each a device with its half of the chip.
    "tpu7x": Chip(
        *("tpu", 96 * GIB, 2307e12 / 2, 7380e9 / 2, 600e9 / 2, f"{_CLOUD}, TPU7x, half a chip"), implementations=_TPU
    ),
}

_MOST_DEVICES, _MOST_SLICES = 65_536, 1024
_GPUS_OF_A_HOST = 8
_UNITS = {
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}


def quantity(option: str, text: str, per: str = "") -> float:
    """Bytes, or with `per` "/s" bytes a second: "80GiB", "3.35TB/s". Raises UserError for anything else."""
    found = re.fullmatch(rf"([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?) ?([a-z]+){per}", text.strip(), re.IGNORECASE | re.ASCII)
    units = {name.casefold(): size for name, size in _UNITS.items()}
    if found is None or found[2].casefold() not in units or not float(found[1]):
        example = {"": "80GiB or 80GB", "/s": "3.35TB/s or 900GB/s"}[per]
        raise UserError(f"{option} is {shorten(text)}; it must be a number with a unit, such as {example}")
    return float(found[1]) * units[found[2].casefold()]


@dataclasses.dataclass(frozen=True)
class Platform:
    """Devices of one kind.

    Attributes:
      name: "v5p:2x2x4" or "h200:4".
      chip: one of them.
      devices: how many, in all slices.
      topology: what the TPU compiler calls a slice; None elsewhere.
      slices: how many TPU slices.
    """

    name: str
    chip: Chip
    devices: int
    topology: str | None = None
    slices: int = 1

    @classmethod
    def parse(
        cls, text: str, slices: int = 1, *, memory: float | None = None, bandwidth: float | None = None
    ) -> Platform:
        """Reads "KIND:COUNT", or of a TPU "KIND:TOPOLOGY", such as h200:4 or v5e:4x8, in letters of either case.

        Args:
          memory: bytes of one device. With it KIND may be any name, of a GPU; a known one keeps its other figures.
          bandwidth: bytes a second from and to its memory.

        Raises:
          UserError: there is no such platform.
        """
        kind, _, size = text.strip().casefold().partition(":")
        if kind not in CHIPS and memory is None:
            raise UserError(
                f"--platform is {shorten(text)}; it must be KIND:COUNT or KIND:TOPOLOGY, KIND of {', '.join(CHIPS)}, "
                "or any other name if --device-memory is given"
            )
        if re.fullmatch(r"[a-z0-9._-]{1,40}", kind) is None:
            raise UserError(
                f"--platform is {shorten(text)}; the name of a device must have only letters, digits, . _ -"
            )
        chip = CHIPS.get(kind, Chip("gpu", memory, source="the command line", implementations=_ANY_GPU))
        given = {"memory": memory, "bandwidth": bandwidth}
        if changes := {name: value for name, value in given.items() if value is not None}:
            chip = dataclasses.replace(chip, **changes, description=None)
        if not 1 <= slices <= _MOST_SLICES or (slices > 1 and chip.platform != "tpu"):
            raise UserError(
                f"--slices is {slices}; it must be from 1 to {_MOST_SLICES}, and only TPUs come in more than 1"
            )
        if chip.platform == "tpu":
            sides = sides_of(kind, size)
            if sides is None:
                raise UserError(f"--platform is {shorten(text)}; slices of {kind} are {known_slices(kind)}")
            name = f"{kind}:{size}"
            return cls(name, chip, devices_of(kind, sides) * slices, name, slices)
        if re.fullmatch(r"[0-9]{1,5}", size) is None or not 1 <= int(size) <= _MOST_DEVICES:
            raise UserError(
                f"--platform is {shorten(text)}; after the colon must be a number of devices up to {_MOST_DEVICES:,}, "
                "as in h200:4"
            )
        return cls(f"{kind}:{int(size)}", chip, int(size))

    @property
    def processes(self) -> int:
        """Of a job on all devices: one for each host. A host has up to 8 GPUs; a CPU platform is one host."""
        if self.topology is not None:
            return len({device.process_index for device in self.stand_ins()})
        return -(-self.devices // _GPUS_OF_A_HOST) if self.chip.platform == "gpu" else 1

    def stand_ins(self) -> list[StandIn]:
        """Devices with the places of a TPU's in its network, to arrange a mesh of; none of other platforms."""
        if self.topology is None:
            return []
        kind, _, topology = self.topology.partition(":")
        sides = sides_of(kind, topology)
        assert sides is not None
        return stand_ins(kind, sides, self.slices)
