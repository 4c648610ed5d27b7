"""What a configuration or a checkpoint amounts to: parameters and bytes by part, without reading a weight."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from convert import checks, detect, mapping
from convert.orbax_io import OrbaxSource
from convert.reader import SafetensorsSource
from keye_jax.config import KeyeConfig

_TEXT_PARTS = ("embedding", "attention", "indexer", "router", "norms", "lm_head")


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of an inspection.

    Attributes:
      tensors: how many arrays, with experts counted as fused.
      parameters: how many numbers.
      nbytes: bytes of them.
    """

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.tensors + other.tensors, self.parameters + other.parameters, self.nbytes + other.nbytes)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
      path: what was looked at.
      kind: "config", "safetensors" or "orbax".
      parts: by name, in the table's order; the names are those of `convert.mapping.PARTS`.
      total: their sum.
      active: parameters of the decoder that one token uses: everything but the experts it is not routed to.
      dtypes: bytes by dtype.
      files: weight files of a checkpoint; 0 for a config.
      problems: what keeps the checkpoint from being whole, one sentence each.
    """

    path: Path
    kind: str
    parts: dict[str, Part]
    total: Part
    active: int
    dtypes: dict[str, int]
    files: int
    problems: list[str]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"path": str(self.path)}, indent=2)


def inspect(path: str | Path) -> Inspection:
    """Looks into a config.json, a directory with one, or a checkpoint of either kind; reads headers and metadata only.

    Raises:
      UserError: there is no such file, or it is none of these, or its config is wrong.
    """
    path = Path(path)
    if path.is_file() or _is_config_alone(path):
        config = KeyeConfig.from_file(path)
        dtype = config.jax_dtype
        found = [checks.FoundTensor(tensor, dtype) for tensor in mapping.rows(config)]
        return _summary(path, "config", config, found, 0, [])
    kind = detect.kind_of(path)
    config = detect.read_config(path)
    source = detect.open_source(path)
    try:
        found, problems = checks.check(source, config)
        return _summary(path, kind, config, found, _count_files(source), problems)
    finally:
        source.close()


def _is_config_alone(path: Path) -> bool:
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
        line = Part(1, item.tensor.size, item.nbytes)
        parts[item.tensor.part] = parts.get(item.tensor.part, Part()) + line
        dtypes[item.dtype.name] = dtypes.get(item.dtype.name, 0) + item.nbytes
    ordered = {name: parts[name] for name in mapping.PARTS if name in parts}
    text = sum(parts.get(name, Part()).parameters for name in _TEXT_PARTS)
    experts = parts.get("experts", Part()).parameters * config.num_experts_per_tok // config.num_experts
    total = sum(ordered.values(), Part())
    return Inspection(path, kind, ordered, total, text + experts, dtypes, files, problems)
