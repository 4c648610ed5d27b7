"""Converts safetensors to Orbax and back, one group of tensors at a time. A stopped conversion can be continued."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from convert import buckets, checks, detect, sinks, storage
from convert.adapter import Adapter, read_adapter
from convert.bucket_sink import BucketOrbaxSink, BucketSafetensorsSink, BucketStaging, existing
from convert.buckets import MARKER, Bucket
from convert.checks import FoundTensor
from convert.journal import Written
from convert.manifest import MANIFEST
from convert.orbax_io import PARAMS, OrbaxSource
from convert.orbax_layout import ArrayPath
from convert.reader import SafetensorsSource
from convert.sinks import OrbaxSink, SafetensorsSink, Sink, grouped
from convert.staging import Staging, is_empty, remove_leftover, staging_directory
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.parsing import read_json
from keye_jax.progress import PhaseProgress
from keye_jax.quantization import layouts

SHARD_BYTES = 5_000_000_000

# Files that are copied with the weights: configurations, tokenizer, templates, licence.
_SIDE_SUFFIXES = {".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".jsonl"}
_SIDE_NAMES = ("LICENSE", "LICENCE", "NOTICE")
_SIDE_BYTES = 256 << 20

Source = SafetensorsSource | OrbaxSource


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
      destination: directory or URL of the new checkpoint.
      kind: its kind.
      tensors: number of its arrays.
      nbytes: bytes of its arrays.
      continued: the part of `nbytes` that an earlier, stopped run wrote.
      seconds: duration of this run.
      dequantized: names of weights that had fewer bits in SRC and have not in DST.
    """

    destination: str
    kind: detect.Kind
    tensors: int
    nbytes: int
    continued: int
    seconds: float
    dequantized: tuple[str, ...] = ()


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

    Weights of fewer bits stay as they are, in the layouts of `keye_jax.quantization.layouts.write`. Where a model
    cannot hold them so, they become numbers of its dtype.

    Memory: about twice the largest tensor, besides the interpreter. The new checkpoint is built in `dst.partial`, which
    becomes `dst` at the end. After a run was stopped, the same call continues it. In a bucket nothing is renamed:
    objects are written where they belong, and the checkpoint is whole when its journal is gone.

    Args:
      src: a directory with config.json and safetensors files, or with config.json and an Orbax checkpoint in `params/`;
        or the URL of one in a bucket, `gs://` or `s3://`.
      dst: a directory that does not exist or is empty, or such a URL.
      check_finite: read all tensors first, and refuse infinities and NaNs.
      overwrite: replace the checkpoint in `dst`, and start again if `dst.partial` belongs to another source.
      shard_size: maximum bytes of tensor data in one safetensors file; a larger tensor has a file of its own.
      merge_lora: a directory with a LoRA adapter in PEFT's layout, which is added to the weights that it is for.
      progress: called with the phase, "verify", "check" or "convert", the bytes done and the bytes of all tensors.

    Raises:
      UserError: `src`, `dst` or an argument is not valid. One message lists all problems of the checkpoint.
    """
    started = time.monotonic()
    report = progress or (lambda phase, done, total: None)
    if shard_size <= 0:
        raise UserError(f"--shard-size is {shard_size}; it must be a positive number of bytes")
    destination = check_destination(dst, overwrite=overwrite, source=src)
    source_directory = buckets.local(src)
    detect.kind_of(source_directory)
    checks.raise_problems(source_directory, checks.damage(source_directory, report))
    source = detect.open_source(source_directory)
    try:
        config = detect.read_config(source_directory)
        if merge_lora is not None and config.quantization_config is not None:
            raise UserError(f"--merge-lora cannot go with {src}, whose weights have fewer bits; merge before that")
        adapter = None if merge_lora is None else read_adapter(merge_lora, config)
        found, problems = checks.check(source, config)
        if check_finite:
            problems += _non_finite(source, found, report)
        checks.raise_problems(source_directory, problems)
        done = _run(source, destination, config, found, adapter, overwrite, shard_size, report, started)
        dequantized = source.dequantized if isinstance(source, SafetensorsSource) else []
        return dataclasses.replace(done, dequantized=tuple(dequantized))
    except OSError as error:
        raise UserError(storage.reason(error) or str(error)) from error
    finally:
        source.close()


def _run(
    source: Source,
    destination: Path | Bucket,
    config: KeyeConfig,
    found: list[FoundTensor],
    adapter: Adapter | None,
    overwrite: bool,
    shard_size: int,
    report: PhaseProgress,
    started: float,
) -> Conversion:
    orbax = isinstance(source, SafetensorsSource)
    kind: detect.Kind = "orbax" if orbax else "safetensors"
    total = sum(item.nbytes for item in found)
    fingerprint = fingerprint_of(source, found, shard_size, adapter)
    if isinstance(destination, Path):
        check_space(destination, total)

    def sink_in(staging: Staging | BucketStaging) -> Sink:
        if isinstance(staging, BucketStaging):
            return BucketOrbaxSink(staging) if orbax else BucketSafetensorsSink(staging, found, shard_size)
        return OrbaxSink(staging, report) if orbax else SafetensorsSink(staging, found, shard_size, report)

    with opened(destination, fingerprint, sink_in, overwrite=overwrite) as (staging, sink):
        continued = sum(item.nbytes for item in found if item.tensor.checkpoint_name in staging.done)
        report("convert", continued, total)
        write_groups(
            sink.groups(found),
            lambda group: _merged(_read(source, group), group, adapter),
            sink,
            staging,
            lambda recorded: report("convert", continued + recorded, total),
        )
        with tempfile.TemporaryDirectory() as folder:
            sink.finish(side_files_of(source.directory, config, Path(folder)))
        staging.commit()
    shown = destination.url if isinstance(destination, Bucket) else str(destination)
    return Conversion(shown, kind, len(found), total, continued, time.monotonic() - started)


@contextlib.contextmanager
def opened(
    destination: Path | Bucket,
    fingerprint: str,
    sink_in: Callable[[Staging | BucketStaging], Sink],
    *,
    overwrite: bool,
) -> Iterator[tuple[Staging | BucketStaging, Sink]]:
    """Where a checkpoint is built until it is committed, and the sink of its groups; both are closed in the end.

    Args:
      fingerprint: of the source and the arguments; an unfinished checkpoint of the same one is continued.
      sink_in: makes the sink.
      overwrite: as for `convert`.

    Raises:
      UserError: a disk, a network or a service fails in it.
    """
    staging: Staging | BucketStaging | None = None
    sink: Sink | None = None
    try:
        if isinstance(destination, Bucket):
            staging = BucketStaging(destination, fingerprint, overwrite=overwrite)
        else:
            staging = Staging(destination, fingerprint, overwrite=overwrite)
        sink = sink_in(staging)
        yield staging, sink
    except UserError:
        raise
    except Exception as error:
        # Orbax and tensorstore put what the system says into exceptions of their own.
        if (why := storage.reason(error)) is None:
            raise
        keeps = f"{staging.path if staging else destination} keeps the tensors written so far"
        raise UserError(f"{why}; {keeps}, and the same command continues") from error
    finally:
        if sink is not None:
            sink.close()
        if staging is not None:
            staging.close()


def write_groups(
    groups: Iterable[list[FoundTensor]],
    make: Callable[[list[FoundTensor]], dict[ArrayPath, np.ndarray]],
    sink: Sink,
    staging: Staging | BucketStaging,
    report: Callable[[int], None],
) -> None:
    """Writes the groups that no earlier run wrote, and puts them into the journal.

    Args:
      make: gives the arrays of a group by path.
      report: called with the bytes of the groups that this run put into the journal.
    """
    unrecorded: list[tuple[list[FoundTensor], list[Written]]] = []
    done = 0

    def record(most: int) -> None:
        """Has the journal take the oldest groups until at most `most` are left."""
        nonlocal done
        while len(unrecorded) > most:
            group, written = unrecorded.pop(0)
            staging.record([item.tensor.checkpoint_name for item in group], written)
            done += sum(item.nbytes for item in group)
            report(done)

    for group in groups:
        if staging.done.issuperset(item.tensor.checkpoint_name for item in group):
            continue
        try:
            arrays = make(group)
        except UserError as error:
            # A source that is bad will be bad again; a disk or a network may be better later.
            if storage.reason(error) is None:
                staging.discard()
            raise
        sink.write(group, arrays)
        unrecorded.append((group, written := sink.saved()))
        # The bytes of a group are hashed while the next one is written.
        record(1 if written else 0)
    record(0)


def _read(source: Source, group: list[FoundTensor]) -> dict[tuple[str, ...], np.ndarray]:
    if isinstance(source, SafetensorsSource):
        arrays = source.read_tensors(item.tensor for item in group)
        return {item.tensor.path: array for item, array in zip(group, arrays, strict=True)}
    return source.read([item.tensor.path for item in group])


def _merged(
    arrays: dict[tuple[str, ...], np.ndarray], group: list[FoundTensor], adapter: Adapter | None
) -> dict[tuple[str, ...], np.ndarray]:
    """Arrays with an adapter's pairs added to those that have one."""
    if adapter is None:
        return arrays
    return {item.tensor.path: adapter.merge(item.tensor, arrays[item.tensor.path]) for item in group}


