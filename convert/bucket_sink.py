"""Where a conversion to a bucket writes. Objects are atomic and are never renamed.

The journal, `conversion.json`, is written first and deleted last. While it is there, the checkpoint is unfinished. It
is only ever written over the content that this process wrote, so two processes cannot work on the same conversion.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert import buckets, journal, manifest
from convert.buckets import ABSENT, JOURNAL, Bucket
from convert.checks import FoundTensor
from convert.journal import Written
from convert.manifest import MANIFEST, FileRecord
from convert.orbax_io import PARAMS, OrbaxWriter
from convert.orbax_layout import ArrayPath, chunk_shape
from convert.reader import INDEX_NAME
from convert.sinks import grouped, planned_tensor
from convert.stored import encode
from convert.writer import encode_header, plan_shards, shard_index, shard_names
from keye_jax.errors import UserError

MOST_SHARD_BYTES = 1_000_000_000
"""Tensor data in one safetensors file in a bucket, which is made in memory; a larger tensor has a file of its own."""

_STATE = f"{PARAMS}/state"
# Most bytes of one object with arrays, which passes through memory.
_DATA_FILE_BYTES = 256 << 20


class BucketStaging:
    """The unfinished checkpoint in a bucket, with its journal.

    Args:
      bucket: the destination.
      fingerprint: identifies the source and the options of the conversion.
      overwrite: whether to delete a checkpoint that is there, or the unfinished one of another source.

    Raises:
      UserError: another process uses it, it belongs to another source, or something else is there.
      BucketError: the bucket cannot be read or written.

    Attributes:
      path: the URL.
      bucket: the destination.
      done: names of the tensors in the bucket.
      records: what the manifest will say of the objects so far.
    """

    def __init__(self, bucket: Bucket, fingerprint: str, *, overwrite: bool) -> None:
        self.path, self.bucket = bucket.url, bucket
        self.done: set[str] = set()
        self.records: dict[str, FileRecord] = {}
        self._fingerprint = fingerprint
        names = existing(bucket, overwrite=overwrite)
        self._stamp, state = ABSENT, None
        if JOURNAL in names:
            text, self._stamp = bucket.read_stamped(JOURNAL)
            state = _read_journal(text, bucket.url)
        if state is not None and state["fingerprint"] == fingerprint:
            # If an object is gone, nothing says which tensors were in it, and all is written again.
            if state["records"].keys() <= set(names):
                self.done = set(state["done"])
                self.records = {name: FileRecord(*record) for name, record in state["records"].items()}
        elif state is not None and not overwrite:
            raise UserError(
                f"{bucket.url} is an unfinished conversion of another source, or with other options; "
                "repeat that command to finish it, or begin again with --overwrite"
            )
        self._write_journal()
        # What a stopped process wrote after its last entry in the journal, and what is to be replaced.
        bucket.delete(name for name in names if name != JOURNAL and name not in self.records)

    def record(self, names: Iterable[str], saved: Any) -> None:
        """Writes to the journal that the tensors `names` are in the bucket; `saved` is not used."""
        self.done |= set(names)
        self._write_journal()

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, and keeps what the manifest will say of it."""
        self.bucket.write(name, data)
        self.records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())

    def commit(self) -> None:
        """Writes the manifest and deletes the journal: from now on the checkpoint is whole."""
        self.bucket.write(MANIFEST, manifest.encode(self.records))
        self.bucket.delete([JOURNAL])

    def discard(self) -> None:
        """Deletes everything that was written."""
        self.bucket.delete([*self.records, MANIFEST])
        self.bucket.delete([JOURNAL])

    def close(self) -> None:
        """Does nothing: nothing is held between objects."""

    def _write_journal(self) -> None:
        state = {
            "fingerprint": self._fingerprint,
            "done": sorted(self.done),
            "records": {name: [record.size, record.sha256] for name, record in self.records.items()},
            # Without this, two processes would write the same journal, and not see each other.
            "writer": uuid.uuid4().hex,
        }
        try:
            self._stamp = self.bucket.write(JOURNAL, journal.encode(state), if_stamp=self._stamp)
        except FileExistsError as error:
            raise UserError(f"{self.path}: another process is working on this conversion") from error


def _read_journal(text: bytes, url: str) -> dict[str, Any]:
    state = journal.decode(text, JOURNAL)
    if state is not None and {"fingerprint", "done", "records"} <= state.keys():
        return state
    raise UserError(
        f"{url}/{JOURNAL} is in the way: this command did not make it, or it is damaged; move it or remove it"
    )


def existing(bucket: Bucket, *, overwrite: bool) -> list[str]:
    """The names of what is in the destination of a conversion.

    Raises:
      UserError: they are those of a checkpoint that may not be replaced, or of something else.
      BucketError: the bucket cannot be read.
    """
    names = bucket.names()
    if names and JOURNAL not in names:
        if not overwrite:
            raise UserError(f"DST {bucket.url} exists; choose another, or replace it with --overwrite")
        if not _is_checkpoint(names):
            raise UserError(f"DST {bucket.url} is not a checkpoint, so --overwrite does not replace it")
    return names


def _is_checkpoint(names: list[str]) -> bool:
    return "config.json" in names and any(manifest.is_weights(name) for name in names)


