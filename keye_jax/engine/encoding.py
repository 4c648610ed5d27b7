"""From the frames of requests to the embeddings of their prompts, a piece with each step, and none of them twice."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np

from keye_jax.engine.job import Encoded, Encoding, Job
from keye_jax.engine.media.embeddings import EmbeddingCache
from keye_jax.engine.media.events import Pixels
from keye_jax.engine.stepper import Stepper

MOST_ENCODING = 8
"""Steps of encoding that are queued together: patches and embeddings of more would fill the devices' memory."""


class FrameEncoder:
    """Encodes the frames of requests, in the order in which they come.

    Args:
      stepper: queues the encoding.
      jobs: the requests on their way, by their numbers. Frames of others are dropped.
      cache_bytes: most bytes of embeddings of media that are kept.
    """

    def __init__(self, stepper: Stepper, jobs: Mapping[int, Job], cache_bytes: int):
        self._stepper, self._jobs = stepper, jobs
        self._cache: EmbeddingCache[Encoded] = EmbeddingCache(cache_bytes)
        self._pixels: collections.deque[Pixels] = collections.deque()
        self._encoding: collections.deque[Encoding] = collections.deque()

    @property
    def busy(self) -> bool:
        """Whether frames wait, or are being encoded."""
        return bool(self._pixels or self._encoding)

    @property
    def hits(self) -> int:
        """Media whose embeddings were kept."""
        return self._cache.hits

    def begin(self, job: Job) -> tuple[dict[int, int], dict[int, np.ndarray]]:
        """Makes room for the embeddings of a planned request, and fills in those that are kept.

        Returns:
          `skip` and `shown` of `MediaWorkers.decode`.
        """
        assert job.prompt is not None, "it is planned"
        runtime, pads = self._stepper.runtime, sum(medium.pads for medium in job.prompt.media)
        job.embeds = np.zeros((pads, runtime.config.hidden_size), runtime.dtype)
        job.filled = np.zeros(pads, bool)
        job.frames_left = [medium.frames for medium in job.prompt.media]
        skip, shown = {}, {}
        for number, medium in enumerate(job.prompt.media):
            found = self._cache.get(medium.hash)
            if found is not None:
                job.embeds[medium.first_pad : medium.first_pad + medium.pads] = found.embeds
                job.filled[medium.first_pad : medium.first_pad + medium.pads] = True
                job.frames_left[number], skip[number] = 0, medium.frames
                if found.shown is not None:
                    shown[number] = found.shown
        job.frames = sum(job.frames_left)
        return skip, shown

    def take(self, pixels: Pixels) -> None:
        """Takes decoded frames, and releases them when they are on the devices."""
        self._pixels.append(pixels)

    def advance(self, *, all_of_them: bool) -> list[Job]:
        """Waits for embeddings that were queued, and queues the encoding of the next frames.

        Args:
          all_of_them: whether as much is queued as the devices have room for, and not one piece.

        Returns:
          the requests that have more embeddings than before.
        """
        found = []
        while self._encoding:
            part = self._encoding.popleft()
            if (job := self._jobs.get(part.job_id)) is not None:
                self._place(job, part)
                found.append(job)
        while self._pixels:
            pixels = self._pixels.popleft()
            if not isinstance(pixels.job_id, int) or pixels.job_id not in self._jobs:
                pixels.release()
                continue
            grid = pixels.grids[0]
            each = int(grid[1] * grid[2])
            at_once = self._stepper.images_at_once(each)
            tokens = pixels.pads // pixels.frames
            for first in range(0, pixels.frames, at_once):
                count = min(at_once, pixels.frames - first)
                patches = pixels.patches[first * each : (first + count) * each]
                encoded = self._stepper.encode(patches, grid)
                pad = pixels.first_pad + first * tokens
                self._encoding.append(Encoding(pixels.job_id, pixels.medium, count, tokens, pad, encoded))
            pixels.release()
            if not all_of_them or len(self._encoding) >= MOST_ENCODING:
                break
        return found

    def keep_all(self, job: Job) -> None:
        """Keeps the embeddings of all media of a request that is decoded now."""
        for number in range(len(job.frames_left)):
            self._keep(job, number)

    def _place(self, job: Job, part: Encoding) -> None:
        """Puts embeddings where the prompt has their pads."""
        assert job.embeds is not None and job.filled is not None, "it is planned"
        place = slice(part.first_pad, part.first_pad + part.frames * part.tokens)
        job.embeds[place] = self._stepper.embeddings(part.encoded, part.frames, part.tokens)
        job.filled[place] = True
        job.frames_left[part.medium] -= part.frames
        left = sum(job.frames_left)
        job.progress("encoding frames", job.frames - left, job.frames)
        if not left:
            job.stamp("encoded")
        self._keep(job, part.medium)

    def _keep(self, job: Job, number: int) -> None:
        """Keeps the embeddings of a medium, if all its frames are encoded and it is known which these are."""
        if job.frames_left[number] or job.decoded is None:
            return
        assert job.prompt is not None and job.embeds is not None, "it is planned"
        medium = job.prompt.media[number]
        if medium.hash not in self._cache:
            whole = job.embeds[medium.first_pad : medium.first_pad + medium.pads]
            self._cache.put(medium.hash, Encoded(whole.copy(), job.decoded.shown.get(number)))
