"""What media and prompts are called by their content, so that the same work is not done twice."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import platform
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from keye_jax import __version__
from keye_jax.processor import ImagePlan, VideoPlan
from keye_jax.processor.frame_list import FrameList

PIXELS_VERSION = 1
"""Raised with every change of the processor after which the same file gives other pixels."""

BLOCK_TOKENS = 512
"""Tokens of a block of a prompt, the unit in which prefixes are shared."""

# Files whose hashes are remembered.
_MOST_FILES = 1024
# Nanoseconds. A file that was written this recently may change again without a new time stamp.
_FRESH_NS = 2_000_000_000

type FileKey = tuple[str, int, int, int, int]
"""Path, device, inode, bytes and time of the last change in nanoseconds of a file."""


class FileHashes:
    """SHA-256 of files. Each file is read once, until its size, its inode or the time of its last change differs.

    Those of the last 1,024 files are remembered. Any thread may call the methods.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[FileKey, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, path: Path) -> bytes:
        """The hash of a file, 32 bytes. Raises OSError."""
        status = path.stat()
        key = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            if (found := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return found
        with path.open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        if time.time_ns() - status.st_mtime_ns > _FRESH_NS:
            self.learn({key: digest})
        return digest

    def learn(self, known: Mapping[FileKey, bytes]) -> None:
        """Takes hashes that were found elsewhere."""
        with self._lock:
            for key, digest in known.items():
                self._known[key] = digest
                self._known.move_to_end(key)
            while len(self._known) > _MOST_FILES:
                self._known.popitem(last=False)

    def known(self) -> dict[FileKey, bytes]:
        """The hashes that are remembered."""
        with self._lock:
            return dict(self._known)


@functools.cache
def decoder_versions() -> str:
    """What decides about pixels besides a file and its options: the versions of the libraries, and the processor's."""
    try:
        import av

        video = [av.__version__, av.library_versions]
    except ImportError:
        video = None
    versions = [__version__, PIXELS_VERSION, PIL.__version__, video, platform.machine()]
    return json.dumps(versions, sort_keys=True)


def media_hash(plan: ImagePlan | VideoPlan, patch_size: int, files: FileHashes) -> bytes:
    """SHA-256 of all that decides about the pixels of an image or a video as the model takes them, 32 bytes.

    That is the content of its files, which frames are chosen and at what size, and `decoder_versions`. Where the files
    lie does not matter.

    Raises:
      OSError: a file cannot be read.
    """
    if isinstance(plan, ImagePlan):
        kind, chosen, contents = "image", b"", [plan.source]
    else:
        kind, chosen = "video", plan.indices.astype("<i8").tobytes()
        source = plan.source
        if isinstance(source, FrameList):
            contents = [source.frames[index] for index in plan.indices.tolist()]
        else:
            contents = [source.content]
    digest = hashlib.sha256(json.dumps([kind, plan.height, plan.width, patch_size, decoder_versions()]).encode())
    digest.update(hashlib.sha256(chosen).digest())
    for content in contents:
        digest.update(_content_hash(content, files))
    return digest.digest()


def _content_hash(content: Any, files: FileHashes) -> bytes:
    """SHA-256 of a path, the content of a file, an array or a PIL image."""
    if isinstance(content, Path):
        return files.of(content)
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    digest = hashlib.sha256()
    if isinstance(content, Image.Image):
        # Its notes tell about colours, transparency and rotation.
        digest.update(pickle.dumps((content.mode, content.size, content.getpalette(), sorted(content.info.items()))))
        digest.update(content.tobytes())
    else:
        digest.update(repr(content.shape).encode())
        digest.update(np.ascontiguousarray(content))
    return digest.digest()


def block_hashes(
    input_ids: np.ndarray,
    media: Sequence[tuple[bytes, int]],
    pad_tokens: Sequence[int],
    block: int = BLOCK_TOKENS,
) -> list[bytes]:
    """One hash for each whole block of a prompt. Two prompts share a hash if they are alike up to the block's end.

    A token counts by its id. A pad token counts by the hash of its image or video, and its place among the pads of
    that. The hash of a block takes in that of the block before it.

    Args:
      input_ids: int32 [T].
      media: the hash, and the number of pad tokens, of each image and video in the order of the prompt.
      pad_tokens: the ids of pad tokens.
      block: tokens of a block.

    Returns:
      T // block hashes of 32 bytes.

    Raises:
      ValueError: the prompt has another number of pad tokens.
    """
    ids = np.asarray(input_ids, np.int64)
    pads = np.flatnonzero(np.isin(ids, pad_tokens))
    counts = np.array([count for _, count in media], np.int64)
    if len(pads) != counts.sum():
        raise ValueError(f"the prompt has {len(pads)} pad tokens and its media have {counts.sum()}")
    medium = np.repeat(np.arange(len(counts)), counts)
    # Pads are -1, -2 and so on within their medium.
    ids = ids.copy()
    ids[pads] = (np.cumsum(counts) - counts)[medium] - np.arange(len(pads)) - 1
    previous, hashes = b"", []
    for start in range(0, len(ids) // block * block, block):
        digest = hashlib.sha256(previous)
        digest.update(ids[start : start + block].astype("<i8").tobytes())
        first, end = np.searchsorted(pads, (start, start + block))
        for number in np.unique(medium[first:end]).tolist():
            inside = int(np.count_nonzero(medium[first:end] == number))
            digest.update(media[number][0] + inside.to_bytes(8, "little"))
        previous = digest.digest()
        hashes.append(previous)
    return hashes
