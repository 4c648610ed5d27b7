"""Writes a trained model in the released layout, beside the files of the checkpoint that it was trained from."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import buckets, checks, detect
from convert.conversion import SHARD_BYTES, side_files
from convert.manifest import Hasher
from convert.reader import SafetensorsSource
from convert.sinks import finish_local
from convert.staging import is_empty
from convert.writer import PlannedTensor, ShardWriter
from keye_jax.errors import UserError


def export(
    base: str | Path,
    dst: str | Path,
    trained: Mapping[str, Callable[[], Any]],
    *,
    shard_size: int = SHARD_BYTES,
) -> None:
    """Writes safetensors files with trained weights, and all other weights and files of `base`.

    Weights keep the dtypes that they have in `base`. Memory: twice the largest tensor. The files are written into
    `dst.partial`, which becomes `dst` at the end.

    Args:
      base: a checkpoint of either kind.
      dst: a directory that does not exist or is empty.
      trained: by dotted path, what returns a weight's values in our shape.
      shard_size: maximum bytes of tensor data in one file.

    Raises:
      UserError: `base` is not whole, or `dst` is not empty.
    """
    base, dst = buckets.local(base), Path(dst).absolute()
    if not is_empty(dst):
        raise UserError(f"{dst} is not empty; a checkpoint needs a new directory")
    source = detect.open_source(base)
    partial = dst.with_name(f"{dst.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    writer = None
    try:
        found, problems = checks.check(source, detect.read_config(base))
        checks.raise_problems(base, problems)
        planned = [
            PlannedTensor(item.tensor.checkpoint_name, item.tensor.checkpoint_shape, item.dtype) for item in found
        ]
        writer = ShardWriter(partial, planned, shard_size)
        for item in found:
            make = trained.get(item.tensor.dotted_path)
            values = _read(source, item) if make is None else np.asarray(make()).astype(item.dtype)
            writer.write(item.tensor.checkpoint_name, values)
        writer.finish()
    finally:
        source.close()
        if writer is not None:
            writer.close()
    with contextlib.closing(Hasher()) as hasher:
        finish_local(partial, side_files(base), hasher)
    if dst.exists():
        dst.rmdir()
    partial.rename(dst)


def _read(source: Any, item: checks.FoundTensor) -> np.ndarray:
    if isinstance(source, SafetensorsSource):
        return source.read_tensor(item.tensor)
    return source.read([item.tensor.path])[item.tensor.path]
