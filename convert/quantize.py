"""Makes an Orbax checkpoint whose experts, and if asked for attention, have fewer bits. It can be continued."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert import buckets, checks, detect, mapping, storage
from convert.bucket_sink import BucketOrbaxSink, BucketStaging
from convert.buckets import Bucket
from convert.checks import FoundTensor
from convert.conversion import (
    Source,
    check_destination,
    check_space,
    fingerprint_of,
    opened,
    side_files_of,
    write_groups,
)
from convert.mapping import Tensor
from convert.orbax_layout import ArrayPath
from convert.reader import SafetensorsSource
from convert.sinks import OrbaxSink, Sink, grouped
from convert.staging import Staging
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.parsing import read_json
from keye_jax.progress import PhaseProgress
from keye_jax.quantization.calibration import Calibration, MatrixInputs
from keye_jax.quantization.quantize import VALUES, Quantized, quantize, scales_dtype
from keye_jax.quantization.schemes import Quantization

_ERRORS = "errors.json"
_ROWS = 16
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class WeightError:
    """How much the outputs of a weight differ, `|x W' - x W| / |x W|`, all experts together.

    Attributes:
      outputs: with the scales that are written.
      uncalibrated: with the scales that there would be without a calibration; None if there was none.
    """

    outputs: float
    uncalibrated: float | None


@dataclasses.dataclass(frozen=True)
class QuantizedCheckpoint:
    """The result of `quantize_checkpoint`.

    Attributes:
      destination: directory or URL of the new checkpoint.
      nbytes, before: bytes of its arrays, and of those of the source.
      continued: the part of `nbytes` that an earlier, stopped run wrote.
      errors: of each weight by dotted path. x are 16 rows of normal random numbers a matrix, or for a calibrated weight
        the samples of its calibration.
      seconds: duration of this run.
    """

    destination: str
    nbytes: int
    before: int
    continued: int
    errors: Mapping[str, WeightError]
    seconds: float


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    quantization: Quantization,
    *,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    progress: PhaseProgress | None = None,
) -> QuantizedCheckpoint:
    """Writes the checkpoint in `src` with weights of fewer bits into `dst`, one weight at a time.

    Memory: twice the largest weight. After a run was stopped, the same call continues it.

    Args:
      src: a checkpoint of either kind, whose weights have all bits.
      dst: a directory that does not exist or is empty, or a URL in a bucket.
      quantization: the schemes.
      calibration: of what weights are multiplied with; their scales are chosen for it.
      overwrite: as for `convert`.
      progress: called with the phase, "verify" or "quantize", the bytes done and the bytes of all arrays.

    Raises:
      UserError: `src`, `dst` or a scheme is not valid.
    """
    started = time.monotonic()
    report = progress or (lambda phase, done, total: None)
    destination = check_destination(dst, overwrite=overwrite, source=src)
    directory = buckets.local(src)
    detect.kind_of(directory)
    checks.raise_problems(directory, checks.damage(directory, report))
    source = detect.open_source(directory)
    try:
        config = detect.read_config(directory)
        if config.quantization_config is not None:
            raise UserError(f"SRC {src} has weights of fewer bits already; it must have all bits")
        found, problems = checks.check(source, config)
        checks.raise_problems(directory, problems)
        target = dataclasses.replace(config, quantization=quantization)
        return _Run(source, target, found, calibration, report).into(destination, overwrite, started)
    except OSError as error:
        raise UserError(storage.reason(error) or str(error)) from error
    finally:
        source.close()


class _Run:
    """One run of the command."""

    def __init__(
        self,
        source: Source,
        config: KeyeConfig,
        found: list[FoundTensor],
        calibration: Calibration | None,
        report: PhaseProgress,
    ) -> None:
        self.source, self.config, self.before = source, config, found
        self.calibration, self.report = calibration, report
        self.inputs: Mapping[str, MatrixInputs] = {}
        sources = {item.tensor.checkpoint_name: item for item in found}
        self.found: list[FoundTensor] = []
        self.weights: dict[str, list[FoundTensor]] = {}
        for tensor in mapping.rows(config):
            if tensor.weight is not None and tensor.scheme is not None:
                dtypes = {"values": VALUES[tensor.scheme.format], "scales": scales_dtype(tensor.scheme.format)}
                item = FoundTensor(tensor, dtypes[tensor.role])
                self.weights.setdefault(tensor.weight.checkpoint_name, []).append(item)
            elif tensor.checkpoint_name in sources:
                item = sources[tensor.checkpoint_name]
            else:
                continue
            self.found.append(item)
        self.plain = [item for item in self.found if item.tensor.weight is None]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(fingerprint_of(self.source, self.found, 0, None).encode())
        digest.update(str(self.config.quantization).encode())
        if self.calibration is not None:
            digest.update(self.calibration.digest.encode())
        return digest.hexdigest()

    def into(self, destination: Path | Bucket, overwrite: bool, started: float) -> QuantizedCheckpoint:
        total = sum(item.nbytes for item in self.found)
        if isinstance(destination, Path):
            check_space(destination, total)

        def sink_in(staging: Staging | BucketStaging) -> Sink:
            return BucketOrbaxSink(staging) if isinstance(staging, BucketStaging) else OrbaxSink(staging, self.report)

        with opened(destination, self.fingerprint(), sink_in, overwrite=overwrite) as (staging, sink):
            errors = self._known_errors(staging) if isinstance(staging, Staging) else {}
            continued = sum(item.nbytes for item in self.found if item.tensor.checkpoint_name in staging.done)
            if self.calibration is not None and any(
                group[0].tensor.checkpoint_name not in staging.done for group in self.weights.values()
            ):
                self.inputs = self.calibration.inputs()
            self.report("quantize", continued, total)
            # The groups are this module's own: a weight's arrays are made together.
            list(sink.groups(self.found))
            write_groups(
                [*self.weights.values(), *grouped(self.plain)],
                functools.partial(self._make, errors, staging),
                sink,
                staging,
                lambda recorded: self.report("quantize", continued + recorded, total),
            )
            with tempfile.TemporaryDirectory() as folder:
                sink.finish(side_files_of(self.source.directory, self.config, Path(folder)))
            staging.commit()
        shown = destination.url if isinstance(destination, Bucket) else str(destination)
        before = sum(item.nbytes for item in self.before)
        order = {name: place for place, name in enumerate(t.dotted_path for t in mapping.rows(_whole(self.config)))}
        errors = dict(sorted(errors.items(), key=lambda item: order[item[0]]))
        return QuantizedCheckpoint(shown, total, before, continued, errors, time.monotonic() - started)

    def _make(
        self, errors: dict[str, WeightError], staging: Staging | BucketStaging, group: list[FoundTensor]
    ) -> dict[ArrayPath, np.ndarray]:
        """The arrays of a group by path. Puts the error of a weight of fewer bits into `errors`."""
        weight = group[0].tensor.weight
        if weight is None:
            return {item.tensor.path: self._read(item.tensor) for item in group}
        arrays, errors[weight.dotted_path] = self._quantized(weight, group)
        if isinstance(staging, Staging):
            new = staging.path / f"{_ERRORS}.new"
            content = {path: dataclasses.asdict(error) for path, error in errors.items()}
            new.write_text(json.dumps(content), encoding="utf-8")
            new.rename(staging.path / _ERRORS)
        return arrays

    def _known_errors(self, staging: Staging) -> dict[str, WeightError]:
        """The errors of the weights that an earlier run wrote."""
        found = _read_errors(staging.path / _ERRORS)
        done = [group for group in self.weights.values() if group[0].tensor.checkpoint_name in staging.done]
        paths = [group[0].tensor.weight.dotted_path for group in done if group[0].tensor.weight is not None]
        return {path: found[path] for path in paths if path in found}

    def _read(self, tensor: Tensor) -> np.ndarray:
        if isinstance(self.source, SafetensorsSource):
            return self.source.read_tensor(tensor)
        return self.source.read([tensor.path])[tensor.path]

    def _quantized(self, weight: Tensor, group: list[FoundTensor]) -> tuple[dict[ArrayPath, np.ndarray], WeightError]:
        """The arrays of a weight by path, and how much its outputs differ."""
        scheme = group[0].tensor.scheme
        assert scheme is not None
        values = self._read(weight)
        if count := checks.count_non_finite(values):
            raise UserError(f"{weight.checkpoint_name}: {count:,} values are infinite or not a number")
        is_expert = weight.part == "experts"
        # Inputs first, as experts have them.
        matrices = values if is_expert else values.reshape(weight.checkpoint_shape).T[None]
        arrays = {item.tensor.role: np.empty(item.tensor.shape, item.dtype) for item in group}
        inputs = self.inputs.get(weight.dotted_path)

        def one(index: int) -> tuple[float, float, float]:
            matrix, parts = matrices[index], mapping.parts_of(weight)
            plain = quantize(matrix, scheme, parts=parts)
            if inputs is None:
                made, x = plain, _random_rows(weight, index, len(matrix))
            else:
                made = quantize(matrix, scheme, parts=parts, input_squares=inputs.squares[index])
                x = inputs.samples[index, : inputs.count[index]]
            _store(arrays, made, index, scheme.format == "int4", is_expert)
            right = x @ matrix.astype(np.float32)
            error, plain_error = (_sum_of_squares(x @ each.numbers() - right) for each in (made, plain))
            return error, plain_error, _sum_of_squares(right)

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            error, plain_error, right = np.array(list(pool.map(one, range(len(matrices)))), np.float64).sum(axis=0)
        outputs, uncalibrated = (float(np.sqrt(each / right)) if right else 0.0 for each in (error, plain_error))
        found = WeightError(outputs, None if inputs is None else uncalibrated)
        return {item.tensor.path: arrays[item.tensor.role] for item in group}, found


def _sum_of_squares(x: np.ndarray) -> float:
    return float(np.square(x).sum())


def _store(arrays: dict[str, np.ndarray], made: Quantized, index: int, packed: bool, is_expert: bool) -> None:
    if is_expert:
        arrays["values"][index], arrays["scales"][index] = made.values, made.scales
        return
    assert not packed, "linear maps of int4 are read and not made"
    arrays["values"][...] = made.values.T.reshape(arrays["values"].shape)
    arrays["scales"][...] = made.scales.T


def _random_rows(weight: Tensor, index: int, width: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(f"{weight.checkpoint_name} {index}".encode()).digest()[:8])
    return np.random.default_rng(seed).standard_normal((_ROWS, width), dtype=np.float32)


def _whole(config: KeyeConfig) -> KeyeConfig:
    return dataclasses.replace(config, quantization=Quantization())


def _read_errors(file: Path) -> dict[str, WeightError]:
    """The errors of weights that an earlier run wrote; none if the file is not whole."""
    try:
        return {path: WeightError(**values) for path, values in read_json(file).items()}
    except (FileNotFoundError, UserError, TypeError, ValueError, AttributeError):
        return {}
