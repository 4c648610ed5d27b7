"""The journal of a conversion says which tensors are written, where their bytes are, and what they must be.

It is JSON with the SHA-256 of itself, so that a damaged one is not believed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from keye_jax.errors import UserError
from keye_jax.parsing import parse_json

_DIGEST = "sha256"


@dataclasses.dataclass(frozen=True)
class Extent:
    """Bytes of a file that will not change until the conversion ends.

    Attributes:
      file: path relative to the staging directory.
      offset: of the first byte.
      length: how many.
      sha256: their digest in hexadecimal.
    """

    file: str
    offset: int
    length: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Written:
    """An extent whose digest is being computed."""

    file: str
    offset: int
    length: int
    digest: concurrent.futures.Future[str]

    def extent(self) -> Extent:
        """Waits for the digest.

        Raises:
          OSError: the file cannot be read.
        """
        return Extent(self.file, self.offset, self.length, self.digest.result())


@dataclasses.dataclass(frozen=True)
class SavedGroup:
    """Tensors that are on the disk, and all bytes that hold them."""

    tensors: tuple[str, ...]
    extents: tuple[Extent, ...]


def encode(state: dict[str, Any]) -> bytes:
    """The bytes of a journal."""
    return json.dumps(state | {_DIGEST: _digest(state)}).encode()


def decode(text: bytes, name: str) -> dict[str, Any] | None:
    """The content of the journal `name`; None if it is no journal, or is damaged."""
    try:
        state = parse_json(text, name)
        return state if isinstance(state, dict) and state.pop(_DIGEST, None) == _digest(state) else None
    except UserError:
        return None


def to_json(groups: Iterable[SavedGroup]) -> list[Any]:
    """Groups as a journal has them."""
    return [[list(group.tensors), [dataclasses.astuple(extent) for extent in group.extents]] for group in groups]


def from_json(values: list[Any]) -> list[SavedGroup]:
    """What `to_json` returned."""
    return [SavedGroup(tuple(tensors), tuple(Extent(*each) for each in extents)) for tensors, extents in values]


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
