"""From a command to a prompt that the scheduler can read: requests that come, and what media workers say of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from keye_jax.engine.answers import Answers
from keye_jax.engine.encoding import FrameEncoder
from keye_jax.engine.handle import Handle
from keye_jax.engine.hosts import Command, MediaElsewhere
from keye_jax.engine.job import Job
from keye_jax.engine.media.events import Broken, Finished, MediaEvent, Pixels, Planned
from keye_jax.engine.media.work import Prompt
from keye_jax.engine.media.workers import MediaWorkers
from keye_jax.engine.request import DEFAULT_NEW_TOKENS
from keye_jax.engine.scheduler import Scheduler
from keye_jax.errors import UserError
from keye_jax.processor import PromptTokens

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Arrivals:
    """The engine's thread calls it with the commands and media events of a turn.

    Args:
      jobs: the requests on their way by number; requests of other processes are added.
      media: plans prompts and decodes media.
      encoder: takes pixels.
      answers: begins the answers of a request whose prompt is planned.
      scheduler: says whether a request can ever run.
      compile_grammar: begins to compile a grammar in another thread.
    """

    def __init__(
        self,
        jobs: dict[int, Job],
        media: MediaWorkers | MediaElsewhere,
        encoder: FrameEncoder,
        answers: Answers,
        scheduler: Scheduler,
        compile_grammar: Callable[[str], Future[LLMatcher]],
    ):
        self._jobs, self._media, self._encoder, self._answers = jobs, media, encoder, answers
        self._scheduler, self._compile = scheduler, compile_grammar

    def take(self, commands: Sequence[Command]) -> None:
        """Has new requests planned, and ends those that are cancelled."""
        for number, request in commands:
            job = self._jobs.get(number)
            if request is None:
                if job is not None:
                    self._media.cancel(job.id)
                    self._answers.cancel(job)
                continue
            if job is None:  # it was submitted in another process
                job = self._jobs[number] = Job(number, request, Handle(lambda: None), time.perf_counter())
                if request.grammar is not None:
                    job.matcher = self._compile(request.grammar)
            self._media.submit(job.id, request.messages, request.options, plan=job.plan or request.plan)

    def take_media(self, events: Sequence[MediaEvent]) -> None:
        """Takes what media workers said."""
        for event in events:
            job = self._jobs.get(event.job_id) if isinstance(event.job_id, int) else None
            if job is None:
                if isinstance(event, Pixels):
                    event.release()
            elif isinstance(event, Planned):
                self._arrive(job, event.prompt)
            elif isinstance(event, Pixels):
                self._encoder.take(event)
                job.frames_decoded += event.frames
                job.progress("decoding frames", job.frames_decoded, job.frames)
            elif isinstance(event, Finished):
                job.decoded = event.decoded
                if job.frames:
                    job.stamp("media")
                self._encoder.keep_all(job)
                if event.decoded.tokens is None:
                    self._answers.tell_ready(job)
                else:
                    self._restate(job, event.decoded.tokens)
                self._answers.finish(job)
            elif isinstance(event, Broken):
                self._answers.fail(job, event.kind, event.message)

    def _arrive(self, job: Job, prompt: Prompt) -> None:
        """Takes note of a planned request: of what is read, and which of its media have to be decoded."""
        job.prompt = prompt
        job.stamp("planned")
        limit = self._limit(job)
        if limit is not None:
            skip, shown = self._encoder.begin(job)
            self._answers.begin(job, limit)
            if job.choices:
                self._media.decode(job.id, skip, shown)
            else:
                self._media.cancel(job.id)

    def _restate(self, job: Job, tokens: PromptTokens) -> None:
        """Begins again with the prompt that states the times of the frames that are shown. No token was drawn yet."""
        assert job.prompt is not None, "it was decoded"
        job.prompt = job.prompt.restated(tokens)
        self._answers.take_back(job)
        limit = self._limit(job)
        if limit is not None:
            self._answers.begin(job, limit)

    def _limit(self, job: Job) -> int | None:
        """Most tokens of each answer; None if the request can never run, and failed."""
        assert job.prompt is not None, "it is planned"
        request, length = job.request, len(job.prompt.input_ids)
        room = self._scheduler.config.most_tokens - length
        limit = request.max_tokens or max(1, min(DEFAULT_NEW_TOKENS, room))
        if job.decoded is not None:
            limit = max(1, min(limit, room))  # other times may take a few tokens more; the request was taken before
        try:
            self._scheduler.check(length, limit)
        except UserError as error:
            self._media.cancel(job.id)
            self._answers.fail(job, "too_large", str(error))
            return None
        return limit
