"""Checkpoints in buckets, `gs://BUCKET/PATH` and `s3://BUCKET/PATH`, through tensorstore's drivers.

Small files (configuration, tokenizer, templates, index, manifest, and the headers of safetensors files) are copied into
a directory of this machine's cache, one for each content. `local` returns that directory, which every reader takes like
any other checkpoint. The file `bucket.json` in it says where the weights are; these stay in the bucket, and are read in
ranges. Safetensors files in it are holes of the right length behind their headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from convert import storage
from convert.manifest import Blocks, Manifest, local_blocks
from convert.storage import BucketError
from keye_jax.errors import UserError
from keye_jax.parsing import parse_json, read_json

MARKER = "bucket.json"
# In a bucket, this object is there while a conversion to it is not finished.
JOURNAL = "conversion.json"

_BLOCK = 32 << 20
# The format's own limit.
_MOST_HEADER_BYTES = 100_000_000
# More than any server keeps in one object.
_MOST_BYTES = 1 << 50
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".jsonl")
_SMALL_NAMES = ("LICENSE", "LICENCE", "NOTICE")
# Files of Orbax that tell a checkpoint's kind and the names of its arrays.
_ORBAX_NAMES = re.compile(r"params/(_CHECKPOINT_METADATA|_METADATA|[^/]+/_METADATA)")
# A server that cannot be reached is said to be so within half a minute.
RETRIES = {"max_retries": 6, "initial_delay": "200ms", "max_delay": "8s"}


def parse(path: str | Path) -> str | None:
    """The URL of a checkpoint in a bucket, without a slash at its end; None for a path of this machine.

    `pathlib` makes one slash of two, so both are taken.

    Raises:
      UserError: the scheme is unknown, or there is no path in the bucket.
    """
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", str(path), re.DOTALL)
    if match is None:
        return None
    scheme, rest = match[1].lower(), re.sub(r"/+", "/", match[2]).strip("/")
    if scheme not in ("gs", "s3"):
        shown = f"{match[1]}://{match[2]}"
        raise UserError(f"{shown} has the scheme {match[1]}://; a path has none, and a bucket has gs:// or s3://")
    if "/" not in rest or any(part in (".", "..") for part in rest.split("/")):
        raise UserError(f"{scheme}://{rest} names no place in a bucket; it must be {scheme}://BUCKET/PATH")
    return f"{scheme}://{rest}"


def store_spec(url: str) -> dict[str, Any]:
    """Tensorstore's description of what is below `url`, for its key-value stores and for bases of these."""
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        return {"driver": "file", "path": f"{rest}/"}
    bucket, _, path = rest.partition("/")
    spec: dict[str, Any] = {"bucket": bucket, "path": f"{path}/"}
    if scheme == "gs":
        return {"driver": "gcs", **spec}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    spec |= {"endpoint": endpoint.rstrip("/")} if endpoint else {}
    spec |= {"aws_region": region or "us-east-1"} if endpoint or region else {}
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # The default chain would also look for files, and complain about those that are not there.
        spec["aws_credentials"] = {"type": "environment"}
    return {"driver": "s3", **spec}


