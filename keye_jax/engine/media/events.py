"""What workers tell about requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import numpy as np

from keye_jax.engine.media.work import Decoded, Prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """A request whose prompt is known. It waits for `MediaWorkers.decode` or `cancel`."""

    job_id: Hashable
    prompt: Prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded frames of one medium, in shared memory.

    Attributes:
      medium: the place of the medium in `Prompt.media`.
      first_frame: the place in the medium of the first of the frames.
      grids: int32 [frames, 3], (1, h, w) of each, in patches.
      first_pad, pads: pad tokens of the prompt before these frames, and those of these frames.
      patches: uint8 [frames * h * w, 3, p, p]. They may be read until `release`, and by nothing after it: a JAX array
        on a CPU may share the memory of the array that it was made from.
    """

    job_id: Hashable
    medium: int
    first_frame: int
    grids: np.ndarray
    first_pad: int
    pads: int
    patches: np.ndarray
    _free: Callable[[], None]

    @property
    def frames(self) -> int:
        return len(self.grids)

    def release(self) -> None:
        """Gives the memory back. It has to be called once."""
        self._free()


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
    """A request whose media are decoded. All its `Pixels` came before."""

    job_id: Hashable
    decoded: Decoded


@dataclasses.dataclass(frozen=True)
class Broken:
    """A request that failed; nothing more comes about it.

    Attributes:
      kind: as in `RequestError`: "invalid", "media", "too_large", "timeout" or "internal".
      message: a sentence.
    """

    job_id: Hashable
    kind: str
    message: str


type MediaEvent = Planned | Pixels | Finished | Broken
