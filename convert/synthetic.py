"""Writes checkpoints in the released layout with random weights, for tests, demonstrations and measurements.

    python -m convert.synthetic configs/model/tiny.json /tmp/tiny --layers 2

The values of a tensor depend only on the seed, its name, its shape and its dtype, and not on layout or shards. Norms
are near one and biases near zero. Matrices are normal with standard deviation 1/sqrt(inputs), so that activations stay
of order one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import zlib
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from convert import mapping
from convert.staging import is_empty
from convert.writer import PlannedTensor, ShardWriter
from keye_jax.config import DTYPES, KeyeConfig
from keye_jax.errors import UserError

_BLOCK_ELEMENTS = 1 << 22
# Standard deviation of norms and biases.
_NOISE = 0.02


def write_checkpoint(
    directory: str | Path,
    config: KeyeConfig,
    *,
    seed: int = 0,
    dtype: str | None = None,
    shard_size: int = 5_000_000_000,
    expert_layout: Literal["fused", "per_expert"] = "fused",
    unused: bool = True,
) -> None:
    """Writes `config.json` and random weights into `directory`.

    Memory: the largest tensor and a few blocks of 16 MiB.

    Args:
      directory: a directory that does not exist or is empty.
      config: the configuration of the model.
      seed: seed of the random numbers.
      dtype: bfloat16, float32 or float16; None for that of `config`.
      shard_size: maximum bytes of tensor data in one file.
      expert_layout: "fused" for two tensors a layer, "per_expert" for three linears an expert, of the same values.
      unused: whether to write what a released checkpoint stores and the model does not use: a table of 32,768 rows.

    Raises:
      UserError: `directory` is not empty, or `dtype` is not one of the three.
    """
    directory = Path(directory)
    kind = DTYPES.get(dtype or config.dtype)
    if kind is None:
        raise UserError(f"dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
    if not is_empty(directory):
        raise UserError(f"DST {directory} exists and is not empty; choose another")
    tensors = [tensor for tensor in mapping.rows(config) if unused or tensor.in_model]
    planned: list[PlannedTensor] = []
    for tensor in tensors:
        pieces = mapping.expert_pieces(tensor) if expert_layout == "per_expert" else []
        planned += [PlannedTensor(piece.checkpoint_name, piece.checkpoint_shape, kind) for piece in pieces]
        if not pieces:
            planned.append(PlannedTensor(tensor.checkpoint_name, tensor.checkpoint_shape, kind))
    directory.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(directory, planned, shard_size)
    try:
        for tensor in tensors:
            values = random_tensor(tensor, seed, kind)
            pieces = mapping.expert_pieces(tensor) if expert_layout == "per_expert" else []
            for piece in pieces:
                start, stop = piece.columns
                writer.write(piece.checkpoint_name, np.ascontiguousarray(values[piece.expert, :, start:stop].T))
            if not pieces:
                writer.write(tensor.checkpoint_name, values)
        writer.finish()
    finally:
        writer.close()
    (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def random_tensor(tensor: mapping.Tensor, seed: int, dtype: np.dtype) -> np.ndarray:
    """The values of one tensor in our shape. They depend on seed, name, shape and dtype only."""
    center, scale = _distribution(tensor)
    generator = np.random.default_rng([seed, zlib.crc32(tensor.checkpoint_name.encode())])
    values = np.empty(tensor.size, dtype)
    for start in range(0, tensor.size, _BLOCK_ELEMENTS):
        block = generator.standard_normal(min(_BLOCK_ELEMENTS, tensor.size - start), dtype=np.float32)
        block *= scale
        values[start : start + _BLOCK_ELEMENTS] = block + np.float32(center)
    return values.reshape(tensor.shape)


def _distribution(tensor: mapping.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    owner, leaf = tensor.path[-2:]
    if leaf == "bias":
        return 0.0, _NOISE
    if owner.endswith(("norm", "norm1", "norm2")):
        return 1.0, _NOISE
    if owner == "embed_tokens":
        return 0.0, 1.0
    if owner.endswith("position_embedding"):
        return 0.0, 0.1
    inputs = tensor.shape[1] if tensor.part == "experts" else math.prod(tensor.checkpoint_shape[1:])
    return 0.0, 1 / math.sqrt(inputs)


def with_layers(config: KeyeConfig, layers: int | None) -> KeyeConfig:
    """`config` with `layers` decoder layers, or unchanged if that is None."""
    if layers is None:
        return config
    if layers <= 0:
        raise UserError(f"--layers is {layers}; it must be positive")
    return dataclasses.replace(config, num_hidden_layers=layers)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: list[str]) -> int:
    """Runs `python -m convert.synthetic` and returns its exit code: a user's mistake is one line on stderr and 2."""
    parser = _Parser(
        prog="python -m convert.synthetic",
        description="Writes a checkpoint in the released layout with random weights.",
    )
    parser.add_argument("config", type=Path, help="A config.json.")
    parser.add_argument("dst", type=Path, help="The directory to write the checkpoint into.")
    parser.add_argument("--layers", type=int, help="Decoder layers, in place of the config's.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random weights. Default: 0.")
    parser.add_argument("--dtype", help="bfloat16, float32 or float16, in place of the config's.")
    try:
        given = parser.parse_args(arguments or ["--help"])
        config = with_layers(KeyeConfig.from_file(given.config), given.layers)
        write_checkpoint(given.dst, config, seed=given.seed, dtype=given.dtype)
    except (UserError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        print(f"keye-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("keye-jax: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
