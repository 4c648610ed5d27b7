"""A process that plans and decodes. It imports no JAX, and does one thing at a time.

It talks with the process that started it over a pipe, in tuples whose first item says what they are. Pixels go through
shared memory.

  in   ("plan", serial, request, folder, hashes)        request: pickled (messages, options); folder: for downloads
       ("decode", serial, plan, media, skip, shown, threads)   plan: pickled
       ("room", serial, offset)                         the answer to "want"
       ("stop", serial)                                 the work is no longer wanted
       ("ping",)                                        asks for "pong"
  out  ("ready",)
       ("pong",)
       ("planned", plan, prompt, hashes)                hashes: of the files of this request
       ("want", medium, first_frame, frames)            waits for "room"
       ("filled",)                                      the room that was given last holds its frames
       ("decoded", decoded)
       ("failed", kind, message)
       ("stopped",)
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import pickle
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from keye_jax import interrupts
from keye_jax.engine.media.frame_cache import FrameCache
from keye_jax.engine.media.hashes import FileHashes, FileKey, decoder_versions
from keye_jax.engine.media.work import Medium, Stopped, decode, describe, failure
from keye_jax.processor import Processor

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a worker needs to know.

    Attributes:
      processor: plans and decodes.
      cache: of decoded frames; None for none.
      piece_patches: most patches of a piece of more than one frame.
      hashes: whether media are named by their content, for which files are read once more.
    """

    processor: Processor
    cache: FrameCache | None
    piece_patches: int
    hashes: bool = True


def main() -> None:
    """The program of a worker. Its arguments are the descriptors of the pipe and of the shared memory."""
    interrupts.end_with(int(sys.argv[1]))
    pipe, memory = Connection(int(sys.argv[1])), mmap.mmap(int(sys.argv[2]), 0)
    try:
        worker = _Worker(pipe, memory, pickle.loads(pipe.recv_bytes()))
        decoder_versions()  # imports the decoders, which takes a while, before the first request's time begins
        pipe.send(("ready",))
        while True:
            worker.take(pipe.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the other process ended


class _Worker:
    def __init__(self, pipe: Connection, memory: mmap.mmap, settings: Settings):
        self._pipe, self._memory, self._settings = pipe, memory, settings
        self._files = FileHashes()

    def take(self, message: tuple[Any, ...]) -> None:
        """Does what a message says. "room" and "stop" come too late here."""
        if message[0] == "ping":
            self._pipe.send(("pong",))
        if message[0] not in ("plan", "decode"):
            return
        try:
            self._pipe.send(self._plan(*message[2:]) if message[0] == "plan" else self._decode(*message[1:]))
        except Stopped:
            self._pipe.send(("stopped",))
        except (EOFError, ConnectionError):
            raise  # of the pipe; faults of files are other exceptions by now
        except Exception as error:
            self._pipe.send(("failed", *failure(error, _log.exception)))

    def _plan(self, request: bytes, folder: str, hashes: Mapping[FileKey, bytes]) -> tuple[Any, ...]:
        self._files.learn(hashes)
        tempfile.tempdir = folder
        messages, options = pickle.loads(request)
        plan = self._settings.processor.plan(messages, **options)
        try:
            prompt = describe(self._settings.processor, plan, self._files if self._settings.hashes else None)
        except BaseException:
            plan.close()
            raise
        for download in plan.downloads:
            download.keep()
        content = pickle.dumps(dataclasses.replace(plan, downloads=()), pickle.HIGHEST_PROTOCOL)
        found = self._files.known()
        return "planned", content, prompt, {key: found[key] for key in found.keys() - hashes.keys()}

    def _decode(
        self,
        serial: int,
        plan: bytes,
        media: Sequence[Medium],
        skip: Mapping[int, int],
        shown: Mapping[int, np.ndarray],
        threads: int,
    ) -> tuple[Any, ...]:
        settings = self._settings
        decoded = decode(
            settings.processor,
            pickle.loads(plan),
            media,
            skip,
            shown,
            _Pipe(self._pipe, self._memory, serial, media),
            piece_patches=settings.piece_patches,
            threads=threads,
            cache=settings.cache,
        )
        return "decoded", decoded


class _Pipe:
    """A `Sink` whose room is shared memory that the other process hands out."""

    def __init__(self, pipe: Connection, memory: mmap.mmap, serial: int, media: Sequence[Medium]):
        self._pipe, self._memory, self._serial, self._media = pipe, memory, serial, media

    def space(self, medium: int, first_frame: int, frames: int) -> np.ndarray:
        self._pipe.send(("want", medium, first_frame, frames))
        offset = None
        while offset is None:
            offset = self._answer()
        return np.frombuffer(self._memory, np.uint8, frames * self._media[medium].frame_bytes, offset)

    def filled(self) -> None:
        self._pipe.send(("filled",))

    def check(self) -> None:
        while self._pipe.poll():
            self._answer()

    def _answer(self) -> int | None:
        """The next message: where there is room; None if it is about other work."""
        kind, serial, *values = self._pipe.recv()
        if serial == self._serial:
            if kind == "stop":
                raise Stopped
            return values[0]
        return None