class BucketSafetensorsSink:
    """Writes one safetensors file a group."""

    def __init__(self, staging: BucketStaging, found: list[FoundTensor], shard_size: int) -> None:
        self._staging = staging
        self._shards = plan_shards([planned_tensor(item) for item in found], min(shard_size, MOST_SHARD_BYTES))
        self._names = shard_names(len(self._shards))
        self._written = 0

    def groups(self, found: list[FoundTensor]) -> Iterator[list[FoundTensor]]:
        by_name = {item.tensor.checkpoint_name: item for item in found}
        for number, shard in enumerate(self._shards):
            self._written = number
            yield [by_name[tensor.name] for tensor in shard]

    def write(self, group: list[FoundTensor], arrays: dict[ArrayPath, np.ndarray]) -> None:
        shard = self._shards[self._written]
        header = encode_header(shard)
        data = bytearray(len(header) + sum(tensor.nbytes for tensor in shard))
        data[: len(header)] = header
        offset = len(header)
        # The items of a group are in the order of their shard.
        for item in group:
            values = encode(item.tensor, arrays.pop(item.tensor.path))
            values = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            data[offset : offset + values.nbytes] = memoryview(values)
            offset += values.nbytes
        self._staging.put(self._names[self._written], bytes(data))

    def saved(self) -> list[Written]:
        return []

    def finish(self, side_files: Iterable[Path]) -> None:
        if len(self._shards) > 1:
            self._staging.put(INDEX_NAME, shard_index(dict(zip(self._names, self._shards, strict=True))).encode())
        _put_files(self._staging, side_files)

    def close(self) -> None:
        """Does nothing: an object is written at once or not at all."""


class BucketOrbaxSink:
    """Writes each group as an OCDBT database below `params/state/`, and at the end one that refers to all of them.

    A database is made in memory and written object by object. Its data is not written again at the end.
    """

    def __init__(self, staging: BucketStaging) -> None:
        self._staging = staging
        self._paths: list[ArrayPath] = []

    def groups(self, found: list[FoundTensor]) -> Iterator[list[FoundTensor]]:
        self._paths = [item.tensor.path for item in found]
        return grouped(found)

    def write(self, group: list[FoundTensor], arrays: dict[ArrayPath, np.ndarray]) -> None:
        import tensorstore as ts

        folder = f"{_STATE}/group_{uuid.uuid4().hex}"
        context = ts.Context()
        base = {"driver": "memory", "path": "group/"}
        config = {"max_inline_value_bytes": 0}
        database = {"driver": "ocdbt", "base": base, "config": config, "target_data_file_size": _DATA_FILE_BYTES}
        with ts.Transaction(atomic=False) as transaction:
            for path in [item.tensor.path for item in group]:
                values = arrays.pop(path)
                spec = {
                    "driver": "zarr3",
                    "kvstore": database | {"path": f"{'.'.join(path)}/"},
                    "metadata": {
                        "shape": list(values.shape),
                        "data_type": values.dtype.name,
                        "chunk_grid": {
                            "name": "regular",
                            "configuration": {"chunk_shape": list(chunk_shape(values.shape, values.dtype.itemsize))},
                        },
                        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                    },
                    "store_data_equal_to_fill_value": True,
                }
                store = ts.open(spec, create=True, context=context, transaction=transaction).result()
                store.write(values).result()
        memory = ts.KvStore.open(base, context=context).result()
        for name in sorted(memory.list().result()):
            self._staging.put(f"{folder}/{name.decode()}", memory.read(name).result().value)
            memory.write(name, None).result()

    def saved(self) -> list[Written]:
        return []

    def finish(self, side_files: Iterable[Path]) -> None:
        bucket = self._staging.bucket
        prefix = f"{_STATE}/"
        folders = sorted(
            {
                name.removeprefix(prefix).partition("/")[0]
                for name in self._staging.records
                if name.startswith(f"{prefix}group_")
            }
        )
        self._merge(folders)
        with tempfile.TemporaryDirectory(prefix="keye-jax-") as scratch:
            for name, data in _orbax_metadata(Path(scratch), self._paths).items():
                self._staging.put(name, data)
        merged = [f"{prefix}manifest.ocdbt", *(n for n in bucket.names() if n.startswith(f"{prefix}d/"))]
        for name in merged:
            data = bucket.read(name)
            self._staging.records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
        _put_files(self._staging, side_files)

    def _merge(self, folders: list[str]) -> None:
        """Makes the database that refers to the data of all groups."""
        import tensorstore as ts

        context = buckets.context()
        url = f"{self._staging.path}/{_STATE}"
        try:
            target = ts.KvStore.open(
                {"driver": "ocdbt", "base": buckets.store_spec(url), "config": {"max_inline_value_bytes": 0}},
                context=context,
            ).result()
            with ts.Transaction(atomic=False) as transaction:
                copies = []
                for folder in folders:
                    base = buckets.store_spec(f"{url}/{folder}")
                    group = ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()
                    copies.append(group.experimental_copy_range_to(target.with_transaction(transaction)))
                for copy in copies:
                    copy.result()
        except ValueError as error:
            raise buckets.BucketError(f"{url}: {buckets.said(error)}") from error

    def close(self) -> None:
        """Does nothing: an object is written at once or not at all."""


def _orbax_metadata(scratch: Path, paths: list[ArrayPath]) -> dict[str, bytes]:
    """Orbax's own files about a checkpoint with arrays at `paths`, from one of single numbers that it saves."""
    work, made = scratch / "groups", scratch / "made"
    work.mkdir()
    made.mkdir()
    writer = OrbaxWriter(work)
    writer.save({path: np.zeros((), np.float32) for path in paths})
    writer.finish(made / PARAMS)
    files = (path for path in sorted(made.rglob("*")) if path.is_file())
    named = {path.relative_to(made).as_posix(): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in named.items()
        if path.name != "manifest.ocdbt" and "/d/" not in name and "ocdbt.process_" not in name
    }


def _put_files(staging: BucketStaging, side_files: Iterable[Path]) -> None:
    for file in side_files:
        staging.put(file.name, file.read_bytes())
