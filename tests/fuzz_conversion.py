"""Conversions under random faults: each ends as a whole checkpoint, as a refusal, or is continued to a whole one.

    python -m tests.fuzz_conversion --faults 200 --seed 0

A fault is one of these, in either direction:

  kill   the process is killed at a random time
  full   the disk has no more room from a random byte on
  error  a write to a file fails that has a random length, as over a quota
  flip   a bit of the finished checkpoint changes

Each conversion runs in a process of its own. After a fault it is run once more without one; before that, a bit of what
it left may change too. What it made must be equal to the source, bit for bit. A flipped bit of a checkpoint must be
found, and be said in one sentence that names the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert import checks, conversion, detect, sinks, staging, synthetic
from convert.reader import SafetensorsSource
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from tests.convert import mounts
from tests.convert.convert_helpers import small_config

FAULTS = ("kill", "full", "error", "flip")
# Conversions take many steps, although the checkpoint is small.
_GROUP_BYTES = 1_000_000
_DISK = "size=256m,nr_inodes=20000"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: with what its work returned, with a refusal, or killed."""

    value: Any = None
    refusal: str | None = None
    killed: bool = False


class Broken(AssertionError):
    """A fault led to something else than a whole checkpoint, a refusal or a continuation."""


class Fuzz:
    """Conversions of one checkpoint, and of its conversion, below `directory`.

    Attributes:
      mounted: whether `directory / "disk"` is a disk of its own, which can be made full.
    """

    def __init__(self, directory: Path, *, mounted: bool) -> None:
        self.mounted = mounted
        self._disk = directory / "disk"
        self._sources = {"orbax": directory / "source", "safetensors": directory / "orbax"}
        if mounted:
            mounts.mount(self._disk, _DISK)
        else:
            self._disk.mkdir(parents=True)
        synthetic.write_checkpoint(self._sources["orbax"], small_config(1), shard_size=3_000_000)
        began = time.monotonic()
        _checked(apart(lambda: conversion.convert(self._sources["orbax"], self._sources["safetensors"])))
        self._seconds = time.monotonic() - began
        self._arrays = _checked(apart(lambda: _arrays(self._sources["orbax"])))

    def run(self, chance: random.Random) -> str:
        """One random fault. Returns what it was and how it ended.

        Raises:
          Broken: the end is none of those that are allowed.
        """
        for path in self._disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        kind, fault = chance.choice(tuple(self._sources)), chance.choice(FAULTS)
        made = self._disk / "made"
        convert = lambda: conversion.convert(self._sources[kind], made)  # noqa: E731
        if fault == "flip":
            _checked(apart(convert))
            return f"{fault}: {self._find_flip(made, chance)}"
        ended = self._with_fault(fault, convert, chance)
        whole = made.exists()
        if whole:
            self._compare(made)
        elif ended.refusal is not None:
            if "\n" in ended.refusal or "same command continues" not in ended.refusal:
                raise Broken(f"{fault}: it was refused with {ended.refusal!r}")
        elif not ended.killed:
            raise Broken(f"{fault}: the process ended well, and {made} is not there")
        if whole and not staging.staging_directory(made).exists():
            return f"{fault}: whole"
        partial, damaged = staging.staging_directory(made), None
        left = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.stat().st_size]
        if left and not whole and chance.random() < 0.5:
            damaged = self._flip(chance.choice(left), chance)
            fault += ", flip"
            if damaged.name == staging.JOURNAL:
                again = apart(lambda: conversion.convert(self._sources[kind], made))
                if again.refusal is None or "damaged; move it or remove it" not in again.refusal:
                    raise Broken(f"{fault}: {damaged} was believed: {again.refusal}")
                shutil.rmtree(partial)
        again = apart(lambda: conversion.convert(self._sources[kind], made, overwrite=whole))
        if again.refusal is not None or again.killed:
            raise Broken(f"{fault}: it did not continue: {again.refusal}")
        self._compare(made)
        if [path.name for path in self._disk.iterdir()] != ["made"]:
            raise Broken(f"{fault}: something is left beside the checkpoint")
        kept = "continued" if again.value.continued else "begun again"
        return f"{fault}: {'killed' if ended.killed else 'refused'}, then {kept}"

    def _with_fault(self, fault: str, convert: Callable[[], Any], chance: random.Random) -> Ended:
        if fault == "kill":
            return apart(convert, kill_after=chance.uniform(0, self._seconds))
        most = sum(array.nbytes for _, array in self._arrays.values())
        if fault == "error" or not self.mounted:
            limit = int(2 ** chance.uniform(6, np.log2(most)))
            return apart(convert, file_size=limit)
        # The check before the work has passed when the room shrinks.
        filler = self._disk / "filler"
        room = chance.randrange(1 << 12, 2 * most)

        def filled() -> Any:
            state = os.statvfs(self._disk)
            with filler.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, state.f_bavail * state.f_frsize - room)
            # The room is counted as it was.
            conversion.storage.check_space = lambda *_, **__: None
            return convert()

        ended = apart(filled)
        filler.unlink(missing_ok=True)
        return ended

    def _flip(self, file: Path, chance: random.Random) -> Path:
        place, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        with file.open("r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ 1 << bit]))
        return file

    def _find_flip(self, made: Path, chance: random.Random) -> str:
        files = [path for path in sorted(made.rglob("*")) if path.is_file() and path.stat().st_size]
        # Large and small files alike.
        name = self._flip(chance.choice(files), chance).relative_to(made).as_posix()
        back = self._disk / "back"
        ended = apart(lambda: conversion.convert(made, back))
        if ended.refusal is None or name not in ended.refusal or "\n" in ended.refusal or back.exists():
            raise Broken(f"flip: a bit of {name}: {ended.refusal!r}")
        return "found"

    def _compare(self, made: Path) -> None:
        found = _checked(apart(lambda: _arrays(made)))
        if found.keys() != self._arrays.keys():
            raise Broken(f"{made} has other arrays than its source")
        for path, (dtype, array) in self._arrays.items():
            if (found[path][0], found[path][1].tobytes()) != (dtype, array.tobytes()):
                raise Broken(f"{made}: {'.'.join(path)} is not that of its source")


def apart(work: Callable[[], Any], *, kill_after: float | None = None, file_size: int | None = None) -> Ended:
    """Runs `work` in a fork of this process, which has done the imports.

    Args:
      kill_after: seconds after which it is killed.
      file_size: bytes beyond which no file of it can grow.
    """
    with tempfile.TemporaryFile() as result:
        if (child := os.fork()) == 0:
            try:
                if file_size is not None:
                    # The answer of this process may be longer, so the limit ends before it is written.
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
                try:
                    ended = Ended(work())
                except UserError as error:
                    ended = Ended(refusal=str(error))
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                pickle.dump(ended, result)
                result.flush()
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGKILL:
            return Ended(killed=True)
        if code:
            raise Broken(f"the process ended with {code}, which is no refusal")
        result.seek(0)
        return pickle.load(result)


def _checked(ended: Ended) -> Any:
    if ended.refusal is not None or ended.killed:
        raise Broken(f"without a fault it was refused: {ended.refusal}")
    return ended.value


def _arrays(directory: Path) -> dict[tuple[str, ...], tuple[str, np.ndarray]]:
    """Dtype and bytes of all arrays of a checkpoint, by path; its checksums are verified."""
    checks.raise_problems(directory, checks.damage(directory))
    source = detect.open_source(directory)
    found, problems = checks.check(source, KeyeConfig.from_file(directory))
    checks.raise_problems(directory, problems)
    if isinstance(source, SafetensorsSource):
        arrays = {item.tensor.path: source.read_tensor(item.tensor) for item in found}
    else:
        arrays = source.read([item.tensor.path for item in found])
    source.close()
    return {path: (str(array.dtype), array.view(np.uint8)) for path, array in arrays.items()}


def fuzz(directory: Path, faults: int, seed: int, *, mounted: bool) -> Counter[str]:
    """Counts the ends of `faults` random faults. Raises Broken at the first that is not allowed."""
    sinks.LARGE_BYTES = sinks.GROUP_BYTES = _GROUP_BYTES
    tried, ends = Fuzz(directory, mounted=mounted), Counter[str]()
    for number in range(faults):
        try:
            ends[tried.run(random.Random(f"{seed} {number}"))] += 1
        except Broken as error:
            raise Broken(f"fault {number} of seed {seed}: {error}") from error
    return ends


def main(arguments: list[str]) -> int:
    """Runs `python -m tests.fuzz_conversion`."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz_conversion", description="Conversions under random faults."
    )
    parser.add_argument("--faults", type=int, default=200, help="How many. Default: 200.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random faults. Default: 0.")
    given = parser.parse_args(arguments)
    mounted = mounts.allowed()
    if mounted:
        mounts.separate()
    else:
        print("a full disk is left to the limit on files: this process may not mount")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        for end, count in sorted(fuzz(Path(directory), given.faults, given.seed, mounted=mounted).items()):
            print(f"{count:5,}  {end}")
        if mounted:
            mounts.unmount(Path(directory) / "disk")
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main(sys.argv[1:]))