def _non_finite(source: Source, found: list[FoundTensor], report: PhaseProgress) -> list[str]:
    """One sentence for each tensor with infinities or NaNs."""
    problems: list[str] = []
    done, total = 0, sum(item.nbytes for item in found)
    for group in grouped(found):
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


def check_destination(dst: str | Path, *, overwrite: bool, source: str | Path | None = None) -> Path | Bucket:
    """The destination of a conversion, which can be made as far as that can be told before the work.

    Raises:
      UserError: it exists, it holds `source` or lies in it, or the file system will refuse it.
    """
    if (url := buckets.parse(dst)) is not None:
        other = None if source is None else buckets.parse(source)
        if other is not None and (f"{url}/".startswith(f"{other}/") or f"{other}/".startswith(f"{url}/")):
            raise UserError(f"DST {url} and SRC {other} overlap; they must be two places")
        try:
            existing(bucket := Bucket(url), overwrite=overwrite)
        except OSError as error:
            raise UserError(f"DST {storage.reason(error) or error}") from error
        return bucket
    destination = storage.resolve("DST", dst)
    if source is not None and buckets.parse(source) is None:
        directory = storage.resolve("SRC", source)
        if destination == directory or destination in directory.parents or _same(destination, directory):
            raise UserError(f"DST {destination} holds SRC; it must be another directory")
        if directory.is_dir() and directory in destination.parents:
            raise UserError(f"DST {destination} lies in SRC; it must be another directory")
    if destination.exists() and not destination.is_dir():
        raise UserError(f"DST {destination} is a file; it must be a directory, or not exist")
    if os.path.ismount(destination):
        raise UserError(f"DST {destination} is a mount point, which cannot be replaced; choose a directory in it")
    if not is_empty(destination):
        remove_leftover(destination)
        if not overwrite:
            raise UserError(
                f"DST {destination} exists and is not empty; choose another, or replace it with --overwrite"
            )
        try:
            detect.kind_of(destination)
        except UserError as error:
            raise UserError(f"DST {destination} is not a checkpoint, so --overwrite does not replace it") from error
    partial = staging_directory(destination)
    storage.resolve("DST.partial", partial)
    if partial.is_symlink() or os.path.ismount(partial):
        raise UserError(f"{partial} is in the way: it must be a directory of the same file system as DST")
    storage.check_writable("DST", partial if not partial.exists() else partial / "new")
    return destination


