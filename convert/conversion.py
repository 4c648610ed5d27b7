"""Converts safetensors to Orbax and back, one group of tensors at a time. A stopped conversion can be continued."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from convert import checks, detect
from convert.adapter import Adapter, read_adapter
from convert.checks import FoundTensor
from convert.orbax_io import MANIFEST, PARAMS, OrbaxSource, OrbaxWriter, write_manifest
from convert.reader import SafetensorsSource
from convert.staging import Staging, is_empty, remove_leftover, staging_directory
from convert.writer import PlannedTensor, ShardWriter
from keye_jax.errors import UserError
from keye_jax.progress import PhaseProgress

SHARD_BYTES = 5_000_000_000

# A tensor of _LARGE_BYTES or more is a group of its own. Smaller ones form groups of at most _GROUP_BYTES.
_LARGE_BYTES = 64 << 20
_GROUP_BYTES = 256 << 20

# Files that are copied with the weights: configurations, tokenizer, templates, licence.
_SIDE_SUFFIXES = {".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".jsonl"}
_SIDE_NAMES = ("LICENSE", "LICENCE", "NOTICE")
_SIDE_BYTES = 256 << 20

Source = SafetensorsSource | OrbaxSource


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
      destination: directory of the new checkpoint.
      kind: its kind.
      tensors: number of its arrays.
      nbytes: bytes of its arrays.
      continued: the part of `nbytes` that an earlier, stopped run wrote.
      seconds: duration of this run.
    """

    destination: Path
    kind: detect.Kind
    tensors: int
    nbytes: int
    continued: int
    seconds: float


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    check_finite: bool = False,
    overwrite: bool = False,
    shard_size: int = SHARD_BYTES,
    merge_lora: str | Path | None = None,
    progress: PhaseProgress | None = None,
) -> Conversion:
    """Converts the checkpoint in `src` into the other kind, bit by bit, and writes it into the directory `dst`.

    Memory: about twice the largest tensor, besides the interpreter. The new checkpoint is built in `dst.partial`, which
    becomes `dst` at the end. After a run was stopped, the same call continues it.

    Args:
      src: a directory with config.json and safetensors files, or with config.json and an Orbax checkpoint in `params/`.
      dst: a directory that does not exist or is empty.
      check_finite: read all tensors first, and refuse infinities and NaNs.
      overwrite: replace the checkpoint in `dst`, and start again if `dst.partial` belongs to another source.
      shard_size: maximum bytes of tensor data in one safetensors file; a larger tensor has a file of its own.
      merge_lora: a directory with a LoRA adapter in PEFT's layout, which is added to the weights that it is for.
      progress: called with the phase, "check" or "convert", the bytes done and the bytes of all tensors.

    Raises:
      UserError: `src`, `dst` or an argument is not valid. One message lists all problems of the checkpoint.
    """
    started = time.monotonic()
    source_directory, destination = Path(src), Path(dst).resolve()
    report = progress or (lambda phase, done, total: None)
    if shard_size <= 0:
        raise UserError(f"--shard-size is {shard_size}; it must be a positive number of bytes")
    source = detect.open_source(source_directory)
    try:
        config = detect.read_config(source_directory)
        _check_destination(source_directory.resolve(), destination, overwrite=overwrite)
        adapter = None if merge_lora is None else read_adapter(merge_lora, config)
        found, problems = checks.check(source, config)
        if check_finite:
            problems += _non_finite(source, found, report)
        checks.raise_problems(source_directory, problems)
        return _run(source, destination, found, adapter, overwrite, shard_size, report, started)
    finally:
        source.close()


def _run(
    source: Source,
    destination: Path,
    found: list[FoundTensor],
    adapter: Adapter | None,
    overwrite: bool,
    shard_size: int,
    report: PhaseProgress,
    started: float,
) -> Conversion:
    to_orbax = isinstance(source, SafetensorsSource)
    total = sum(item.nbytes for item in found)
    _check_space(destination, total)
    staging = Staging(destination, _fingerprint(source, found, shard_size, adapter), overwrite=overwrite)
    writer: _OrbaxSink | _SafetensorsSink | None = None
    try:
        writer = _OrbaxSink(staging) if to_orbax else _SafetensorsSink(staging, found, shard_size)
        continued = done = sum(item.nbytes for item in found if item.tensor.checkpoint_name in staging.done)
        report("convert", done, total)
        for group in _groups(found):
            names = [item.tensor.checkpoint_name for item in group]
            if staging.done.issuperset(names):
                continue
            writer.write(group, _merged(_read_or_discard(source, group, staging), group, adapter))
            staging.record(names, writer.saved())
            done += sum(item.nbytes for item in group)
            report("convert", done, total)
        writer.finish()
        for file in side_files(source.directory):
            shutil.copyfile(file, staging.result / file.name)
        if to_orbax:
            write_manifest(staging.result)
        staging.commit()
    except OSError as error:
        message = f"{error}; {staging.path} keeps the tensors written so far, and the same command continues"
        raise UserError(message) from error
    finally:
        if writer is not None:
            writer.close()
        staging.close()
    kind: detect.Kind = "orbax" if to_orbax else "safetensors"
    return Conversion(destination, kind, len(found), total, continued, time.monotonic() - started)


class _OrbaxSink:
    """Writes groups as Orbax arrays."""

    def __init__(self, staging: Staging) -> None:
        self._writer = OrbaxWriter(staging.result, staging.saved_groups)
        if not self._writer.intact:
            staging.restart()
            self._writer = OrbaxWriter(staging.result)

    def write(self, group: list[FoundTensor], arrays: dict[tuple[str, ...], np.ndarray]) -> None:
        self._writer.save(arrays)

    def saved(self) -> list[str]:
        return self._writer.saved()

    def finish(self) -> None:
        self._writer.finish()

    def close(self) -> None:
        """Does nothing: no file stays open between groups."""


