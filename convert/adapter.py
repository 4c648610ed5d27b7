"""LoRA adapters in the layout of PEFT: read, written, and merged into weights.

    adapter_config.json          rank, alpha, and the names of the modules and parameters that have pairs
    adapter_model.safetensors    `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]

Fused experts have a pair for each expert, as PEFT's `target_parameters` store them: A `[e * r, in]`, one expert after
the other, and B `[out, r * e]`, in which the expert counts fastest. PEFT wraps a module once for each of its
parameters, so the names under `mlp.experts` do not say which is whose. If both have pairs, `base_layer.lora_A` belongs
to `gate_up_proj` and `lora_A` to `down_proj`. If one has, `lora_A` is its.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import mapping
from convert.reader import DTYPES, HeaderError, SafetensorsSource, read_header
from convert.writer import PlannedTensor, ShardWriter
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError, shorten
from keye_jax.parsing import read_json

CONFIG_NAME, MODEL_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EXPERTS = ("gate_up_proj", "down_proj")
# What PEFT can ask for and is not merged here.
_UNSUPPORTED = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False}
_UNSUPPORTED |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The pair of a weight, as it is stored.

    Attributes:
      a: `[r, in]`, or of experts `[e * r, in]`.
      b: `[out, r]`, or of experts `[out, r * e]`.
    """

    a: np.ndarray
    b: np.ndarray


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter of one model.

    Attributes:
      rank: of all pairs.
      scale: of their products.
      pairs: by dotted path of the weight, as in `convert.mapping`.
      files: what it was read from.
    """

    rank: int
    scale: float
    pairs: Mapping[str, Pair]
    files: tuple[Path, ...] = ()

    def merge(self, tensor: mapping.Tensor, values: np.ndarray) -> np.ndarray:
        """`values + scale * pair` of a tensor that has a pair, summed in float32; others are returned as they are.

        Memory: of experts, one expert's product.

        Args:
          values: in our shape.
        """
        pair = self.pairs.get(tensor.dotted_path)
        if pair is None:
            return values
        a, b = pair.a.astype(np.float32), pair.b.astype(np.float32)
        if tensor.part != "experts":
            merged = values.astype(np.float32) + self.scale * (b @ a).reshape(tensor.shape)
            return merged.astype(values.dtype)
        experts = len(values)
        a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
        merged = np.empty_like(values)
        for expert in range(experts):
            product = (b[:, :, expert] @ a[expert]).T
            merged[expert] = (values[expert].astype(np.float32) + self.scale * product).astype(values.dtype)
        return merged


def adaptable(config: KeyeConfig) -> dict[str, mapping.Tensor]:
    """The weights that can have a pair, by dotted path: those of linear maps, and experts."""
    return {
        tensor.dotted_path: tensor
        for tensor in mapping.rows(config)
        if tensor.part == "experts"
        or (len(tensor.checkpoint_shape) == 2 and tensor.in_model and "embed" not in tensor.path[-2])
    }


def write_adapter(directory: str | Path, adapter: Adapter, config: KeyeConfig, *, base: str) -> None:
    """Writes an adapter into `directory`, which is made if it does not exist.

    Args:
      base: what the adapter calls the checkpoint that it belongs to.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = adaptable(config)
    modules, parameters, arrays = [], [], {}
    names = dict(_stored_names(list(adapter.pairs), tensors))
    for path, pair in adapter.pairs.items():
        name = tensors[path].checkpoint_name
        if tensors[path].part == "experts":
            parameters.append(name)
        else:
            modules.append(name.removesuffix(".weight"))
        arrays |= {f"{names[path]}.lora_A.weight": pair.a, f"{names[path]}.lora_B.weight": pair.b}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(modules),
        "target_parameters": parameters or None,
    }
    planned = [PlannedTensor(name, array.shape, array.dtype) for name, array in arrays.items()]
    writer = ShardWriter(directory, planned, 1 << 62)
    try:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.finish()
    finally:
        writer.close()
    (directory / "model.safetensors").replace(directory / MODEL_NAME)
    (directory / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_adapter(directory: str | Path, config: KeyeConfig) -> Adapter:
    """Reads an adapter that belongs to a model of `config`.

    Raises:
      UserError: a file is missing or not valid, or a pair does not belong to the model. One message lists all problems.
    """
    directory = Path(directory)
    values = _read_config(directory / CONFIG_NAME)
    file = directory / MODEL_NAME
    if not file.is_file():
        raise UserError(f"{directory} has no {MODEL_NAME}; a LoRA adapter must have it beside {CONFIG_NAME}")
    try:
        entries = read_header(file)
    except HeaderError as error:
        raise UserError(f"{file}: {error}") from error
    rank, alpha = values["r"], values["lora_alpha"]
    scale = alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank
    tensors, problems, found = adaptable(config), [], {}
    wanted = _wanted(entries.keys(), values, tensors)
    for name in sorted(entries.keys() - {key for path, stem in wanted for key in _keys(stem)}):
        problems.append(f"{name}: it belongs to no weight of this model")
    source = SafetensorsSource.of_files(directory, [file])
    try:
        for path, stem in wanted:
            rows = rank * (config.num_experts if tensors[path].part == "experts" else 1)
            inputs, outputs = pair_sides(tensors[path])
            for key, shape in zip(_keys(stem), ((rows, inputs), (outputs, rows)), strict=True):
                if key not in entries:
                    problems.append(f"{key}: it is missing; its shape must be {list(shape)}")
                elif entries[key].shape != shape:
                    problems.append(f"{key}: its shape is {list(entries[key].shape)}; it must be {list(shape)}")
                elif entries[key].dtype not in DTYPES:
                    problems.append(f"{key}: its dtype is {entries[key].dtype}; it must be {' or '.join(DTYPES)}")
            if not problems:
                found[path] = Pair(*(source.read(key) for key in _keys(stem)))
    finally:
        source.close()
    if problems:
        raise UserError("\n".join([f"{file} has {len(problems)} problem(s):", *(f"  {each}" for each in problems)]))
    return Adapter(rank, scale, found, (directory / CONFIG_NAME, file))


def pair_sides(tensor: mapping.Tensor) -> tuple[int, int]:
    """Inputs and outputs of a weight that can have a pair."""
    shape = tensor.checkpoint_shape
    return (shape[1], shape[2]) if tensor.part == "experts" else (shape[1], shape[0])


def _keys(stem: str) -> tuple[str, str]:
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _stored_names(paths: list[str], tensors: Mapping[str, mapping.Tensor]) -> Iterator[tuple[str, str]]:
    """Paths with the names of their pairs before `.lora_A.weight`."""
    names = {tensors[path].checkpoint_name for path in paths}
    for path in paths:
        name = tensors[path].checkpoint_name
        module, _, last = name.rpartition(".")
        if last in _EXPERTS:
            inner = last == _EXPERTS[0] and f"{module}.{_EXPERTS[1]}" in names
            yield path, f"{_PREFIX}{module}{'.base_layer' if inner else ''}"
        else:
            yield path, f"{_PREFIX}{name.removesuffix('.weight')}"


def _wanted(stored: Any, values: Mapping[str, Any], tensors: Mapping[str, mapping.Tensor]) -> list[tuple[str, str]]:
    """Paths of the weights that have a pair in the file, and the names of these before `.lora_A.weight`."""
    stems = {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in stored}
    targets = values.get("target_parameters") or []
    paths = []
    for path, tensor in tensors.items():
        module, _, last = tensor.checkpoint_name.rpartition(".")
        if last not in _EXPERTS:
            if f"{_PREFIX}{tensor.checkpoint_name.removesuffix('.weight')}" in stems:
                paths.append(path)
        elif f"{_PREFIX}{module}" in stems and any(
            tensor.checkpoint_name == each or tensor.checkpoint_name.endswith(f".{each}") for each in targets
        ):
            paths.append(path)
    return list(_stored_names(paths, tensors))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {CONFIG_NAME}; a LoRA adapter is a directory in PEFT's layout")
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type must be 'LORA'")
    for name in ("r", "lora_alpha"):
        if isinstance(values.get(name), bool) or not isinstance(values.get(name), int | float) or values[name] <= 0:
            raise UserError(f"{path}: {name} is {shorten(values.get(name))}; it must be a positive number")
    for name, allowed in _UNSUPPORTED.items():
        if values.get(name) not in (None, allowed):
            raise UserError(f"{path}: {name} is {shorten(values[name])}; only {allowed!r} can be merged")
    return values