def _same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def check_space(destination: Path, total: int) -> None:
    """Refuses a conversion without enough free space. The bytes that an earlier run wrote count as free."""
    partial, reclaimed = staging_directory(destination), 0
    if partial.is_dir():
        # Blocks, since a shard has its full length from the start. A file with several links counts once.
        blocks = {(s.st_dev, s.st_ino): s.st_blocks for s in (path.lstat() for path in partial.rglob("*"))}
        reclaimed = 512 * sum(blocks.values())
    storage.check_space("DST", destination, total, reclaimed=reclaimed)


def fingerprint_of(source: Source, found: list[FoundTensor], shard_size: int, adapter: Adapter | None) -> str:
    """A digest of the files and tensors of the source, and of the options that change the output."""

    def stamp(file: Path, directory: Path) -> tuple[str, int, int]:
        return str(file.relative_to(directory)), file.stat().st_size, file.stat().st_mtime_ns

    files = [source.directory / "config.json", *source.files]
    bucket = source.directory / MARKER
    state = {
        # The stamps of a bucket's objects are in the marker.
        "files": bucket.read_text(encoding="utf-8")
        if bucket.is_file()
        else [stamp(file, source.directory) for file in files],
        "config": (source.directory / "config.json").read_text(encoding="utf-8"),
        "tensors": [(item.tensor.checkpoint_name, item.tensor.checkpoint_shape, str(item.dtype)) for item in found],
        "shard_size": None if isinstance(source, SafetensorsSource) else shard_size,
        "groups": (sinks.LARGE_BYTES, sinks.GROUP_BYTES),
    }
    if adapter is not None:
        state["adapter"] = [stamp(file, file.parent) for file in adapter.files]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def side_files_of(directory: Path, config: KeyeConfig, folder: Path) -> Iterable[Path]:
    """`side_files`, with a config.json that says how the weights are written, if they have fewer bits.

    Args:
      config: of the new checkpoint.
      folder: an empty directory, where that file is written.
    """
    for file in side_files(directory):
        if file.name == "config.json" and (config.quantization_config is not None or config.quantization):
            values = read_json(file)
            for section in (values, values.get("text_config")):
                if isinstance(section, dict):
                    section.pop("quantization_config", None)
                    section.pop("compression_config", None)
            if config.quantization:
                values["quantization_config"] = layouts.write(config.quantization)
            file = folder / file.name
            file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        yield file


def side_files(directory: Path) -> Iterable[Path]:
    """The files of a checkpoint, other than weights, that are copied into the new one."""
    for file in sorted(directory.iterdir()):
        wanted = file.suffix in _SIDE_SUFFIXES or file.name.startswith(_SIDE_NAMES)
        weights = file.name.endswith(".index.json") or file.name in (MANIFEST, PARAMS, MARKER)
        if wanted and not weights and file.is_file() and file.stat().st_size <= _SIDE_BYTES:
            yield file
