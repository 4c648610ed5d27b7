"""Accelerators that a job can be planned for, and what their makers say of them."""

from __future__ import annotations

import dataclasses
import math

from keye_jax.errors import UserError

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
      implementation: of the kernels that it runs by itself.
    """

    platform: str
    memory: float | None
    flops: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None
    source: str = ""
    description: str | None = None
    implementation: str = "xla"


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


_NVIDIA, _CLOUD, _TPU = "NVIDIA's data sheet", "Google Cloud's TPU documentation", "mosaic_tpu"

CHIPS = {
    "cpu": Chip("cpu", None),
    "h100": Chip(*("gpu", 80e9, 989e12, 3.35e12, 450e9, f"{_NVIDIA}, H100 SXM"), _hopper(80e9, 3.35e12), "mosaic_gpu"),
    "h200": Chip(*("gpu", 141e9, 989e12, 4.8e12, 450e9, f"{_NVIDIA}, H200 SXM"), _hopper(141e9, 4.8e12), "mosaic_gpu"),
    "b200": Chip("gpu", 180e9, 2.25e15, 8e12, 900e9, f"{_NVIDIA}, DGX B200"),
    "v5e": Chip("tpu", 16 * GIB, 197e12, 819e9, 200e9, f"{_CLOUD}, v5e", implementation=_TPU),
    "v5p": Chip("tpu", 95 * GIB, 459e12, 2765e9, 600e9, f"{_CLOUD}, v5p", implementation=_TPU),
    "v6e": Chip("tpu", 32 * GIB, 918e12, 1638e9, 400e9, f"{_CLOUD}, v6e", implementation=_TPU),
    # A chip of two cores, each a device with its half of the chip.
    "tpu7x": Chip(
        *("tpu", 96 * GIB, 2307e12 / 2, 7380e9 / 2, 600e9 / 2, f"{_CLOUD}, TPU7x, half a chip"), implementation=_TPU
    ),
}

_CORES = {"tpu7x": 2}


@dataclasses.dataclass(frozen=True)
class Platform:
    """Devices of one kind.

    Attributes:
      name: as it was given, "v5p:2x2x4" or "h200:4".
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
    def parse(cls, text: str, slices: int = 1) -> Platform:
        """Reads "KIND:COUNT", or of a TPU "KIND:TOPOLOGY", such as h200:4 or v5e:4x8.

        Raises:
          UserError: there is no such platform.
        """
        kind, _, size = text.partition(":")
        if kind not in CHIPS:
            raise UserError(
                f"--platform is {text!r}; it must be KIND:COUNT or KIND:TOPOLOGY, KIND of {', '.join(CHIPS)}"
            )
        chip, sides = CHIPS[kind], size.split("x")
        if not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise UserError(
                f"--platform is {text!r}; after the colon must be a number or sides, as in h200:4 or v5e:4x8"
            )
        if slices < 1 or (slices > 1 and chip.platform != "tpu"):
            raise UserError(f"--slices is {slices}; it must be at least 1, and only TPUs come in slices")
        count = math.prod(int(side) for side in sides)
        if chip.platform != "tpu":
            return cls(text, chip, count)
        dimensions = 2 if kind in ("v5e", "v6e") else 3
        if len(sides) != dimensions:
            example = {"v5e": "4x8", "v6e": "4x4"}.get(kind, "2x2x4")
            raise UserError(f"--platform is {text!r}; a slice of {kind} has {dimensions} sides, as in {kind}:{example}")
        return cls(text, chip, count * slices * _CORES.get(kind, 1), text, slices)
