"""Does on the devices what the scheduler plans: it owns the pages and the decoded batch.

A step is queued before the tokens of the last one are looked at, so the devices never wait for the host. Where what a
row may draw depends on these tokens, the forward pass is queued before and the draw after they are looked at. All
programs have shapes that the settings decide, none of them a request; `warmup` compiles them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from keye_jax.engine.compilation import engine_programs, image_sizes
from keye_jax.engine.constraint import Constraint
from keye_jax.engine.plan import PROGRAMS, Placed, Plan, Program, Read, SchedulerConfig
from keye_jax.kv_cache import PagePool
from keye_jax.page_allocator import PAGE_SIZE
from keye_jax.progress import Progress
from keye_jax.runtime import lowering
from keye_jax.runtime.encode import images_at_once
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
      constraint: what it may draw; None for everything.
      selection_heat: whether it is counted what it selects.
      tokens: those that it has drawn, as far as the host knows them.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    position_delta: int
    pads_before: np.ndarray
    embeds: np.ndarray
    sampling: SamplingParams
    logit_bias: Mapping[int, float]
    constraint: Constraint | None = None
    selection_heat: bool = False
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
        """Adds what the sequences of some rows of `drawn`, `(row, id)`, drew."""
        self._parts.append((rows, drawn))
        drawn.copy_to_host_async()

    def fetch(self) -> list[DrawnToken]:
        """The tokens that were not fetched before, those of one sequence in the order in which it drew them."""
        found: list[DrawnToken] = []
        parts, self._parts = self._parts, []
        for rows, drawn in parts:
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
      heat: whether it is counted what sequences select.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: SchedulerConfig,
        *,
        pixel_scale: np.ndarray,
        pixel_shift: np.ndarray,
        heat: bool = False,
    ):
        self.runtime, self.config = runtime, config
        self._normalisation = runtime.pixel_normalisation(pixel_scale, pixel_shift)
        self._pool = runtime.new_pool(config.pages_per_shard * config.homes * config.turns)
        self._state = runtime.new_state(config.rows, config.table_width, heat=heat)
        self._saved: dict[str, PagePool] = {}
        # Of rows that may not draw everything: by what, and what the devices know of it.
        self._constraints: dict[int, Constraint] = {}
        self._allowed: dict[int, np.ndarray] = {}
        # By row the sequence whose heat is counted there, and the heat of those that are in no row.
        self._heated: dict[int, str] = {}
        self._heats: dict[str, jax.Array] = {}

    def run(
        self, plan: Plan, sequence: Callable[[str], SequenceData], look: Callable[[DrawnTokens], None]
    ) -> DrawnTokens:
        """Queues a step.

        Args:
          sequence: what is known of a sequence that the plan names.
          look: called if what a row may draw depends on tokens that nobody has looked at: those of the step before, and
            those that this one has drawn so far, which it is given. The forward pass is queued by then.
        """
        runtime, drawn = self.runtime, DrawnTokens()
        for placed in plan.offload:
            self._saved[placed.id] = runtime.take_pages(self._pool, placed.pages)
        self._leave_rows((*plan.clear, *(placed.row for placed in plan.offload)))
        for placed in plan.restore:
            self._restore(placed, sequence(placed.id))
        for placed in plan.grow:
            self._state = runtime.set_pages(self._state, placed.row, np.asarray(placed.pages, np.int32))
        if plan.program is not None:
            segments = [_segment(read, sequence(read.id)) for read in plan.reads]
            logits = self._read(plan.program, segments)
            lasts = [place for place, read in enumerate(plan.reads) if read.last]
            for place, begin in zip(lasts, plan.begin, strict=True):
                # The draw counts the prompt's last token as read.
                values = self._row_values(Placed(*begin[:3]), sequence(begin.id), length=begin.prompt_tokens - 1)
                self._state, first = runtime.begin_row(logits, place, self._state, begin.row, **values)
                drawn.add(((0, begin.id),), first)
        if plan.decode:
            constraints = {row: self._constraints[row] for row, _ in plan.rows if row in self._constraints}
            if any(each.active or each.allowed is not self._allowed[row] for row, each in constraints.items()):
                logits, self._state, self._pool = runtime.decode(self._state, self._pool)
                look(drawn)
                self._allow({row: each.allowed for row, each in constraints.items()})
                self._state = runtime.draw(logits, self._state)
            else:
                self._state, self._pool = runtime.decode_and_sample(self._state, self._pool)
            drawn.add(plan.rows, runtime.drawn(self._state))
        return drawn

    def _read(self, program: Program, segments: Sequence[Segment]) -> jax.Array:
        """Reads chunks with one of the two programs; returns their logits, float32 `[s, vocab]`."""
        tokens, sequences = self.config.chunk_shape(program)
        logits, self._pool = self.runtime.read_chunk(
            segments, self._pool, tokens=tokens, sequences=sequences, table_width=self.config.table_width
        )
        return logits

    def _allow(self, masks: dict[int, np.ndarray]) -> None:
        """Says what rows may draw, unless the devices know."""
        changed = {row: mask for row, mask in masks.items() if mask is not self._allowed[row]}
        if changed:
            self._state = self.runtime.set_allowed(self._state, changed)
            self._allowed |= changed

    def heat(self, name: str) -> np.ndarray | None:
        """How often a sequence has selected each position, int32 `[h]`; None as long as it is in its row.

        Before it has begun it has selected nothing.
        """
        if name in self._heated.values():
            return None
        found = self._heats.get(name)
        return np.zeros(self.config.table_width * PAGE_SIZE, np.int32) if found is None else np.asarray(found)

    def forget(self, name: str) -> None:
        """Drops what is kept of a sequence outside of its row."""
        self._saved.pop(name, None)
        self._heats.pop(name, None)
        self._heated = {row: each for row, each in self._heated.items() if each != name}

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
        sizes = image_sizes(most_patches)
        programs = engine_programs(runtime, config, self._normalisation, images=sizes, heat=self._counts_heat)
        lowering.compile_side_by_side(programs, progress)
        for patches in sizes:
            pixels = np.zeros((patches, runtime.config.vision_config.num_channels, side, side), np.uint8)
            jax.block_until_ready(self.encode(pixels, np.asarray([1, 2, patches // 2], np.int32)))
        dummy = np.zeros(1, np.int32)
        data = SequenceData(
            dummy, np.zeros((3, 1), np.int32), 0, np.zeros(2, int), np.zeros((0, 1)), SamplingParams(), {}
        )
        starts = {0, runtime.dense_below} if runtime.options.attention == "sparse" else {0}
        values = self._row_values(Placed("", 0, ()), data, length=0)
        self._state = runtime.set_row(self._state, 0, **values)
        for program in PROGRAMS:
            for start in starts:
                segment = Segment(dummy, data.positions, np.zeros(config.table_width, np.int32), None, start)
                logits = self._read(program, [segment])
                self._state, _ = runtime.begin_row(logits, 0, self._state, 0, **values)
        self._state = runtime.set_pages(self._state, 0, dummy)
        everything = np.full(self._state.sampling.allowed.shape[1], 0xFFFFFFFF, np.uint32)
        read, self._state, self._pool = runtime.decode(self._state, self._pool)
        self._state = runtime.draw(read, runtime.set_allowed(self._state, {0: everything}))
        if self._counts_heat:
            runtime.heat(self._state, 0)
        self._leave_rows((0,))
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
        self._state = self.runtime.set_row(self._state, placed.row, **self._row_values(placed, data, length=length))

    def _row_values(self, placed: Placed, data: SequenceData, *, length: int) -> dict[str, Any]:
        """What `set_row` takes of a sequence that comes into its row, with the last token that it has."""
        allowed = None
        if data.constraint is not None:
            self._constraints[placed.row] = data.constraint
            allowed = self._allowed[placed.row] = data.constraint.allowed
        if data.selection_heat:
            self._heated[placed.row] = placed.id
        heat = self._heats.pop(placed.id, None)
        return {
            "token": data.tokens[-1] if data.tokens else int(data.input_ids[-1]),
            "length": length,
            "position_delta": data.position_delta,
            "pages": np.asarray(placed.pages, np.int32),
            "allowed": allowed,
            "heat": None if heat is None else np.asarray(heat),
            "sampling": data.sampling,
            "prompt": data.input_ids,
            "answer": np.asarray(data.tokens, np.int32),
            "bias": data.logit_bias,
        }

    def _leave_rows(self, rows: Sequence[int]) -> None:
        """Makes rows idle, and keeps their heat if their sequences want it."""
        if not rows:
            return
        for row in rows:
            self._constraints.pop(row, None)
            name = self._heated.pop(row, None)
            if name is not None:
                self._heats[name] = self.runtime.heat(self._state, row)
                self._heats[name].copy_to_host_async()
        self._state = self.runtime.clear_rows(self._state, rows)

    @property
    def _counts_heat(self) -> bool:
        return self._state.heat.shape[1] > 0


def _segment(read: Read, data: SequenceData) -> Segment:
    """The tokens of a chunk."""
    tokens = slice(read.start, read.start + read.count)
    pads = slice(data.pads_before[tokens.start], data.pads_before[tokens.stop])
    return Segment(
        data.input_ids[tokens],
        data.positions[:, tokens],
        np.asarray(read.pages, np.int32),
        data.embeds[pads],
        read.start,
    )
