"""Does on the devices what the scheduler plans: it owns the pages and the decoded batch.

A step is queued before the tokens of the last one are looked at, so the devices never wait for the host. All its
programs have shapes that the settings decide, none of them a request; `warmup` compiles them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from keye_jax.engine.plan import Placed, Plan, SchedulerConfig
from keye_jax.kv_cache import PagePool
from keye_jax.progress import Progress
from keye_jax.runtime import lowering
from keye_jax.runtime.encode import IMAGE_PATCHES, images_at_once, padded_patches
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.programs import unpack_drawn
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams


@dataclasses.dataclass(eq=False)
class SequenceData:
    """What the devices have to know of a sequence.

    Attributes:
      input_ids: int32 `[t]`, the prompt.
      positions: int32 `[3, t]`.
      position_delta: as in `ModelInputs`.
      pads_before: int `[t + 1]`, pad tokens before each token of the prompt.
      embeds: `[pads, embed]`, embeddings of the pads in their order. They are filled in before their tokens are read,
        and the choices of a request share them.
      sampling: how its tokens are drawn.
      logit_bias: what is added to logits, by token.
      tokens: those that it has drawn, as far as the host knows them.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    position_delta: int
    pads_before: np.ndarray
    embeds: np.ndarray
    sampling: SamplingParams
    logit_bias: Mapping[int, float]
    tokens: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class DrawnToken:
    """A token of a sequence, with its scores as in `TokenScores`, one row of them."""

    id: str
    token: int
    logprob: float
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


class DrawnTokens:
    """The tokens that a step draws. `fetch` waits for them."""

    def __init__(self) -> None:
        self._parts: list[tuple[tuple[tuple[int, str], ...], jax.Array]] = []

    def add(self, rows: tuple[tuple[int, str], ...], drawn: jax.Array) -> None:
        """Adds what the sequences of some rows, `(row, id)`, drew."""
        self._parts.append((rows, drawn))
        drawn.copy_to_host_async()

    def fetch(self) -> list[DrawnToken]:
        """The tokens, those of one sequence in the order in which it drew them."""
        found: list[DrawnToken] = []
        for rows, drawn in self._parts:
            tokens, logprobs, top_tokens, top_logprobs = unpack_drawn(np.asarray(drawn))
            for row, name in rows:
                scores = float(logprobs[row]), top_tokens[row], top_logprobs[row]
                found.append(DrawnToken(name, int(tokens[row]), *scores))
        return found


