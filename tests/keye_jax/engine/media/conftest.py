"""Workers for the tiny model, and what they tell."""

import time
from typing import Any

import numpy as np
import pytest

from keye_jax.engine.media import Broken, Finished, MediaWorkers, Pixels, Planned
from tests.keye_jax.processor.conftest import checkpoint, clip, clips, config, processor  # noqa: F401


class Told:
    """All that workers told about one request, its pixels copied and released.

    Attributes:
      prompt, decoded, broken: from the events of these names; None where there was none.
      pieces: rows (medium, first_frame, frames).
      patches: of each medium, by its place.
    """

    def __init__(self):
        self.prompt: Any = None
        self.decoded: Any = None
        self.broken: Any = None
        self.pieces: list[tuple[int, int, int]] = []
        self.patches: dict[int, list[np.ndarray]] = {}

    @property
    def ended(self):
        return self.decoded is not None or self.broken is not None

    def take(self, event):
        if isinstance(event, Planned):
            self.prompt = event.prompt
        elif isinstance(event, Finished):
            self.decoded = event.decoded
        elif isinstance(event, Broken):
            self.broken = event
        elif isinstance(event, Pixels):
            medium = self.prompt.media[event.medium]
            assert event.patches.shape[0] == event.frames * medium.patches_per_frame
            assert event.grids.tolist() == [list(medium.grid)] * event.frames
            assert event.first_pad == medium.first_pad + event.first_frame * medium.tokens_per_frame
            assert event.pads == event.frames * medium.tokens_per_frame
            self.pieces.append((event.medium, event.first_frame, event.frames))
            self.patches.setdefault(event.medium, []).append(event.patches.copy())
            event.release()

    def all_patches(self, kind):
        """The patches of all images, or of all frames."""
        parts = [
            part
            for index, medium in enumerate(self.prompt.media)
            if medium.kind == kind
            for part in self.patches.get(index, [])
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 3, 14, 14), np.uint8)


def all_ended(told):
    return all(one.ended for one in told.values())


def follow(workers, names, *, decode=True, skip=None, shown=None, until=all_ended, told=None, limit=60):
    """Polls until requests end, and starts decoding when they are planned. Returns a `Told` for each name.

    Args:
      decode: whether it starts decoding.
      skip: as for `MediaWorkers.decode`.
      until: whether to return, by what was told.
      told: what was told before.
    """
    told = {name: told[name] if told else Told() for name in names}
    end = time.monotonic() + limit
    while not until(told):
        assert time.monotonic() < end, {name: vars(one) for name, one in told.items() if not one.ended}
        for event in workers.poll():
            told[event.job_id].take(event)
            if decode and isinstance(event, Planned):
                workers.decode(event.job_id, skip, shown)
        time.sleep(0.002)
    return told


def user(*parts):
    """Messages of one user turn."""
    return [{"role": "user", "content": list(parts)}]


def video(path, **options):
    return {"type": "video", "video": str(path), **options}


def image(path, **options):
    return {"type": "image", "image": str(path), **options}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def workers(processor):  # noqa: F811
    with MediaWorkers(processor, 2, 8 << 20, piece_patches=1024, timeout=30) as made:
        yield made
