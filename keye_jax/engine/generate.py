"""From a processed prompt to an answer, token by token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from keye_jax.config import KeyeConfig
from keye_jax.engine.request import DEFAULT_NEW_TOKENS
from keye_jax.engine.text import AnswerWriter
from keye_jax.errors import UserError
from keye_jax.kv_cache import PagePool
from keye_jax.processor import ModelInputs, Processor
from keye_jax.runtime.decode import DecodeState
from keye_jax.runtime.memory import pool_bytes, weight_bytes
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.sharding import MeshRules


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
    rules: MeshRules,
) -> int:
    """How many tokens may be generated; refuses a context that does not fit.

    Args:
      prompt_tokens: length of the prompt.
      asked: wanted limit, or None for up to `DEFAULT_NEW_TOKENS`.
      dtype: of the parameters and the cache.
      indexer_dtype: of the cache's index keys, if not `dtype`.
      memory_limit: bytes the device has, or each of several.
      rules: how the model lies over devices.

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
    weights = weight_bytes(config, rules, dtype=dtype)
    cache = pool_bytes(config, 1, prompt_tokens + wanted, rules, dtype=dtype, indexer_dtype=indexer_dtype)
    if weights + cache > memory_limit:
        gib, each = 2**30, f" on each of {rules.devices} devices" if rules.devices > 1 else ""
        raise UserError(
            f"the context does not fit: {weights / gib:.2f} GiB of weights and {cache / gib:.2f} GiB of cache{each} "
            f"for {prompt_tokens + wanted:,} tokens; the device has {memory_limit / gib:.2f} GiB"
        )
    return wanted


class Generator:
    """Answers prompts with a model, one at a time."""

    def __init__(self, runtime: Runtime, processor: Processor, end_tokens: frozenset[int]):
        self.runtime, self.processor, self.end_tokens = runtime, processor, end_tokens

    def generate(
        self, inputs: ModelInputs, *, sampling: SamplingParams, max_new_tokens: int, hooks: Hooks = Hooks()
    ) -> Answer:
        """Encodes the prompt's images and frames, reads the prompt, and writes until an end token or the limit.

        The same inputs and sampling give the same tokens; with temperature 0 the seed does not matter.
        """
        start = time.perf_counter()
        vision_embeds = jax.block_until_ready(self._encode(inputs, hooks))
        encoded = time.perf_counter()
        prompt = len(inputs.input_ids)
        pool, tables = self.runtime.new_cache(1, prompt + max_new_tokens)
        segment = Segment(inputs.input_ids, inputs.positions, tables[0], vision_embeds)
        del vision_embeds
        logits, pool = self.runtime.prefill(
            [segment], pool, progress=lambda done, total: hooks.progress("reading the prompt", done, total)
        )
        prefilled = time.perf_counter()

        writer = AnswerWriter(self.processor, inputs.prompt_opens_thinking, hooks.text)
        finish_reason, times = "length", []
        state = self.runtime.new_state(self.runtime.rules.size("batch"), len(tables[0]))
        # Row 0 draws the first token as it will draw the others; `draw` counts the prompt's last token as read.
        state = self.runtime.set_row(
            state,
            0,
            token=int(inputs.input_ids[-1]),
            length=prompt - 1,
            position_delta=inputs.position_delta,
            pages=tables[0],
            sampling=sampling,
            prompt=inputs.input_ids,
        )
        for token in self._tokens(logits, state, pool, max_new_tokens):
            times.append(time.perf_counter())
            if token in self.end_tokens:
                finish_reason = "stop"
                break
            writer.write(token)
        rate = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else 0.0
        timings = Timings(encoded - start, prefilled - encoded, times[0] - start, times[-1] - start, rate)
        text, reasoning = writer.finish()
        return Answer(text, reasoning, finish_reason, tuple(writer.token_ids), writer.reasoning_tokens, timings)

    def _tokens(self, logits: jax.Array, state: DecodeState, pool: PagePool, count: int) -> Iterator[int]:
        """Up to `count` tokens of row 0, each as soon as it is there."""
        rows = len(state.tokens)
        state = self.runtime.draw(jnp.broadcast_to(logits, (rows, logits.shape[1])), state)
        written = jnp.copy(state.tokens)  # the next step overwrites them
        yield int(written[0])
        for index in range(1, count):
            state, pool = self.runtime.decode_and_sample(state, pool)
            # This step is under way before the token it reads is looked at, so that the device never waits.
            if index > 1:
                yield int(written[0])
            written = jnp.copy(state.tokens)
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
            embeds.append(self.runtime.encode(patches, grids, scale=scale, shift=shift, progress=progress))
            before += len(patches)
        return jnp.concatenate(embeds)
