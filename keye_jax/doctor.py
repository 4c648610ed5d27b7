"""What this machine can run, which implementations it takes, and what is missing: the first thing to ask for in a bug
report. Nothing here raises where something is missing or broken: that is a finding.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keye_jax
from keye_jax.errors import shorten_name

EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "video": ("reading videos", ()),
    "heic": ("HEIC pictures", ()),
    "hub": ("downloads from Hugging Face and ModelScope", ()),
    "serve": ("the HTTP server", ()),
    "train": ("training", ()),
    "ray": ("batches on Ray", ()),
    "cuda": ("NVIDIA GPUs, and plans that are compiled for them", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    "tpu": ("TPUs, and plans that are compiled for them", ("libtpu",)),
}
"""What the extras of the package are for, and the modules of which one shows that an extra is there.

Without modules, the distributions that the extra requires are looked for.
"""

RUNS_ON: Mapping[str, str] = {
    "mosaic_gpu": "an NVIDIA GPU of compute capability 9.0",
    "cudnn": "an NVIDIA GPU of compute capability 8.0 or more",
    "mosaic_tpu": "a TPU",
    "sparse_core": "a TPU v5p, v6e or 7x",
    "xla": "any device",
}
"""What an implementation needs, in words."""

_SHOWN_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "tokenizers", "pillow", "av")
_FEWEST_FILES = 1024


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong or missing.

    Attributes:
      what: in words.
      remedy: the command that mends it; None if there is none.
    """

    what: str
    remedy: str | None = None


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices of one kind.

    Attributes:
      count: how many this process sees.
      kind: as JAX calls it, "NVIDIA H200" or "cpu".
      platform: "cpu", "gpu" or "tpu".
      memory: bytes that JAX may use of one; of CPU devices each one's share of the machine's.
    """

    count: int
    kind: str
    platform: str
    memory: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      version, python, executable, system: of the package, of Python with its path, and of the operating system.
      packages: versions by distribution; None for one that is missing.
      devices: those of JAX, by kind.
      ptxas: version and path of the assembler for NVIDIA GPUs; None without one.
      operations: the implementation that each operation takes here.
      refused: why implementations cannot run here, by name.
      cache: the directory of compiled programs, and whether it can be written; None where nobody can say.
      media_bytes, free_bytes: memory that media workers share by default, and memory that is free.
      open_files: how many files a process may open, and how many it may ask for.
      problems: what keeps `generate` from running.
      warnings: what makes it slow, or may break it.
      missing: what is not installed, which some jobs need.
    """

    version: str
    python: str
    executable: str
    system: str
    packages: dict[str, str | None]
    devices: list[Devices]
    ptxas: str | None
    operations: dict[str, str]
    refused: dict[str, str]
    cache: tuple[str, bool | None]
    media_bytes: int
    free_bytes: int
    open_files: tuple[int, int]
    problems: list[Finding]
    warnings: list[Finding]
    missing: list[Finding]

    @property
    def runs(self) -> bool:
        """Whether this machine can run `keye-jax generate`."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"runs": self.runs}


def versions() -> list[str]:
    """Package, Python, JAX, devices and ptxas, one line each."""
    packages = {name: _version(name) or "not installed" for name in ("jax", "jaxlib")}
    lines = [f"keye-jax {keye_jax.__version__}", f"Python {platform.python_version()}"]
    lines += [f"{name} {version}" for name, version in packages.items()]
    found, problem = _devices()
    names = ", ".join(f"{each.count} x {each.kind}" for each in found)
    lines.append(f"devices: {names or f'none, {problem}'}")
    ptxas = find_ptxas()
    return [*lines, f"ptxas {ptxas}"] if ptxas else lines


def examine() -> Report:
    """Looks at everything. It starts JAX, and compiles one small program."""
    from keye_jax.engine.options import EngineOptions

    problems, warnings = [], []
    devices, problem = _devices()
    if problem:
        chosen = os.environ.get("JAX_PLATFORMS")
        where = f" with JAX_PLATFORMS={shorten_name(chosen)}" if chosen else ""
        problems.append(Finding(f"JAX finds no device{where}: {problem}", "unset JAX_PLATFORMS" if chosen else None))
    elif broken := _try_program():
        problems.append(Finding(f"a small program does not run on {devices[0].kind}: {broken}"))
    problems += _wrong_packages()
    warnings += _unused_hardware({each.platform for each in devices})
    operations, refused = _implementations(devices[0].kind) if devices else ({}, {})
    cache, writable = _cache()
    if writable is False:
        warnings.append(
            Finding(f"compiled programs cannot be kept in {cache}", "export JAX_COMPILATION_CACHE_DIR=/a/folder")
        )
    free, media = _free_bytes(), EngineOptions().media_bytes
    if free < media:
        warnings.append(Finding("less memory is free than media workers share, EngineOptions.media_bytes"))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files[0] != resource.RLIM_INFINITY and files[0] < _FEWEST_FILES:
        warnings.append(Finding(f"a process may open {files[0]} files only", f"ulimit -n {_FEWEST_FILES}"))
    return Report(
        version=keye_jax.__version__,
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name) for name in _SHOWN_PACKAGES},
        devices=devices,
        ptxas=find_ptxas(),
        operations=operations,
        refused=refused,
        cache=(cache, writable),
        media_bytes=media,
        free_bytes=free,
        open_files=files,
        problems=problems,
        warnings=warnings,
        missing=list(_missing()),
    )


def _devices() -> tuple[list[Devices], str | None]:
    """JAX's devices by kind, and why there are none."""
    try:
        import jax

        from keye_jax.runtime.device import memory_limit_bytes

        found = collections.Counter((device.device_kind, device.platform) for device in jax.local_devices())
        memory = memory_limit_bytes()
    except Exception as error:  # a library that does not load, a driver that is too old, a chip that others hold
        return [], _first_line(error)
    return [Devices(count, kind, name, memory) for (kind, name), count in found.items()], None


