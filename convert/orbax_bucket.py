"""Arrays of an Orbax checkpoint in a bucket, read and written with tensorstore.

Orbax opens a checkpoint through a library for file systems that does not know buckets without further packages. Its
arrays are zarr arrays in an OCDBT database, and tensorstore reads these wherever they are.
"""

from __future__ import annotations

import ast
import math
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import buckets
from convert.orbax_layout import ArrayPath, StoredArray
from keye_jax.errors import UserError
from keye_jax.parsing import read_json

# Bytes of arrays that are on their way at a time.
_READ_BYTES = 1 << 30
# Of a database's inner nodes, which all arrays share.
_CACHE_BYTES = 256 << 20


class BucketArrays:
    """The arrays below `url`, whose metadata files are also in `params`.

    Raises:
      UserError: the metadata cannot be read.
    """

    def __init__(self, url: str, params: Path) -> None:
        import tensorstore as ts

        found = [params, *sorted(path for path in params.iterdir() if path.is_dir())]
        folder = next((path for path in found if (path / "_METADATA").is_file()), None)
        if folder is None:
            raise buckets.BucketError(f"{url}: it has no _METADATA")
        file = folder / "_METADATA"
        metadata = read_json(file)
        self._base = url if folder == params else f"{url}/{folder.name}"
        self._ocdbt = bool(metadata.get("use_ocdbt", True))
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        try:
            # The keys are Python tuples in text.
            self._paths = [tuple(map(str, ast.literal_eval(key))) for key in metadata["tree_metadata"]]
        except (ValueError, LookupError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(f"{file} does not say the names of the arrays") from error
        retries = buckets.RETRIES
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": _CACHE_BYTES},
                "gcs_request_retries": retries,
                "s3_request_retries": retries,
            }
        )
        self._stores: dict[ArrayPath, Any] = {}

    def entries(self) -> dict[ArrayPath, StoredArray]:
        """Shape and dtype of every array."""
        import tensorstore as ts

        futures = {path: ts.open(self._spec(path), context=self._context, open=True, read=True) for path in self._paths}
        try:
            self._stores = {path: future.result() for path, future in futures.items()}
        except ValueError as error:
            raise buckets.BucketError(f"{self._base}: {buckets.said(error)}") from error
        return {path: StoredArray(tuple(s.shape), np.dtype(s.dtype.numpy_dtype)) for path, s in self._stores.items()}

    def _spec(self, path: ArrayPath) -> dict[str, Any]:
        name = ".".join(path)
        base = buckets.store_spec(self._base)
        store = (
            {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            if self._ocdbt
            else base | {"path": f"{base['path']}{name}/"}
        )
        # Chunks of weights are read once: only the database's nodes are worth keeping.
        return {
            "driver": self._driver,
            "kvstore": store,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }

    def restore(self, requests: Mapping[ArrayPath, Any]) -> dict[ArrayPath, Any]:
        """Reads arrays, of each the shards of this process's devices. The requests are those of `OrbaxSource.restore`.

        Memory: the arrays, and _READ_BYTES.
        """
        done: dict[ArrayPath, Any] = {}
        pending: deque[tuple[ArrayPath, dict[Any, Any]]] = deque()
        waiting = 0
        for path, request in requests.items():
            store, shards = self._stores[path], {}
            for index in _indices(request):
                shards[_key(index, request.shape)] = store[index].read()
            pending.append((path, shards))
            waiting += self._nbytes(request, len(shards))
            while pending and waiting > _READ_BYTES:
                waiting -= self._take(*pending.popleft(), requests, done)
        while pending:
            self._take(*pending.popleft(), requests, done)
        return done

    def _take(
        self, path: ArrayPath, shards: dict[Any, Any], requests: Mapping[ArrayPath, Any], done: dict[ArrayPath, Any]
    ) -> int:
        request = requests[path]
        try:
            arrays = {key: future.result() for key, future in shards.items()}
        except ValueError as error:
            raise buckets.BucketError(f"{self._base}: {'.'.join(path)}: {buckets.said(error)}") from error
        if isinstance(request, StoredArray):
            (done[path],) = arrays.values()
        else:
            cast = {key: array.astype(request.dtype, copy=False) for key, array in arrays.items()}
            done[path] = jax.block_until_ready(
                jax.make_array_from_callback(
                    request.shape, request.sharding, lambda index: cast[_key(index or (), request.shape)]
                )
            )
        return self._nbytes(request, len(shards))

    def _nbytes(self, request: Any, shards: int) -> int:
        if isinstance(request, StoredArray):
            return request.nbytes
        shape = request.sharding.shard_shape(request.shape)
        return shards * math.prod(shape) * np.dtype(request.dtype).itemsize


def _indices(request: Any) -> Iterator[tuple[slice, ...]]:
    """The parts of an array that are read here, each once."""
    if isinstance(request, StoredArray):
        yield (slice(None),) * len(request.shape)
        return
    found: Any = request.sharding.addressable_devices_indices_map(request.shape).values()
    yield from {_key(index, request.shape): index for index in found}.values()


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(each.indices(size) for each, size in zip(index, shape, strict=True))
