"""The TPU compiler on a machine without a TPU, and its figures for a program.

libtpu reads its options from the environment once, when it is loaded. It may end its process when it meets something
that it does not support. So other processes load it: some compile programs as they would run, another simulates.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
from jax.experimental import topologies

from tests.tpu_compile.cases import all_cases

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest host of each generation; programs are compiled for its first device."""

CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
"""Our own arithmetic: the published peak over the products of one cycle (v6e and tpu7x: 2 x 2 x 256 x 256)."""

SIMULATION_SECONDS = 300
"""Longest processor time that one simulation may take. Other work on the machine does not count."""
HANGING_SECONDS = 3600
"""Longest time after which a simulation is taken for one that hangs."""

_reports: Path


def library() -> Path | None:
    """libtpu: that of TPU_LIBRARY_PATH, else the installed package, else the copy `make` put into the environment."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    package = importlib.util.find_spec("libtpu")
    candidates = [os.environ.get("TPU_LIBRARY_PATH"), package and package.origin and Path(package.origin).parent]
    candidates.append(Path(sys.prefix) / "libtpu" / "libtpu")
    paths = [Path(path) for path in candidates if path]
    return next((found for path in paths if (found := path if path.is_file() else path / "libtpu.so").is_file()), None)


@dataclasses.dataclass(frozen=True)
class Figures:
    """The compiler's figures for one program.

    Attributes:
      compile_seconds: processor time to compile.
      roofline_seconds: bound of the compiler's cost model, which takes a Pallas kernel's own `pl.CostEstimate`. None if
        the model has no bound.
      flops, nbytes: FLOPs and bytes that this bound counts.
      vmem: bytes of VMEM that the largest operation takes, spilled registers included.
      vmem_capacity: bytes of VMEM of one core.
      scratch: bytes of HBM beyond arguments and results.
      cores: cores that run the program together.
    """

    compile_seconds: float
    roofline_seconds: float | None
    flops: float
    nbytes: float
    vmem: int
    vmem_capacity: int
    scratch: int
    cores: int


@dataclasses.dataclass(frozen=True)
class Cycles:
    """The simulated cycles of a unit's Pallas kernels.

    Attributes:
      unit: cycles of the unit.
      repeated: those that are repeated.
      seconds: processor time of the simulation.
    """

    unit: int
    repeated: int
    seconds: float


class Compiler:
    """A process that compiles cases, or simulates them. A case is named by its number in `all_cases()`."""

    def __init__(self, path: Path, *, simulates: bool = False):
        self._path, self._simulates = path, simulates
        self._reports = tempfile.TemporaryDirectory()
        self._worker: concurrent.futures.ProcessPoolExecutor | None = None

    def figures(self, case: int, generation: str) -> Figures:
        """Compiles for one device.

        Raises:
          RuntimeError: the compiler refuses the program, also for lack of VMEM or HBM, or ends its process.
        """
        return self._call(_compile, case, generation)

    def kernel_cycles(self, case: int, generation: str) -> Cycles | None:
        """Simulates one unit of the case; None if the compiler gives no cycles."""
        unit = all_cases()[case].simulation
        try:
            cycles, seconds = self._call(_simulate, case, generation, False)
            if cycles is None:
                return None
            if unit is None or unit.less_work is None:
                return Cycles(cycles, cycles, seconds)
            less, more_seconds = self._call(_simulate, case, generation, True)
        except RuntimeError:
            return None
        return None if less is None else Cycles(cycles, cycles - less, seconds + more_seconds)

    def _call(self, function, *arguments):
        if self._worker is None:
            self._worker = concurrent.futures.ProcessPoolExecutor(
                1,
                multiprocessing.get_context("spawn"),
                _start,
                (self._path, Path(self._reports.name), self._simulates),
            )
        worker = self._worker
        process = worker.submit(os.getpid).result()
        try:
            return worker.submit(function, *arguments).result(HANGING_SECONDS if self._simulates else None)
        except (concurrent.futures.BrokenExecutor, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                os.kill(process, signal.SIGKILL)
            worker.shutdown(wait=False, cancel_futures=True)
            self._worker = None
            raise RuntimeError("the compiler ended or took too long") from error

    def close(self) -> None:
        if self._worker:
            self._worker.shutdown()
        self._reports.cleanup()


def _start(path: Path, reports: Path, simulates: bool) -> None:
    """Prepares a worker: the compiler's options and the folder of its reports."""
    global _reports
    _reports = reports
    options = {"xla_jf_dump_to": _reports, "xla_jf_dump_llo_pass_label_regex": "none"}
    if simulates:
        # Operands stay in HBM: some generations' models have no copies from VMEM.
        options = {"xla_jf_dump_static_llo_profile_to": _reports, "xla_msa_enable": "false"}
        # The compiler's messages about what it does not support would not help a user.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ |= {
        "TPU_LIBRARY_PATH": str(path),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(f"--{name}={value}" for name, value in options.items()),
    }
    jax.config.update("jax_platforms", "cpu")
    # A program from the cache has no reports.
    jax.config.update("jax_enable_compilation_cache", False)