def _try_program() -> str | None:
    """Why a small program does not run; None if it does."""
    import jax
    import jax.numpy as jnp

    try:
        total = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8))))
    except Exception as error:  # whatever a driver or a compiler raises
        return _first_line(error)
    return None if total == 512 else f"8 x 8 ones times themselves sum to {total:g}, not 512"


def _implementations(kind: str) -> tuple[dict[str, str], dict[str, str]]:
    from pallas_kernels.dispatch import IMPLEMENTATIONS, OPERATIONS, available

    here = available()
    taken = {
        name: next(each for each in operation.implementations if each in here) for name, operation in OPERATIONS.items()
    }
    refused = {name: f"needs {RUNS_ON[name]}; this is {kind}" for name in IMPLEMENTATIONS if name not in here}
    return taken, refused


def _unused_hardware(platforms: set[str]) -> Iterator[Finding]:
    """Accelerators that the machine has and JAX does not use."""
    chosen = os.environ.get("JAX_PLATFORMS")
    for name, extra, files in (
        ("gpu", "cuda", ("/proc/driver/nvidia/version",)),
        ("tpu", "tpu", ("/dev/accel0", "/dev/accel/accel0")),
    ):
        if name not in platforms and any(Path(file).exists() for file in files):
            what = f"this machine has a {name.upper()}, which JAX does not use"
            if chosen:
                yield Finding(f"{what}: JAX_PLATFORMS is {shorten_name(chosen)}", "unset JAX_PLATFORMS")
            else:
                yield Finding(what, f"pip install 'keye-jax[{extra}]'")


def _cache() -> tuple[str, bool | None]:
    from keye_jax.runtime.compilation_cache import cache_directory

    try:
        directory = cache_directory()
    except RuntimeError as error:  # an unknown user has no home
        return f"no directory ({error})", False
    if "://" in directory:
        return directory, None
    path = Path(directory).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    return directory, nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _free_bytes() -> int:
    """Memory that is free, or can be freed: Linux counts its file cache to the latter."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(re.findall(r"MemAvailable: +(\d+) kB", text)[0]) * 1024
    except (OSError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def find_ptxas() -> str | None:
    """Version and path of the ptxas that XLA takes; None if there is none, or it does not run.

    XLA looks in NVIDIA's packages beside it first, then in CUDA's own folder and the path.
    """
    for file in _ptxas_files():
        try:
            done = subprocess.run([file, "--version"], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        if found := re.search(r"\bV(\d+(?:\.\d+)+)", done.stdout):
            return f"{found[1]}, {file}"
    return None


def _ptxas_files() -> Iterator[str]:
    package = find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package else []:
        yield from map(str, sorted(Path(folder).glob("*/bin/ptxas"), reverse=True))
    for variable in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"):
        if root := os.environ.get(variable):
            yield str(Path(root) / "bin" / "ptxas")
    yield "/usr/local/cuda/bin/ptxas"
    if found := shutil.which("ptxas"):
        yield found


@dataclasses.dataclass(frozen=True)
class _Requirement:
    """A line of the package's own metadata, such as "jax[cuda13]<0.13,>=0.11.2; extra == 'cuda'"."""

    name: str
    versions: str
    extra: str | None

    @property
    def is_met(self) -> bool:
        version = _version(self.name)
        return version is not None and _satisfies(version, self.versions)


def _requirements() -> list[_Requirement]:
    """What the installed package requires; nothing where only its files are there."""
    try:
        lines = importlib.metadata.requires("keye-jax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    pattern = re.compile(r"([\w.-]+)(?:\[[^\]]*\])?\s*([^;]*?)\s*(?:;.*extra == ['\"]([\w-]+)['\"].*)?$")
    return [_Requirement(*found.groups()) for line in lines if (found := pattern.match(line))]


def _wrong_packages() -> Iterator[Finding]:
    for each in _requirements():
        if each.extra is None and not each.is_met:
            have = _version(each.name)
            state = "is not installed" if have is None else f"is {have}; it must be {each.versions}"
            yield Finding(f"{each.name} {state}", f"pip install '{each.name}{each.versions}'")


def _missing() -> Iterator[Finding]:
    required: dict[str, list[_Requirement]] = {}
    for each in _requirements():
        required.setdefault(each.extra or "", []).append(each)
    for extra, (purpose, modules) in EXTRAS.items():
        if extra not in required:
            continue
        there = any(map(find_spec, modules)) if modules else all(each.is_met for each in required[extra])
        if not there:
            yield Finding(purpose, f"pip install 'keye-jax[{extra}]'")
    if find_ptxas() is None:
        yield Finding("ptxas, the assembler for NVIDIA GPUs", "pip install 'keye-jax[cuda]'")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _satisfies(version: str, ranges: str) -> bool:
    """Whether the release numbers of a version are within all of ">=1.2,<2"; other forms of ranges are not judged."""
    have = _release(version)
    for part in filter(None, ranges.split(",")):
        found = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", part)
        if found and (have >= _release(found[2])) != (found[1] == ">="):
            return False
    return True


def _release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])]


def _first_line(error: Exception, limit: int = 160) -> str:
    """The first line of another library's message, of at most `limit` characters."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
