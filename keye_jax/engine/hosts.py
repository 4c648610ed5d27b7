"""One engine over several processes: process 0 takes in what comes from outside, and tells the others.

A turn of the engine's loop depends on nothing but its `Turn` and what came before. So every process queues the same
steps in the same order, and no step depends on a process's own clock. Turns go through JAX's own key-value store, which
is in the memory of process 0. An idle engine waits in one call to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pickle
import struct
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

from keye_jax.engine.media.events import MediaEvent, Pixels
from keye_jax.engine.plan import Measured
from keye_jax.engine.request import Request
from keye_jax.runtime import distributed
from keye_jax.sharding import MeshRules

_PART_BYTES = 4 << 20
# What is read is deleted in windows: of at most so many turns, and of bytes unless one turn has more.
_WINDOW_TURNS, _WINDOW_BYTES = 256, 64 << 20
_WAIT_MS = 7 * 24 * 3600 * 1000  # whoever is lost before is named by its silence
_HEAD = struct.Struct("<Q?")  # number of parts, and whether the window ends

_engines = itertools.count()


class Command(NamedTuple):
    """A request that was submitted, or that is to be cancelled if `request` is None."""

    job_id: int
    request: Request | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """What came from outside before a turn of an engine's loop.

    Attributes:
      commands: in the order in which they came.
      media: of the media workers.
      measured: how long the last step took, by the clock of process 0.
      warm: whether programs are to be compiled.
      close: whether the engine ends.
    """

    commands: tuple[Command, ...] = ()
    media: tuple[MediaEvent, ...] = ()
    measured: Measured | None = None
    warm: bool = False
    close: bool = False


class Hosts:
    """The processes that share an engine. All of them make it at the same place among their other engines.

    Args:
      rules: of the model; without a mesh the engine is this process's own.

    Attributes:
      is_main: whether this process takes requests and media: process 0, or the only one.
    """

    def __init__(self, rules: MeshRules):
        self._count = 1 if rules.sharding() is None else jax.process_count()
        self._number = jax.process_index() if self._count > 1 else 0
        self.is_main = self._number == 0
        self._folder = f"keye/engine/{next(_engines)}"
        self._window = self._turn = self._bytes = 0

    def exchange(self, inputs: Callable[[], Turn]) -> Turn:
        """What `inputs` returns in process 0, in every process. The others wait for it, and do not call theirs."""
        if self._count == 1:
            return inputs()
        if not self.is_main:
            return pickle.loads(self._receive())
        turn = inputs()
        self._send(pickle.dumps(_for_others(turn), pickle.HIGHEST_PROTOCOL), close=turn.close)
        return turn

    def fail(self, error: Exception) -> None:
        """Ends the engine elsewhere after an error here. A process other than 0 ends with it, and names it."""
        if not self.is_main:
            distributed.crash(error)
        elif self._count > 1:
            with contextlib.suppress(RuntimeError):  # the store may be what failed
                self._send(pickle.dumps(Turn(close=True)), close=False)

    def _send(self, data: bytes, *, close: bool) -> None:
        """Gives a turn out. With the end of the engine nothing is left in the store."""
        store, key = distributed.store(), f"{self._folder}/{self._window}/{self._turn}"
        self._turn, self._bytes = self._turn + 1, self._bytes + len(data)
        ends = close or self._turn == _WINDOW_TURNS or self._bytes >= _WINDOW_BYTES
        parts = [data[first : first + _PART_BYTES] for first in range(0, len(data), _PART_BYTES)]
        store.key_value_set_bytes(f"{key}.0", _HEAD.pack(len(parts), ends) + parts[0])
        for number, part in enumerate(parts[1:], 1):
            store.key_value_set_bytes(f"{key}.{number}", part)
        if not ends:
            return
        # The window before this one is surely read, or will be soon: so the others are never far behind.
        for window in (self._window - 1, self._window) if close else (self._window - 1,):
            if window >= 0:
                for process in range(1, self._count):
                    store.blocking_key_value_get_bytes(f"{self._folder}/{window}/read/{process}", _WAIT_MS)
                store.key_value_delete(f"{self._folder}/{window}/")
        self._window, self._turn, self._bytes = self._window + 1, 0, 0

    def _receive(self) -> bytes:
        """Waits for the next turn."""
        store, folder = distributed.store(), f"{self._folder}/{self._window}"
        key = f"{folder}/{self._turn}"
        first = store.blocking_key_value_get_bytes(f"{key}.0", _WAIT_MS)
        count, ends = _HEAD.unpack_from(first)
        parts = [store.blocking_key_value_get_bytes(f"{key}.{number}", _WAIT_MS) for number in range(1, count)]
        self._turn += 1
        if ends:
            store.key_value_set_bytes(f"{folder}/read/{self._number}", b"")
            self._window, self._turn = self._window + 1, 0
        return b"".join([memoryview(first)[_HEAD.size :], *parts])


def _for_others(turn: Turn) -> Turn:
    """What the other processes need of a turn: of a request not its prompt, which process 0 plans."""
    commands = tuple(Command(job_id, request and _without_prompt(request)) for job_id, request in turn.commands)
    media = tuple(
        dataclasses.replace(event, _free=_nothing) if isinstance(event, Pixels) else event for event in turn.media
    )
    return dataclasses.replace(turn, commands=commands, media=media)


def _without_prompt(request: Request) -> Request:
    if request.prompt is not None:
        return dataclasses.replace(request, prompt="")
    return dataclasses.replace(request, messages=(), plan=None, options={})


def _nothing() -> None:
    """Frees what a process has by itself."""


class MediaElsewhere:
    """The media workers of process 0, as other processes see them: what they tell comes with each `Turn`."""

    def submit(self, job_id: Hashable, *arguments: Any, **others: Any) -> None:
        pass

    def decode(self, job_id: Hashable, *arguments: Any) -> None:
        pass

    def cancel(self, job_id: Hashable) -> None:
        pass

    def poll(self) -> list[MediaEvent]:
        return []

    def close(self) -> None:
        pass
