"""Counts parameters and bytes of a configuration or a checkpoint by part, without reading weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from convert import buckets, checks, detect, mapping
from convert.manifest import MANIFEST, Manifest
from convert.orbax_io import OrbaxSource
from convert.reader import SafetensorsSource
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.progress import PhaseProgress

_TEXT_PARTS = ("embedding", "attention", "indexer", "router", "norms", "lm_head")


@dataclasses.dataclass(frozen=True)
class Part:
    """The size of one part of the model.

    Attributes:
      tensors: number of arrays; experts count as fused.
      parameters: number of elements.
      nbytes: bytes of all elements.
    """

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.tensors + other.tensors, self.parameters + other.parameters, self.nbytes + other.nbytes)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
      path: the inspected file or directory.
      kind: "config", "safetensors" or "orbax".
      parts: sizes by the names in `convert.mapping.PARTS`, in that order.
      total: sum of the parts.
      active: decoder parameters that one token uses: all but those of the experts that the router does not choose.
      dtypes: bytes by dtype.
      files: number of weight files; 0 for a config.
      problems: the problems of the checkpoint, one sentence each.
      notes: what the configuration leaves to a guess, or says without effect, one sentence each.
    """

    path: Path
    kind: str
    parts: dict[str, Part]
    total: Part
    active: int
    dtypes: dict[str, int]
    files: int
    problems: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


def inspect(path: str | Path, *, check: bool = False, progress: PhaseProgress | None = None) -> Inspection:
    """Inspects a config.json, a directory with one, or a checkpoint of either kind, also in a bucket.

    Reads only headers and metadata, unless `check` asks to compare every file with the checksums of the manifest.

    Args:
      path: of a file or a directory, or a bucket's URL.
      check: whether to read every file.
      progress: called with "verify", the bytes read and the bytes of all files.

    Raises:
      UserError: `path` is none of these, or its configuration is not valid.
      FileNotFoundError: there is no such file.
    """
    path = buckets.local(path)
    if path.is_file() or _has_only_config(path):
        config = detect.read_config(path)
        dtype = config.jax_dtype
        found = [checks.FoundTensor(tensor, dtype) for tensor in mapping.rows(config)]
        return _summary(path, "config", config, found, 0, [])
    kind = detect.kind_of(path)
    damaged = _damage(path, progress) if check else []
    try:
        config = detect.read_config(path)
        source = detect.open_source(path)
    except UserError:
        # What cannot be read because of damage is said by the damage.
        checks.raise_problems(path, damaged)
        raise
    try:
        found, problems = checks.check(source, config)
        return _summary(path, kind, config, found, _count_files(source), list(dict.fromkeys(damaged + problems)))
    finally:
        source.close()


def _damage(path: Path, progress: PhaseProgress | None) -> list[str]:
    manifest = Manifest.read(path)
    if manifest is None or not manifest.has_checksums:
        return [f"it has no checksums to check: {MANIFEST} is missing, or of an older version"]
    return checks.damage(path, progress)


def _has_only_config(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file() and not detect.has_weights(path)


def _count_files(source: SafetensorsSource | OrbaxSource) -> int:
    if isinstance(source, SafetensorsSource):
        return sum(file.suffix == ".safetensors" for file in source.files)
    return len(source.files)


def _summary(
    path: Path, kind: str, config: KeyeConfig, found: list[checks.FoundTensor], files: int, problems: list[str]
) -> Inspection:
    parts: dict[str, Part] = {}
    dtypes: dict[str, int] = {}
    for item in found:
        line = Part(1, item.tensor.parameters, item.nbytes)
        parts[item.tensor.part] = parts.get(item.tensor.part, Part()) + line
        dtypes[item.dtype.name] = dtypes.get(item.dtype.name, 0) + item.nbytes
    ordered = {name: parts[name] for name in mapping.PARTS if name in parts}
    text = sum(parts.get(name, Part()).parameters for name in _TEXT_PARTS)
    experts = parts.get("experts", Part()).parameters * config.num_experts_per_tok // config.num_experts
    total = sum(ordered.values(), Part())
    return Inspection(path, kind, ordered, total, text + experts, dtypes, files, problems, config.notes)
