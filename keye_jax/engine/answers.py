"""The answers of requests: their sequences, the tokens as they are drawn, their ends, and the results."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from keye_jax.engine.constraint import Constraint, GrammarError, Masks
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.heat import selection_heat
from keye_jax.engine.job import Answering, Job
from keye_jax.engine.media.hashes import block_hashes
from keye_jax.engine.media.work import Decoded
from keye_jax.engine.plan import Arrival, Cancel, Ended, Failed, Ready
from keye_jax.engine.plan import Event as SchedulerEvent
from keye_jax.engine.request import FinishReason, RequestError, Result, Timings, TokenLogprob, Usage
from keye_jax.engine.stepper import DrawnToken, SequenceData
from keye_jax.engine.text import AnswerWriter
from keye_jax.processor import Processor


class Answers:
    """The answers that an engine writes.

    Args:
      processor: turns tokens into text.
      defaults: of the checkpoint.
      masks: sets of tokens that constraints name.
      block: tokens of a block of the prefix cache; None without one.
      leave: called with a request and what became of it, when it is no longer on its way.

    Attributes:
      events: what the scheduler has to know before the next step.
      tokens: how many were written.
    """

    def __init__(
        self,
        processor: Processor,
        defaults: GenerationDefaults,
        masks: Masks,
        block: int | None,
        leave: Callable[[Job, Result | RequestError], None],
    ):
        self._processor, self._defaults, self._masks = processor, defaults, masks
        self._block, self._leave = block, leave
        self._choices: dict[str, tuple[Job, Answering]] = {}
        self._ended: dict[str, tuple[Job, Answering]] = {}  # those whose heat is not there yet
        self._sequences = itertools.count()
        self.events: list[SchedulerEvent] = []
        self.tokens = 0

    def __contains__(self, name: str) -> bool:
        return name in self._choices

    def job(self, name: str) -> Job:
        """The request that a sequence belongs to."""
        return self._choices[name][0]

    def data(self, name: str) -> SequenceData:
        """What the devices have to know of a sequence."""
        return self._choices[name][1].data

    def begin(self, job: Job, limit: int) -> None:
        """Makes the sequences of a planned request, each of which writes at most `limit` tokens.

        The request fails if its grammar allows nothing.
        """
        assert job.prompt is not None and job.embeds is not None, "it is planned"
        request, prompt = job.request, job.prompt
        pad_ids = (self._processor.image_token_id, self._processor.video_token_id)
        before = np.concatenate([[0], np.cumsum(np.isin(prompt.input_ids, pad_ids))])
        try:
            constraints = [self._constraint(job) for _ in range(request.n)]
        except GrammarError as error:
            self.fail(job, "invalid", str(error))
            return
        hashes: tuple[bytes, ...] = ()
        if self._block is not None:
            media = [(medium.hash, medium.pads) for medium in prompt.media]
            hashes = tuple(block_hashes(prompt.input_ids, media, pad_ids, self._block))
        sampling = request.sampling or self._defaults.sampling
        for number, constraint in enumerate(constraints):
            data = SequenceData(
                prompt.input_ids,
                prompt.positions,
                prompt.position_delta,
                before,
                job.embeds,
                dataclasses.replace(sampling, seed=sampling.seed + number),
                request.logit_bias,
                constraint,
                request.selection_heat,
            )
            writer = AnswerWriter(self._processor, request, number, prompt.prompt_opens_thinking, job.handle.put)
            choice = Answering(str(next(self._sequences)), number, data, writer, limit)
            job.choices.append(choice)
            self._choices[choice.id] = job, choice
            self.events.append(Arrival(choice.id, len(prompt.input_ids), limit, hashes))
        self.tell_ready(job)

    def _constraint(self, job: Job) -> Constraint | None:
        request, prompt = job.request, job.prompt
        assert prompt is not None, "it is planned"
        if job.matcher is None and request.thinking_budget is None:
            return None
        matcher = None if job.matcher is None else job.matcher.result().deep_copy()
        opens, raw = prompt.prompt_opens_thinking, request.prompt is not None
        thoughts = self._masks.beginning(prompt.input_ids, opens=opens, raw=raw)
        return Constraint(self._masks, thoughts, request.thinking_budget, matcher)

    def take_back(self, job: Job) -> None:
        """Drops the sequences of a request that begins again. No token was drawn yet."""
        for choice in job.choices:
            del self._choices[choice.id]
            self.events.append(Failed(choice.id))
        job.choices.clear()
        job.cached = 0

    def tell_ready(self, job: Job) -> None:
        """Tells the scheduler up to where the prompt can be read."""
        self.events += [Ready(choice.id, job.ready) for choice in job.choices if choice.choice is None]

    def note_cached(self, cached: Sequence[tuple[str, int]]) -> None:
        """Takes note of sequences that were admitted, as in `Plan.cached`."""
        for name, tokens in cached:
            job, choice = self._choices[name]
            job.stamp("admitted")
            job.cached = max(job.cached, tokens) if choice.number == 0 else job.cached

    def deliver(self, tokens: Sequence[DrawnToken]) -> None:
        """Gives tokens to the answers that drew them."""
        for drawn in tokens:
            found = self._choices.get(drawn.id)
            if found is None or found[1].choice is not None:
                continue
            job, choice = found
            job.stamp("first_token")
            now = job.stamp_last_token()
            if drawn.token in self._defaults.end_tokens:
                self._end(job, choice, "stop")
                continue
            self.tokens += 1
            choice.data.tokens.append(drawn.token)
            choice.times.append(now)
            choice.writer.write(drawn.token, _logprob(drawn, job.request.top_logprobs))
            if choice.writer.stopped:
                self._end(job, choice, "stop")
            elif len(choice.data.tokens) == choice.max_tokens:
                self._end(job, choice, "length")
            elif choice.data.constraint is not None:
                try:
                    choice.data.constraint.advance(drawn.token)
                except GrammarError as error:
                    self.fail(job, "invalid", str(error))

    def cancel(self, job: Job) -> None:
        """Ends a request; what it has written so far is its result."""
        if job.prompt is None:
            self._drop(job, RequestError("cancelled", "the request was cancelled before it was planned"))
            return
        job.decoded = job.decoded or Decoded(job.prompt.frame_times, (), job.prompt.warnings)
        for choice in job.choices:
            if choice.choice is None:
                self._end(job, choice, "cancelled")

    def fail(self, job: Job, kind: str, message: str) -> None:
        """Ends a request with a `RequestError`."""
        self.events += [Failed(choice.id) for choice in job.choices if choice.choice is None]
        self._drop(job, RequestError(kind, message))

    def finish(self, job: Job) -> None:
        """Gives the result out, if all answers are there and all is known about the media."""
        choices = [
            choice.choice for choice in job.choices if choice.choice is not None and choice.id not in self._ended
        ]
        if not job.choices or len(choices) < len(job.choices) or job.decoded is None or job.prompt is None:
            return
        prompt = job.prompt
        usage = Usage(
            len(prompt.input_ids),
            prompt.image_tokens,
            prompt.video_tokens,
            job.cached,
            sum(len(choice.token_ids) for choice in choices),
            sum(choice.reasoning_tokens for choice in choices),
        )
        names = [field.name for field in dataclasses.fields(Timings)]
        timings = Timings(**{name: job.at.get(name, job.at.get("planned", 0.0)) for name in names})
        times, undecodable = (
            tuple(tuple(each.tolist()) for each in arrays)
            for arrays in (job.decoded.frame_times, job.decoded.undecodable_times)
        )
        self._drop(job, Result(tuple(choices), usage, timings, times, job.decoded.warnings, undecodable))

    def _end(self, job: Job, choice: Answering, reason: FinishReason) -> None:
        """Ends one answer, and with the last one the request."""
        choice.choice = choice.writer.finish(reason, token_seconds=tuple(choice.times))
        if reason != "length":
            self.events.append(Cancel(choice.id) if reason == "cancelled" else Ended(choice.id))
        if job.request.selection_heat:
            self._ended[choice.id] = job, choice
        self.finish(job)

    def take_heat(self, heat: Callable[[str], np.ndarray | None]) -> None:
        """Completes answers that wait for their heat.

        Args:
          heat: `Stepper.heat`.
        """
        for name, (job, choice) in tuple(self._ended.items()):
            counts = heat(name)
            if counts is not None and choice.choice is not None and job.prompt is not None:
                pads = np.diff(choice.data.pads_before) > 0
                found = selection_heat(counts, job.prompt, pads)
                choice.choice = dataclasses.replace(choice.choice, selection_heat=found)
                del self._ended[name]
                self.finish(job)

    def _drop(self, job: Job, outcome: Result | RequestError) -> None:
        for choice in job.choices:
            del self._choices[choice.id]
            self._ended.pop(choice.id, None)
        self._leave(job, outcome)


def _logprob(drawn: DrawnToken, top: int | None) -> TokenLogprob | None:
    """The log probability of a token with those of the `top` likeliest; None if they were not asked for."""
    if top is None:
        return None
    pairs = zip(drawn.top_tokens[:top].tolist(), drawn.top_logprobs[:top].tolist(), strict=True)
    return TokenLogprob(drawn.token, drawn.logprob, tuple(pairs))