class _SafetensorsSink:
    """Writes groups as tensors of safetensors shards."""

    def __init__(self, staging: Staging, found: list[FoundTensor], shard_size: int) -> None:
        tensors = [(item.tensor.checkpoint_name, item.tensor.checkpoint_shape, item.dtype) for item in found]
        self._writer = ShardWriter(staging.result, [PlannedTensor(*tensor) for tensor in tensors], shard_size)

    def write(self, group: list[FoundTensor], arrays: dict[tuple[str, ...], np.ndarray]) -> None:
        for item in group:
            self._writer.write(item.tensor.checkpoint_name, arrays[item.tensor.path])

    def saved(self) -> list[str]:
        self._writer.flush()
        return []

    def finish(self) -> None:
        self._writer.finish()

    def close(self) -> None:
        self._writer.close()


def _groups(found: list[FoundTensor]) -> Iterator[list[FoundTensor]]:
    """Splits tensors into groups: first each large tensor alone, then the small ones together.

    Each of Orbax's partial saves reads the names of all arrays saved before. Therefore the groups of one tensor, which
    are many, come first.
    """
    yield from ([item] for item in found if item.nbytes >= _LARGE_BYTES)
    group: list[FoundTensor] = []
    for item in (item for item in found if item.nbytes < _LARGE_BYTES):
        if group and sum(other.nbytes for other in group) + item.nbytes > _GROUP_BYTES:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _read(source: Source, group: list[FoundTensor]) -> dict[tuple[str, ...], np.ndarray]:
    if isinstance(source, SafetensorsSource):
        return {item.tensor.path: source.read_tensor(item.tensor) for item in group}
    return source.read([item.tensor.path for item in group])


def _merged(
    arrays: dict[tuple[str, ...], np.ndarray], group: list[FoundTensor], adapter: Adapter | None
) -> dict[tuple[str, ...], np.ndarray]:
    """Arrays with an adapter's pairs added to those that have one."""
    if adapter is None:
        return arrays
    return {item.tensor.path: adapter.merge(item.tensor, arrays[item.tensor.path]) for item in group}


def _read_or_discard(source: Source, group: list[FoundTensor], staging: Staging) -> dict[tuple[str, ...], np.ndarray]:
    try:
        return _read(source, group)
    except UserError:
        # The source is bad: continuing would fail again.
        staging.discard()
        raise


def _non_finite(source: Source, found: list[FoundTensor], report: PhaseProgress) -> list[str]:
    """One sentence for each tensor with infinities or NaNs."""
    problems: list[str] = []
    done, total = 0, sum(item.nbytes for item in found)
    for group in _groups(found):
        arrays = _read(source, group)
        for item in group:
            values = arrays.pop(item.tensor.path)
            if count := checks.count_non_finite(values):
                name = item.tensor.checkpoint_name
                problems.append(f"{name}: {count:,} of {values.size:,} values are infinite or not a number")
            # Freed before the next group is read.
            del values
            done += item.nbytes
        report("check", done, total)
    return problems


def _check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    if destination == source or destination in source.parents:
        raise UserError(f"DST {destination} holds SRC; it must be another directory")
    if destination.exists() and not destination.is_dir():
        raise UserError(f"DST {destination} is a file; it must be a directory, or not exist")
    if is_empty(destination):
        return
    remove_leftover(destination)
    if not overwrite:
        raise UserError(f"DST {destination} exists and is not empty; choose another, or replace it with --overwrite")
    try:
        detect.kind_of(destination)
    except UserError as error:
        raise UserError(f"DST {destination} is not a checkpoint, so --overwrite does not replace it") from error


def _check_space(destination: Path, total: int) -> None:
    """Refuses a conversion without enough free space. The bytes that an earlier run wrote count as free."""
    parent = next(path for path in destination.parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    partial = staging_directory(destination)
    if partial.is_dir():
        # Blocks, since a shard has its full length from the start. A file with several links counts once.
        blocks = {(s.st_dev, s.st_ino): s.st_blocks for s in (path.lstat() for path in partial.rglob("*"))}
        free += 512 * sum(blocks.values())
    if free < total:
        raise UserError(f"DST {destination} needs {total:,} bytes and its filesystem has {free:,} bytes free")


def _fingerprint(source: Source, found: list[FoundTensor], shard_size: int, adapter: Adapter | None) -> str:
    """A digest of the files and tensors of the source, and of the options that change the output."""

    def stamp(file: Path, directory: Path) -> tuple[str, int, int]:
        return str(file.relative_to(directory)), file.stat().st_size, file.stat().st_mtime_ns

    files = [source.directory / "config.json", *source.files]
    state = {
        "files": [stamp(file, source.directory) for file in files],
        "config": (source.directory / "config.json").read_text(encoding="utf-8"),
        "tensors": [(item.tensor.checkpoint_name, item.tensor.checkpoint_shape, str(item.dtype)) for item in found],
        "shard_size": None if isinstance(source, SafetensorsSource) else shard_size,
        "groups": (_LARGE_BYTES, _GROUP_BYTES),
    }
    if adapter is not None:
        state["adapter"] = [stamp(file, file.parent) for file in adapter.files]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def side_files(directory: Path) -> Iterable[Path]:
    """The files of a checkpoint, other than weights, that are copied into the new one."""
    for file in sorted(directory.iterdir()):
        wanted = file.suffix in _SIDE_SUFFIXES or file.name.startswith(_SIDE_NAMES)
        weights = file.name.endswith(".index.json") or file.name in (MANIFEST, PARAMS)
        if wanted and not weights and file.is_file() and file.stat().st_size <= _SIDE_BYTES:
            yield file
