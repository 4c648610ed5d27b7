"""Reads safetensors files: headers without data, and tensors one at a time.

`pread` reads the data into a buffer of the tensor's size. Files are not memory-mapped, since mapped pages count as
resident memory: a mapped checkpoint would seem to need its whole size in memory.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import buckets, mapping
from keye_jax.errors import UserError, shorten
from keye_jax.parsing import parse_json, read_json

INDEX_NAME = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
}
# Those of weights of fewer bits, with what lies beside them.
STORED: dict[str, np.dtype] = DTYPES | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
DTYPE_NAMES = {dtype: name for name, dtype in STORED.items()}

# Bits an element of the format's other dtypes, for checking headers that hold them.
_OTHER_ITEM_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "F64": 64, "I64": 64, "U64": 64}
_OTHER_ITEM_BITS |= {"I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_OTHER_ITEM_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}

# The format's own limit. A longer header means that the file is not safetensors.
_MAX_HEADER_BYTES = 100_000_000
_READ_BYTES = 64 << 20
_BUCKET_READS = 16


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor in a file.

    Attributes:
      file: the safetensors file.
      dtype: the format's name of the dtype, such as `BF16`.
      shape: dimensions in elements.
      start: offset of its first byte in the file.
      nbytes: its length in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class HeaderError(ValueError):
    """A file is not a complete safetensors file. The message tells why."""


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The places of the tensors in one safetensors file, by name.

    Raises:
      HeaderError: the file is truncated, or is not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size < 8:
            raise HeaderError(f"it is truncated: it has {size} bytes; a header alone has at least 8")
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if length > _MAX_HEADER_BYTES:
            raise HeaderError(
                f"it is not safetensors: its header has {length:,} bytes; the format allows {_MAX_HEADER_BYTES:,}"
            )
        if 8 + length > size:
            raise HeaderError(f"it is truncated: it has {size:,} bytes; its header alone has {length:,}")
        try:
            values = parse_json(stream.read(length), "its header")
        except UserError as error:
            raise HeaderError(str(error)) from error
    if not isinstance(values, dict):
        raise HeaderError("its header is not a JSON object")
    values.pop("__metadata__", None)
    if (unprintable := next((name for name in values if not name.isprintable()), None)) is not None:
        raise HeaderError(f"its header is wrong: {shorten(unprintable)} is no name of a tensor")
    entries = {name: _read_entry(file, name, value, 8 + length) for name, value in values.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise HeaderError(f"its header is wrong: {name} does not begin where the tensor before it ends")
        end += entry.nbytes
    if end > size:
        raise HeaderError(f"it is truncated: it has {size:,} bytes; its header promises {end:,}")
    if end < size:
        raise HeaderError(f"it has {size - end:,} bytes more than its header says")
    return entries


def _read_entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if not all(type(item) is int and item >= 0 for item in (*shape, start, stop)):
            raise TypeError
        bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _OTHER_ITEM_BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise HeaderError(f"its header is wrong: the entry of {name} cannot be read") from error
    if (stop - start) * 8 != math.prod(shape) * bits:
        raise HeaderError(f"its header is wrong: {name} is {dtype} {list(shape)} but has {stop - start} bytes")
    return TensorEntry(file, dtype, shape, data_start + start, stop - start)


class SafetensorsSource:
    """The safetensors checkpoint in a directory: `model.safetensors.index.json` with shards, or `*.safetensors`.

    Attributes:
      directory: its directory.
      files: the index, if there is one, and the weight files.
      entries: the places of the tensors in the complete files, by name.
      problems: the problems of the files, one sentence each.
      in_bad_files: names of the tensors that the index puts into incomplete or missing files.
      readers: what reads tensors of weights of fewer bits, by name in the table; `convert.checks` finds them.
      dequantized: names of weights that have fewer bits in the files and not in the model.
      is_partly_unknown: whether there is no index, and a file cannot be read: nobody knows which tensors are in it.

    Raises:
      UserError: the index is not valid.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        self.problems: list[str] = []
        self.in_bad_files: set[str] = set()
        self.readers: dict[str, Callable[[], np.ndarray]] = {}
        self.dequantized: list[str] = []
        self.is_partly_unknown = False
        index = directory / INDEX_NAME
        if index.is_file():
            self.files = [index]
            self._open_indexed(_read_index(index))
        else:
            self.files = []
            # Without an index, model.safetensors is the whole checkpoint, and files beside it are ignored.
            single = directory / "model.safetensors"
            for file in [single] if single.is_file() else sorted(directory.glob("*.safetensors")):
                self.is_partly_unknown |= self._open_file(file) is None
        self._descriptors: dict[Path, int] = {}
        self._bucket = _bucket_of(directory)
        self._take_other_names()

    @classmethod
    def of_files(cls, directory: Path, files: list[Path]) -> SafetensorsSource:
        """The tensors of the named files of `directory`, whatever else is there."""
        source = cls.__new__(cls)
        source.directory, source.files, source.is_partly_unknown = directory, [], False
        source.entries, source.problems, source.in_bad_files, source._descriptors = {}, [], set(), {}
        source._bucket, source.readers, source.dequantized = None, {}, []
        for file in files:
            source._open_file(file)
        return source

    def _open_file(self, file: Path) -> dict[str, TensorEntry] | None:
        self.files.append(file)
        try:
            entries = read_header(file)
        except HeaderError as error:
            self.problems.append(f"{file.name}: {error}")
            return None
        for name, entry in entries.items():
            if name in self.entries:
                self.problems.append(f"{file.name}: {name} is also in {self.entries[name].file.name}")
            self.entries[name] = entry
        return entries

    def _open_indexed(self, weight_map: dict[str, str]) -> None:
        by_file: dict[str, set[str]] = {}
        for name, file_name in weight_map.items():
            by_file.setdefault(file_name, set()).add(name)
        for file_name, names in sorted(by_file.items()):
            file = self.directory / file_name
            if not file.is_file():
                self.problems.append(f"{file_name}: it is missing; the index names it")
                self.in_bad_files |= names
                continue
            entries = self._open_file(file)
            if entries is None:
                self.in_bad_files |= names
                continue
            for name in sorted(names - entries.keys()):
                self.problems.append(f"{file_name}: {name} is missing in it; the index puts it there")
                self.in_bad_files.add(name)

    def _take_other_names(self) -> None:
        """Gives tensors with names of another layout, such as `model.language_model.`, those of the table."""
        renamed: dict[str, str] = {}
        for name in list(self.entries):
            ours = mapping.canonical_name(name)
            if ours in renamed or (ours != name and ours in self.entries):
                self.problems.append(f"{name}: it is the same tensor as {renamed.get(ours, ours)}")
                continue
            renamed[ours] = name
        self.entries = {ours: self.entries[name] for ours, name in renamed.items()}
        self.in_bad_files = {mapping.canonical_name(name) for name in self.in_bad_files}

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """Reads one tensor in its stored dtype and shape.

        Args:
          name: its name in the checkpoint.
          out: a contiguous array to read into, of the tensor's length in bytes; None for a new array.

        Raises:
          UserError: the file has become shorter since its header was read.
          OSError: the file system or the bucket fails.
        """
        entry = self.entries[name]
        if out is None:
            out = np.empty(entry.shape, STORED[entry.dtype])
        assert out.nbytes == entry.nbytes and out.flags.c_contiguous
        target = memoryview(out.reshape(-1).view(np.uint8))
        if self._bucket is not None:
            self._bucket.read_into(entry.file.name, entry.start, target)
            return out
        descriptor = self._descriptor(entry.file)
        done = 0
        while done < entry.nbytes:
            try:
                count = os.preadv(descriptor, [target[done : done + _READ_BYTES]], entry.start + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(entry.file)) from error
            if count == 0:
                raise UserError(f"{entry.file} is truncated: it became shorter while it was read")
            done += count
        return out

    def read_tensor(self, tensor: mapping.Tensor) -> np.ndarray:
        """Reads `tensor` in our shape. If the checkpoint stores the experts one by one, their linears are fused.

        A tensor of `readers` is what its function returns.

        Memory: the tensor and one linear of an expert.
        """
        if (read := self.readers.get(tensor.checkpoint_name)) is not None:
            return read()
        if tensor.checkpoint_name in self.entries:
            return self.read(tensor.checkpoint_name).reshape(tensor.shape)
        pieces = mapping.expert_pieces(tensor)
        fused = np.empty(tensor.shape, DTYPES[self.entries[pieces[0].checkpoint_name].dtype])
        for piece in pieces:
            start, stop = piece.columns
            fused[piece.expert, :, start:stop] = self.read(piece.checkpoint_name).T
        return fused

    def read_tensors(self, tensors: Iterable[mapping.Tensor]) -> Iterator[np.ndarray]:
        """Reads `tensors` in our shapes, as `read_tensor` does; from a bucket several at a time.

        Memory: all tensors.
        """
        if self._bucket is None:
            yield from map(self.read_tensor, tensors)
            return
        # A bucket answers each request late, and many at once.
        with concurrent.futures.ThreadPoolExecutor(_BUCKET_READS) as pool:
            yield from pool.map(self.read_tensor, tensors)

    def close(self) -> None:
        """Closes the files. A later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._descriptors[file]


def _bucket_of(directory: Path) -> buckets.Bucket | None:
    url = buckets.origin(directory)
    return None if url is None else buckets.Bucket(url)


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} is not a safetensors index: it must be JSON with an object 'weight_map'")
    for name, file_name in weight_map.items():
        if not name.isprintable():
            raise UserError(f"{index}: weight_map has {shorten(name)}, which is no name of a tensor")
        # A name in a downloaded file must not lead out of the directory.
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise UserError(
                f"{index}: weight_map[{shorten(name)}] is {shorten(file_name)}; it must be the name of a file beside it"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    """Whether `name` is that of a file in a directory, as file systems allow it."""
    return name.isprintable() and Path(name).name == name not in ("", ".", "..") and len(name.encode()) <= 255