def context() -> Any:
    """A tensorstore context for buckets, with bounded retries."""
    import tensorstore as ts

    return ts.Context({"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES})


class Bucket:
    """What is below one URL.

    Every method raises BucketError, an OSError, if the server refuses or cannot be reached.

    Attributes:
      url: without a slash at its end.
    """

    def __init__(self, url: str) -> None:
        import tensorstore as ts

        self.url = url
        self._store = self._wait("", lambda: ts.KvStore.open(store_spec(url), context=context()))

    def names(self) -> list[str]:
        """Names of all objects, relative to the URL, sorted.

        Objects that end with a slash are left out: consoles make them, empty, where a user makes a folder.
        """
        names = (name.decode(errors="replace") for name in self._wait("", self._store.list))
        return sorted(name for name in names if name and not name.endswith("/"))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The content of an object, or a range of it.

        Raises:
          FileNotFoundError: there is no such object.
        """
        return self.read_stamped(name, start, stop)[0]

    def read_stamped(self, name: str, start: int = 0, stop: int | None = None) -> tuple[bytes, bytes]:
        """As `read`, with what tells this content of the object from others, as `write` takes it."""
        ranges = {} if stop is None and not start else {"byte_range": slice(start, stop)}
        found = self._wait(name, lambda: self._store.read(name, **ranges))
        if found.state != "value":
            raise FileNotFoundError(f"{self.url}/{name} does not exist")
        return found.value, found.stamp.generation

    def read_many(self, names: Iterable[str]) -> dict[str, tuple[bytes, bytes]]:
        """Contents and stamps of several objects, read at once; objects that do not exist are left out."""
        futures = {name: self._store.read(name) for name in names}
        found = {name: self._wait(name, lambda future=future: future) for name, future in futures.items()}
        return {name: (each.value, each.stamp.generation) for name, each in found.items() if each.state == "value"}

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Reads the range of an object that begins at `start` into `target`."""
        futures = [
            (
                offset,
                self._store.read(name, byte_range=slice(start + offset, start + min(offset + _BLOCK, len(target)))),
            )
            for offset in range(0, len(target), _BLOCK)
        ]
        for offset, future in futures:
            block = self._wait(name, lambda future=future: future).value
            if len(block) != min(_BLOCK, len(target) - offset):
                raise BucketError(f"{self.url}/{name}: it is truncated or missing")
            target[offset : offset + len(block)] = block

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """The content of an object that should have `size` bytes, in order."""
        if not size:
            yield self.read(name)
        for start in range(0, size, _BLOCK):
            yield self.read(name, start, min(start + _BLOCK, size))
        if size and (extra := self.sizes({name: size})[name]) != size:
            raise BucketError(f"it has {extra:,} bytes; it must have {size:,}")

    def sizes(self, expected: Mapping[str, int]) -> dict[str, int]:
        """Lengths of objects as far as they can be told by reading a byte of each: `expected`, or another number.

        Objects that do not exist are left out.
        """
        asked = {
            name: self._store.read(name, byte_range=slice(max(size - 1, 0), size + 1))
            for name, size in expected.items()
        }
        found = {}
        for name, future in asked.items():
            try:
                if future.result().state == "value":
                    found[name] = expected[name] + 1
            except ValueError as error:
                if "OUT_OF_RANGE" not in str(error):
                    raise self._error(name, error) from error
                known = re.search(r"total size (\d+)", str(error))
                # Without the length: an object of 0 bytes, or one that ends before the byte that was asked for.
                found[name] = int(known[1]) if known else max(expected[name] - 1, 0)
        return found

    def write(self, name: str, data: bytes, *, if_stamp: bytes | None = None) -> bytes:
        """Writes an object and returns its stamp.

        Args:
          if_stamp: write only over the content with this stamp, from `read_stamped` or `write`; `ABSENT` for none.

        Raises:
          FileExistsError: the object has another content.
        """
        condition = {} if if_stamp is None else {"if_equal": if_stamp}
        stamp = self._wait(name, lambda: self._store.write(name, data, **condition)).generation
        if not stamp:
            raise FileExistsError(f"{self.url}/{name} was changed by somebody else")
        return stamp

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that do not exist are no error."""
        for name, future in [(name, self._store.write(name, None)) for name in names]:
            self._wait(name, lambda future=future: future)

    def _wait(self, name: str, begin: Any) -> Any:
        try:
            return begin().result()
        except (ValueError, OSError, RuntimeError) as error:
            raise self._error(name, error) from error

    def _error(self, name: str, error: Exception) -> BucketError:
        return BucketError(f"{self.url}{'/' if name else ''}{name}: {said(error)}")


# The stamp of an object that does not exist.
ABSENT = b"\x02"

_SAID = (
    (r"http_response_code='40[13]'|PERMISSION_DENIED|UNAUTHENTICATED", "access is denied; check the credentials"),
    (r"OUT_OF_RANGE", "it is truncated"),
    (r"http_response_code='404'|NOT_FOUND", "it does not exist"),
    (r"CURL|ould not connect|UNAVAILABLE|ould not resolve|DEADLINE|All \d+ retry", "the server cannot be reached"),
)


def said(error: Exception) -> str:
    """What a driver of tensorstore says, in a few words."""
    text = str(error)
    for pattern, words in _SAID:
        if re.search(pattern, text):
            return words
    return re.sub(r" \[.*", "", text.splitlines()[0]) if text else type(error).__name__


def origin(directory: Path) -> str | None:
    """The URL of the checkpoint whose small files `directory` holds; None if it is a checkpoint of this machine.

    Only `local` makes such a directory. Elsewhere a file of the marker's name says nothing: it may be a stranger's.
    """
    marker = directory / MARKER
    if directory.absolute().parent != _mirrors() or not marker.is_file():
        return None
    return read_json(marker)["url"]


def shown(directory: Path) -> str:
    """What the user calls a checkpoint: its URL, or its directory."""
    return origin(directory) or str(directory)


def blocks_of(directory: Path, manifest: Manifest) -> Blocks:
    """Reads the files that a manifest names, from the bucket if the checkpoint is in one."""
    url = origin(directory)
    if url is None:
        return local_blocks(directory)
    bucket = Bucket(url)
    return lambda name: bucket.blocks(name, manifest.files[name].size)


def local(path: str | Path) -> Path:
    """The directory of a checkpoint: that of this machine, or for one in a bucket, one with its small files.

    Memory: the small files.

    Raises:
      UserError: the scheme is unknown, the bucket cannot be read, there is nothing, or its conversion is not finished.
    """
    url = parse(path)
    if url is None:
        return Path(path).expanduser()
    try:
        return _mirror(Bucket(url))
    except OSError as error:
        raise UserError(storage.reason(error) or str(error)) from error


def _mirror(bucket: Bucket) -> Path:
    names = bucket.names()
    if not names:
        raise UserError(f"{bucket.url} does not exist, or nothing is in it")
    if JOURNAL in names:
        raise UserError(f"{bucket.url} is an unfinished conversion; repeat the command that began it")
    small = [name for name in names if _is_small(name)]
    contents = bucket.read_many(small)
    headers = {name: _header(bucket, name) for name in names if name.endswith(".safetensors") and "/" not in name}
    stamps = {name: stamp.hex() for name, (_, stamp) in contents.items()}
    stamps |= {name: stamp.hex() for name, (_, stamp, _) in headers.items()}
    marker = json.dumps({"url": bucket.url, "stamps": stamps, "names": names}, indent=1)
    directory = _mirrors() / hashlib.sha256(marker.encode()).hexdigest()
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        for name, (data, _) in contents.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(data)
        for name, (data, _, size) in headers.items():
            (partial / name).write_bytes(data)
            os.truncate(partial / name, size)
        (partial / MARKER).write_text(marker, encoding="utf-8")
        partial.rename(directory)
    except OSError:
        # Another process on this machine may have made the same.
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _is_small(name: str) -> bool:
    if "/" in name:
        return _ORBAX_NAMES.fullmatch(name) is not None
    return name.endswith(_SMALL_SUFFIXES) or name.startswith(_SMALL_NAMES)


def _header(bucket: Bucket, name: str) -> tuple[bytes, bytes, int]:
    """The header of a safetensors file, the stamp, and the length of the file as far as that can be told."""
    try:
        start, stamp = bucket.read_stamped(name, 0, 8)
    except BucketError:
        data, stamp = bucket.read_stamped(name)
        return data, stamp, len(data)
    try:
        length = int.from_bytes(start, "little")
        if length > _MOST_HEADER_BYTES:
            return start, stamp, len(start)
        header = bucket.read(name, 0, 8 + length)
        tensors = [value for key, value in parse_json(header[8:], name).items() if key != "__metadata__"]
        end = 8 + length + max((int(value["data_offsets"][1]) for value in tensors), default=0)
        if not 8 <= end < _MOST_BYTES:
            raise ValueError
    except (BucketError, ValueError, LookupError, TypeError, AttributeError):
        # Not safetensors, or truncated in the header: the reader says what is wrong.
        return start, stamp, len(start)
    return header, stamp, bucket.sizes({name: end})[name]


def _mirrors() -> Path:
    """The directory of those that `local` makes."""
    return (cache_directory() / "buckets").absolute()


def cache_directory() -> Path:
    """This project's directory in the user's cache, or in the system's temporary directory if the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base) / "keye-jax" if base else Path.home() / ".cache" / "keye-jax"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"keye-jax-{os.getuid()}"