def _compile_for(generation: str, function, arguments, donated=()) -> tuple[jax.stages.Compiled, int]:
    """The program, and the number of a device's cores that it runs on."""
    device = topologies.get_topology_desc(topology_name=TOPOLOGIES[generation], platform="tpu").devices[0]
    mesh = jax.sharding.Mesh([device], ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    for report in _reports.iterdir():
        report.unlink()
    # Pallas reads the target device from the mesh.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donated).lower(*placed).compile(), device.num_cores


def _compile(case: int, generation: str) -> Figures:
    wanted = all_cases()[case]
    start = time.process_time()
    try:
        program, cores = _compile_for(generation, wanted.function, wanted.arguments, wanted.donated)
    except Exception as error:  # Not every type of exception can be sent to another process.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    seconds = time.process_time() - start
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    used, capacity = _vmem()
    return Figures(
        compile_seconds=seconds,
        # Negative if the model has no bound for some operation.
        roofline_seconds=bound if (bound := cost.get("optimal_seconds", -1.0)) >= 0 else None,
        flops=cost.get("flops", 0.0),
        nbytes=cost.get("bytes accessed", 0.0),
        vmem=used,
        vmem_capacity=capacity,
        scratch=memory.temp_size_in_bytes if memory else 0,
        cores=cores,
    )


def _simulate(case: int, generation: str, less_work: bool) -> tuple[int | None, float]:
    """Cycles, if the compiler gives them, and processor seconds. A simulation that takes too long ends its process."""
    start = time.process_time()
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(start) + SIMULATION_SECONDS, most))
    unit = all_cases()[case].simulation
    if unit and less_work:
        unit = unit.less_work
    if unit is None:
        return None, 0.0
    # A unit may differ from another only in what replaces its operands, which a cached trace does not show.
    jax.clear_caches()
    program, _ = _compile_for(generation, unit.function, unit.arguments)
    kernels = set(re.findall(r'%?([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call"', program.as_text() or ""))
    found = []
    for report in _reports.glob("*_static_llo_profile.textproto"):
        for entry in report.read_text().split("hlo_op_estimate")[1:]:
            name, cycles = re.search(r'hlo_op_name: "([^"]*)"', entry), re.search(r"estimated_cycles: (\d+)", entry)
            if name and cycles and name[1] in kernels:
                found.append(int(cycles[1]))
    return sum(found) if found else None, time.process_time() - start


def _vmem() -> tuple[int, int]:
    """Bytes of VMEM that the largest operation takes, and bytes of a core, from the compiler's report."""
    used = capacity = 0
    for report in _reports.glob("*vmem_report.html"):
        text = report.read_text()
        data, _ = json.JSONDecoder().raw_decode(text, text.index("{", text.index("const DATA")))
        capacity = data["global_info"]["vmem_capacity"]
        # XLA moves data that it keeps in VMEM between operations out of the way of an operation's own.
        blocks = [block for operation in data["hlo_breakdowns"].values() for block in operation["blocks"]]
        used = max([used, *(block["block_size"] for block in blocks if block["block_type"] == "SCOPED")])
    return used, capacity
