"""Writes small checkpoints, and reads them with the safetensors library for comparing every bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from convert import mapping, synthetic
from convert.sinks import OrbaxSink
from keye_jax.config import KeyeConfig
from pallas_kernels.quantized import dequantize

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
FULL_CONFIG = ROOT / "configs" / "model" / "keye_vl_2_30b_a3b.json"


def small_config(layers: int = 2) -> KeyeConfig:
    """The tiny model of the repository with fewer layers."""
    config = KeyeConfig.from_file(ROOT / "configs" / "model" / "tiny.json")
    return dataclasses.replace(config, num_hidden_layers=layers)


def write(directory: Path, *, layers: int = 2, **options: Any) -> KeyeConfig:
    """Writes a small checkpoint and returns its configuration."""
    config = small_config(layers)
    synthetic.write_checkpoint(directory, config, **options)
    return config


def contents(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a safetensors checkpoint, read by the safetensors library."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                array = opened.get_tensor(name)
                assert name not in tensors
                tensors[name] = (str(array.dtype), array.shape, array.tobytes())
    return tensors


def stop_after(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Has conversions to Orbax stopped, as by Ctrl-C, when they have written so many groups of tensors."""
    saved, save = [], OrbaxSink.write

    def write(self: OrbaxSink, group: Any, arrays: Any) -> None:
        if len(saved) == groups:
            raise KeyboardInterrupt
        saved.append(group)
        save(self, group, arrays)

    monkeypatch.setattr(OrbaxSink, "write", write)


def edit(directory: Path, change: Callable[[dict[str, Any]], object], file: str = "model.safetensors") -> None:
    """Applies `change` to the dict of arrays in a safetensors file and writes it again."""
    arrays = load_file(directory / file)
    change(arrays)
    save_file(arrays, directory / file, metadata={"format": "pt"})


def edit_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the weight map of a checkpoint's index."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def run_cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m convert`."""
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def run_python(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the Python code `program` on the CPU in a new process, and checks that it succeeds."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def equal_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays have the same shape, dtype and bits."""
    first, second = np.asarray(first), np.asarray(second)
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def greedy_tokens(config: KeyeConfig, params: Any, rules: Any = None) -> tuple[list[int], list[float]]:
    """Eight tokens that a model writes behind a made-up prompt, and how far each was ahead of the second best."""
    from keye_jax.model.keye import Keye
    from keye_jax.runtime.prefill import Segment
    from keye_jax.runtime.runtime import Runtime
    from keye_jax.runtime.sampling import SamplingParams
    from keye_jax.sharding import MeshRules

    rules = rules or MeshRules.single_device()
    runtime = Runtime(Keye.from_params(config, params), config, rules=rules)
    ids = np.random.default_rng(0).integers(0, 500, 90).astype(np.int32)
    pool, tables = runtime.new_cache(1, 256)
    positions = np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids)))
    logits, pool = runtime.prefill([Segment(ids, positions, tables[0])], pool)
    state = runtime.new_state(rules.size("batch"), len(tables[0]))
    where = {"position_delta": 0, "pages": tables[0], "sampling": SamplingParams(temperature=0)}
    state = runtime.set_row(state, 0, token=int(ids[-1]), length=len(ids) - 1, **where)
    tokens, leads = [], []
    while True:
        state = runtime.draw(logits, state)
        tokens.append(int(state.tokens[0]))
        best = np.sort(np.asarray(logits)[0])
        leads.append(float(best[-1] - best[-2]))
        if len(tokens) == 8:
            return tokens, leads
        logits, state, pool = runtime.decode(state, pool)


def numbers_of(directory: Path) -> dict[str, np.ndarray]:
    """The numbers of a model's weights, float32 by dotted path, whatever the checkpoint has them in."""
    from convert import load_params
    from convert.detect import read_config

    config = read_config(directory)
    flat: dict[str, np.ndarray] = {}
    params = load_params(directory, config)
    for tensor in mapping.rows(config):
        if not tensor.in_model or tensor.role not in ("", "values"):
            continue
        owner = params
        for key in tensor.path[:-1]:
            owner = owner[key]
        node = owner[tensor.path[-1]]
        if not tensor.role:
            flat[tensor.dotted_path] = np.asarray(node).astype(np.float32)
            continue
        assert tensor.weight is not None and tensor.scheme is not None
        values, scale = np.asarray(node), np.asarray(owner["scales"])
        zeros = np.asarray(owner["zeros"]) if "zeros" in owner else None
        weight = tensor.weight
        if weight.part == "experts":
            block = tensor.scheme.block(*weight.shape[1:], parts=mapping.parts_of(weight))
            made = dequantize(values, scale, zeros, block, np.float32)
        else:
            outputs, inputs = weight.checkpoint_shape
            group, side = tensor.scheme.block(inputs, outputs)
            made = dequantize(values.reshape(outputs, -1), scale, zeros, (side, group), np.float32, packed_axis=-1)
        flat[weight.dotted_path] = made.reshape(weight.shape)
    return flat
