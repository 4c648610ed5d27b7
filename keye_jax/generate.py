"""From a processed prompt to an answer, token by token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from keye_jax.cache import Cache, bytes_per_token
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.keye import Keye
from keye_jax.processor import ModelInputs, Processor
from keye_jax.runner import Runner, round_up
from keye_jax.sampling import Sampling, sample

DEFAULT_NEW_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds from the start of `Generator.generate`, and rates.

    Attributes:
      vision: encoding images and frames.
      prefill: reading the prompt.
      first_token: until the first token was there.
      total: until the last one was.
      tokens_per_second: of the tokens after the second, whose step may have had to be compiled.
    """

    vision: float
    prefill: float
    first_token: float
    total: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
      text: the answer.
      reasoning: what it wrote inside its think block.
      finish_reason: "stop" at an end token, "length" at the limit.
      token_ids: all generated ids, an end token not included.
      reasoning_tokens: how many of them belong to the reasoning.
      timings: how long it took.
    """

    text: str
    reasoning: str
    finish_reason: str
    token_ids: tuple[int, ...]
    reasoning_tokens: int
    timings: Timings


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Called while generating: `text(piece, reasoning)` for each new piece, `progress(step, done, total)`."""

    text: Callable[[str, bool], None] = lambda piece, reasoning: None
    progress: Callable[[str, int, int], None] = lambda step, done, total: None


def new_token_limit(
    config: KeyeConfig,
    prompt_tokens: int,
    asked: int | None,
    *,
    dtype: str,
    indexer_dtype: str | None = None,
    memory_limit: int,
) -> int:
    """How many tokens may be generated; refuses a context that does not fit.

    Args:
      prompt_tokens: length of the prompt.
      asked: wanted limit, or None for up to `DEFAULT_NEW_TOKENS`.
      dtype: of the parameters and the cache.
      indexer_dtype: of the cache's index keys, if not `dtype`.
      memory_limit: bytes the device has.

    Raises:
      UserError: the context exceeds the model's positions or the device's memory; the message has the numbers.
    """
    if asked is not None and asked < 1:
        raise UserError(f"max_new_tokens is {asked}; it must be at least 1")
    limit = config.max_position_embeddings
    wanted = asked or max(1, min(DEFAULT_NEW_TOKENS, limit - prompt_tokens))
    if prompt_tokens + wanted > limit:
        raise UserError(
            f"the context does not fit: {prompt_tokens:,} prompt tokens and {wanted:,} new ones are "
            f"{prompt_tokens + wanted:,}; this model takes at most {limit:,}"
        )
    weight_bytes = Keye.parameter_count(config) * jnp.dtype(dtype).itemsize
    cache_bytes = round_up(prompt_tokens + wanted) * bytes_per_token(
        config, jnp.dtype(dtype), indexer_dtype=indexer_dtype
    )
    if weight_bytes + cache_bytes > memory_limit:
        gib = 2**30
        raise UserError(
            f"the context does not fit: {weight_bytes / gib:.2f} GiB of weights and {cache_bytes / gib:.2f} GiB of "
            f"cache for {prompt_tokens + wanted:,} tokens; the device has {memory_limit / gib:.2f} GiB"
        )
    return wanted


class Generator:
    """Answers prompts with a model."""

    def __init__(self, runner: Runner, processor: Processor, end_tokens: frozenset[int]):
        self.runner, self.processor, self.end_tokens = runner, processor, end_tokens

    def generate(
        self,
        inputs: ModelInputs,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int = 0,
        hooks: Hooks = Hooks(),
    ) -> Answer:
        """Encodes the prompt's images and frames, reads the prompt, and writes until an end token or the limit.

        The same inputs, sampling and seed give the same tokens; with temperature 0 the seed does not matter.
        """
        start = time.perf_counter()
        vision_embeds = jax.block_until_ready(self._encode(inputs, hooks))
        encoded = time.perf_counter()
        logits, cache = self.runner.prefill(
            inputs.input_ids,
            inputs.positions,
            vision_embeds,
            self.runner.new_cache(len(inputs.input_ids) + max_new_tokens),
            progress=lambda done, total: hooks.progress("reading the prompt", done, total),
        )
        del vision_embeds
        prefilled = time.perf_counter()

        writer = _Writer(self.processor, inputs.prompt_opens_thinking, hooks)
        finish_reason, times = "length", []
        for token in self._tokens(logits, cache, inputs.position_delta, sampling, max_new_tokens, seed):
            times.append(time.perf_counter())
            if token in self.end_tokens:
                finish_reason = "stop"
                break
            writer.write(token)
        rate = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else 0.0
        timings = Timings(encoded - start, prefilled - encoded, times[0] - start, times[-1] - start, rate)
        return writer.answer(finish_reason, timings)

    def _tokens(
        self, logits: jax.Array, cache: Cache, position_delta: int, sampling: Sampling, count: int, seed: int
    ) -> Iterator[int]:
        """Up to `count` tokens, each as soon as it is there."""
        delta, keys = jnp.asarray([position_delta], jnp.int32), jax.random.key(seed)[None]
        token = sample(logits, jax.vmap(jax.random.fold_in)(keys, cache.lengths), sampling)
        yield int(token[0])
        written = token
        for index in range(1, count):
            token, cache = self.runner.write(token, delta, cache, keys, sampling)
            # This step is under way before the token it reads is looked at, so that the device never waits.
            if index > 1:
                yield int(written[0])
            written = jnp.copy(token)  # the next step overwrites it
        if count > 1:
            yield int(written[0])

    def _encode(self, inputs: ModelInputs, hooks: Hooks) -> jax.Array:
        total = len(inputs.image_patches) + len(inputs.video_patches)
        embeds, before = [], 0
        for patches, grids in (
            (inputs.image_patches, inputs.image_grids),
            (inputs.video_patches, inputs.video_grids),
        ):

            def progress(done: int, _: int, before: int = before) -> None:
                hooks.progress("encoding images and frames", before + done, total)

            scale, shift = self.processor.pixel_scale, self.processor.pixel_shift
            embeds.append(self.runner.encode(patches, grids, scale=scale, shift=shift, progress=progress))
            before += len(patches)
        return jnp.concatenate(embeds)


class _Writer:
    """Turns tokens into text as they come, reasoning apart from the answer."""

    def __init__(self, processor: Processor, thinking: bool, hooks: Hooks):
        self.ids: list[int] = []
        self._open, self._close = processor.token_id("<think>"), processor.token_id("</think>")
        self._stream, self._hooks, self._thinking = processor.stream(), hooks, thinking
        self._text = {True: "", False: ""}
        self._reasoning_tokens = 0

    def write(self, token: int) -> None:
        self.ids.append(token)
        self._reasoning_tokens += self._thinking
        if token == self._open:
            self._thinking = True
        elif token == self._close:
            if not self._thinking:
                # An answer may hold only the closing mark: all before it was reasoning.
                self._text = {True: self._text[True] + self._text[False], False: ""}
                self._reasoning_tokens = len(self.ids)
            self._thinking = False
        else:
            self._emit(self._stream.step(token))

    def _emit(self, piece: str) -> None:
        if piece:
            self._text[self._thinking] += piece
            self._hooks.text(piece, self._thinking)

    def answer(self, finish_reason: str, timings: Timings) -> Answer:
        self._emit(self._stream.flush())
        return Answer(
            text=self._text[False].strip(),
            reasoning=self._text[True].strip(),
            finish_reason=finish_reason,
            token_ids=tuple(self.ids),
            reasoning_tokens=self._reasoning_tokens,
            timings=timings,
        )
