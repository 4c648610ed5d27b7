"""The TPU compiler, on a machine without a TPU, and what it says about a program.

libtpu reads its options from the environment once, when it is loaded: this module is for a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
from jax.experimental import topologies

from tests.tpu_compile.cases import Case

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest host of each generation; programs are compiled for its first device."""

CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}


def library() -> Path | None:
    """libtpu: where TPU_LIBRARY_PATH says, the installed package, or what `make` put beside the virtual environment."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    package = importlib.util.find_spec("libtpu")
    candidates = [os.environ.get("TPU_LIBRARY_PATH"), package and package.origin and Path(package.origin).parent]
    candidates.append(Path(sys.prefix) / "libtpu" / "libtpu")
    paths = [Path(path) for path in candidates if path]
    return next((found for path in paths if (found := path if path.is_file() else path / "libtpu.so").is_file()), None)


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the compiler says.

    Attributes:
      compile_seconds: how long it took.
      cycles: its static simulation of the program's TPU kernels and other operations, each counted once; None where it
        gives none.
      roofline_seconds: its cost model's bound; for a Pallas kernel from the kernel's own `pl.CostEstimate`.
      flops, nbytes: what that bound counts.
      vmem, vmem_capacity: bytes of the largest operation, spilled registers included, and of a core.
      scratch: bytes of HBM beyond arguments and results.
    """

    compile_seconds: float
    cycles: int | None
    roofline_seconds: float
    flops: float
    nbytes: float
    vmem: int
    vmem_capacity: int
    scratch: int


class Compiler:
    """Compiles for named generations; there may be one in a process, before any other use of libtpu."""

    def __init__(self, path: Path):
        self._reports = tempfile.TemporaryDirectory()
        reports = Path(self._reports.name)
        options = {
            "xla_jf_dump_to": reports,
            "xla_jf_dump_llo_pass_label_regex": "none",
            "xla_jf_dump_static_llo_profile_to": reports,
        }
        os.environ |= {
            "TPU_LIBRARY_PATH": str(path),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": " ".join(f"--{name}={value}" for name, value in options.items()),
        }
        jax.config.update("jax_platforms", "cpu")
        # A program from the cache comes without reports.
        jax.config.update("jax_enable_compilation_cache", False)

    def compile(self, case: Case, generation: str) -> Figures:
        """Compiles for one device.

        Raises:
          jax.errors.JaxRuntimeError: the compiler refuses, also for want of VMEM or HBM.
        """
        device = topologies.get_topology_desc(topology_name=TOPOLOGIES[generation], platform="tpu").devices[0]
        mesh = jax.sharding.Mesh([device], ("device",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), case.arguments
        )
        reports = Path(self._reports.name)
        for path in reports.iterdir():
            path.unlink()
        start = time.perf_counter()
        # Pallas asks the mesh what it lowers for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(case.function).lower(*placed).compile()
        seconds = time.perf_counter() - start
        cost, memory = program.cost_analysis() or {}, program.memory_analysis()
        used, capacity = _vmem(reports)
        return Figures(
            compile_seconds=seconds,
            cycles=_cycles(reports),
            roofline_seconds=cost.get("optimal_seconds", 0.0),
            flops=cost.get("flops", 0.0),
            nbytes=cost.get("bytes accessed", 0.0),
            vmem=used,
            vmem_capacity=capacity,
            scratch=memory.temp_size_in_bytes if memory else 0,
        )


def _cycles(reports: Path) -> int | None:
    """Sum over the operations in the compiler's static profiles."""
    found = []
    for path in reports.glob("*_static_llo_profile.textproto"):
        for entry in path.read_text().split("hlo_op_estimate")[1:]:
            cycles = re.search(r"estimated_cycles: (\d+)", entry)
            found += [int(cycles[1])] if cycles else []
    return sum(found) if found else None


def _vmem(reports: Path) -> tuple[int, int]:
    """The largest operation's VMEM, and how much there is, of the compiler's report."""
    used = capacity = 0
    for path in reports.glob("*vmem_report.html"):
        text = path.read_text()
        data, _ = json.JSONDecoder().raw_decode(text, text.index("{", text.index("const DATA")))
        capacity = data["global_info"]["vmem_capacity"]
        # What XLA keeps in VMEM from one operation to another gives way to what an operation needs.
        blocks = [block for operation in data["hlo_breakdowns"].values() for block in operation["blocks"]]
        used = max([used, *(block["block_size"] for block in blocks if block["block_type"] == "SCOPED")])
    return used, capacity