class Stepper:
    """Runs plans.

    Args:
      runtime: whose prefill reads at least `config.large` tokens in one step, on all devices together.
      config: the scheduler's.
      pixel_scale, pixel_shift: as `Processor` has them.
    """

    def __init__(self, runtime: Runtime, config: SchedulerConfig, *, pixel_scale: np.ndarray, pixel_shift: np.ndarray):
        self.runtime, self.config = runtime, config
        self._normalisation = runtime.pixel_normalisation(pixel_scale, pixel_shift)
        self._pool = runtime.new_pool(config.pages_per_shard * config.homes * config.turns)
        self._state = runtime.new_state(config.rows, config.table_width)
        self._saved: dict[str, PagePool] = {}

    def run(self, plan: Plan, sequence: Callable[[str], SequenceData]) -> DrawnTokens:
        """Queues a step.

        Args:
          sequence: what is known of a sequence that the plan names.
        """
        runtime, drawn = self.runtime, DrawnTokens()
        for row in plan.clear:
            self._state = runtime.clear_row(self._state, row)
        for placed in plan.offload:
            self._saved[placed.id] = runtime.take_pages(self._pool, placed.pages)
            self._state = runtime.clear_row(self._state, placed.row)
        for placed in plan.restore:
            self._restore(placed, sequence(placed.id))
        for placed in plan.grow:
            self._state = runtime.set_pages(self._state, placed.row, np.asarray(placed.pages, np.int32))
        if plan.read is not None:
            read, data = plan.read, sequence(plan.read.id)
            tokens = slice(read.start, read.start + read.count)
            pads = slice(data.pads_before[tokens.start], data.pads_before[tokens.stop])
            segment = Segment(
                data.input_ids[tokens],
                data.positions[:, tokens],
                np.asarray(read.pages, np.int32),
                data.embeds[pads],
                read.start,
            )
            size = self.config.large if read.program == "large" else self.config.small
            logits, self._pool = runtime.read_chunk(
                segment, self._pool, tokens=size, table_width=self.config.table_width
            )
            for begin in plan.begin:
                # The row draws its first token as it draws the others; `draw` counts the prompt's last token as read.
                self._set_row(
                    begin.row, begin.pages, data, token=int(data.input_ids[-1]), length=begin.prompt_tokens - 1
                )
                self._draw(logits, begin.row)
                drawn.add(((begin.row, begin.id),), runtime.drawn(self._state))
        if plan.decode:
            self._state, self._pool = runtime.decode_and_sample(self._state, self._pool)
            drawn.add(plan.rows, runtime.drawn(self._state))
        return drawn

    def forget(self, name: str) -> None:
        """Drops what is kept in host memory of an offloaded sequence."""
        self._saved.pop(name, None)

    def close(self) -> None:
        """Frees the pages and the batch. No other method may be called afterwards."""
        for array in jax.tree.leaves((self._pool, self._state)):
            array.delete()

    def encode(self, patches: np.ndarray, grid: np.ndarray) -> jax.Array:
        """Queues the encoding of images of one size; arguments as for `Runtime.encode_images`.

        Returns:
          `[images at once, padded patches / 4, embed]`, of which `embeddings` takes what counts.
        """
        return self.runtime.encode_images(patches, grid, self._normalisation)

    @staticmethod
    def embeddings(encoded: jax.Array, images: int, tokens: int) -> np.ndarray:
        """Waits for `encode`: embeddings of images of `tokens` tokens each, NumPy `[images * tokens, embed]`."""
        found = np.asarray(encoded)[:images, :tokens]
        return found.reshape(images * tokens, -1)

    def images_at_once(self, patches: int) -> int:
        """Images of `patches` patches each that one step encodes."""
        step = self.runtime.prefill_step
        return images_at_once(patches, step.size(step.vision_patches))

    def warmup(self, most_patches: int, progress: Progress = lambda done, total: None) -> None:
        """Compiles the large programs side by side, then runs each once, on idle rows and pages that nothing reads.

        Args:
          most_patches: of the largest image that is going to be encoded.
          progress: told the programs done.
        """
        config, runtime = self.config, self.runtime
        side = runtime.config.vision_config.patch_size
        sizes = [size for size in IMAGE_PATCHES if size <= padded_patches(most_patches)]
        programs = lowering.engine_programs(
            runtime,
            rows=config.rows,
            pages=self._pool.page_count,
            table_width=config.table_width,
            chunks=(config.large, config.small),
            images=sizes,
            normalisation=self._normalisation,
        )
        lowering.compile_side_by_side(programs, progress)
        for patches in sizes:
            pixels = np.zeros((patches, runtime.config.vision_config.num_channels, side, side), np.uint8)
            jax.block_until_ready(self.encode(pixels, np.asarray([1, 2, patches // 2], np.int32)))
        dummy = np.zeros(1, np.int32)
        data = SequenceData(
            dummy, np.zeros((3, 1), np.int32), 0, np.zeros(2, int), np.zeros((0, 1)), SamplingParams(), {}
        )
        starts = {0, runtime.dense_below} if runtime.options.attention == "sparse" else {0}
        logits = None
        for size in (config.large, config.small):
            for start in starts:
                segment = Segment(dummy, data.positions, np.zeros(config.table_width, np.int32), None, start)
                logits, self._pool = runtime.read_chunk(
                    segment, self._pool, tokens=size, table_width=self.config.table_width
                )
        assert logits is not None, "there are two sizes of chunks"
        self._set_row(0, (), data, token=0, length=0)
        self._draw(logits, 0)
        self._state = runtime.set_pages(self._state, 0, dummy)
        self._state = runtime.clear_row(self._state, 0)
        if config.optimistic:
            self._pool = runtime.put_pages(self._pool, (0,), runtime.take_pages(self._pool, (0,)))
        self._state, self._pool = runtime.decode_and_sample(self._state, self._pool)
        jax.block_until_ready(runtime.drawn(self._state))

    def _restore(self, placed: Placed, data: SequenceData) -> None:
        saved = self._saved.pop(placed.id)
        held = len(jax.tree.leaves(saved)[0])
        self._pool = self.runtime.put_pages(self._pool, placed.pages[:held], saved)
        # All that it drew but the last token is in its pages.
        length = len(data.input_ids) + len(data.tokens) - 1
        self._set_row(placed.row, placed.pages, data, token=data.tokens[-1], length=length)

    def _set_row(self, row: int, pages: tuple[int, ...], data: SequenceData, *, token: int, length: int) -> None:
        self._state = self.runtime.set_row(
            self._state,
            row,
            token=token,
            length=length,
            position_delta=data.position_delta,
            pages=np.asarray(pages, np.int32),
            sampling=data.sampling,
            prompt=data.input_ids,
            answer=np.asarray(data.tokens, np.int32),
            bias=data.logit_bias,
        )

    def _draw(self, logits: jax.Array, row: int) -> None:
        """One row draws from logits, float32 `[1, vocab]`."""
        rows = np.arange(self.config.rows) == row
        wide = self.runtime.spread(logits, self.config.rows)
        self._state = self.runtime.draw(wide, self._state, self.runtime.put(rows))
