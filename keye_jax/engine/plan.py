"""What goes into the scheduler and what comes out: its settings, events, plans and counts."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from keye_jax.engine.pages import Program
from keye_jax.errors import UserError
from keye_jax.page_allocator import PAGE_SIZE, pages_for

PROGRAMS: tuple[Program, ...] = ("large", "small")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What a scheduler decides by.

    Attributes:
      rows: width of the decoded batch, a multiple of `homes`. Row i is for a sequence of home `i // (rows / homes)`.
      pages_per_shard: pages on each shard of the pool.
      max_context: most tokens of a sequence, prompt and answer.
      homes, turns: the shards of the pool, as in `PageAllocator`.
      large, small: tokens that the two programs read at once. A prompt is read in large chunks as far as they are full,
        then in small ones. A small chunk is also a block of the prefix index. `small` is a multiple of `PAGE_SIZE`,
        `large` one of `small`.
      prompts_together: most small chunks that one step reads, at most `large / small`. All small chunks are read by the
        program for so many, whether there are others or not.
      chunks_between: most steps that read between two decode steps while sequences run (K).
      decodes_between: least decode steps between two runs of chunks while sequences run (D).
      target_gap_ms: milliseconds between two tokens of an answer, which neither their mean nor 19 in 20 of them are to
        exceed. It raises D by what steps were measured to take. None leaves D as it is.
      optimistic: whether a sequence is admitted with pages for its prompt and one block, not for all of `max_tokens`.
        If pages run short, the youngest running sequence is offloaded.
      prefix_cache: whether prefixes are reused.
    """

    rows: int
    pages_per_shard: int
    max_context: int
    homes: int = 1
    turns: int = 1
    large: int = 8192
    small: int = 512
    prompts_together: int = 1
    chunks_between: int = 1
    decodes_between: int = 1
    target_gap_ms: float | None = None
    optimistic: bool = False
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        counts = ("homes", "turns", "rows", "pages_per_shard", "max_context", "chunks_between", "decodes_between")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, unit in (("rows", self.homes), ("small", PAGE_SIZE), ("large", self.small)):
            value = getattr(self, name)
            if value < 1 or value % unit:
                raise UserError(f"{name} is {value}; it must be a positive multiple of {unit}")
        most = self.large // self.small
        if not 1 <= self.prompts_together <= most:
            raise UserError(f"prompts_together is {self.prompts_together}; it must be from 1 to {most}, large / small")
        if self.target_gap_ms is not None and not self.target_gap_ms > 0:
            raise UserError(f"target_gap_ms is {self.target_gap_ms}; it must be above 0")

    @property
    def most_tokens(self) -> int:
        """Most tokens of a sequence that can ever run: those that positions and one home's pages allow."""
        return min(self.max_context, self.pages_per_shard * self.turns * PAGE_SIZE)

    @property
    def table_width(self) -> int:
        """Columns of page tables: pages of the longest sequence, the same number on each shard that holds it."""
        return -(-pages_for(self.most_tokens) // self.turns) * self.turns

    def chunk_shape(self, program: Program) -> tuple[int, int]:
        """Tokens of a chunk that a program reads, and how many chunks it reads together."""
        return (self.large, 1) if program == "large" else (self.small, self.prompts_together)

    def next_chunk(self, prompt_tokens: int, done: int) -> tuple[Program, int]:
        """The chunk that is read after `done` tokens of a prompt: its program, and how many tokens it has.

        It follows from the length of the prompt alone. So a prompt's pages have the same bits whatever was reused.
        """
        if done + self.large <= prompt_tokens:
            return "large", self.large
        return "small", min(self.small, prompt_tokens - done)

    def chunks_left(self, prompt_tokens: int, done: int) -> int:
        """Chunks that are left to read after `done` tokens of a prompt."""
        large, rest = divmod(prompt_tokens - done, self.large)
        return large + math.ceil(rest / self.small)


# Events.


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A new sequence. A request with n choices is n sequences, with the same hashes.

    Attributes:
      id: its name, unlike that of any other that has not gone.
      prompt_tokens, max_tokens: what `Scheduler.check` has allowed.
      block_hashes: one for each whole block of `small` tokens. It stands for all tokens up to the block's end.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    block_hashes: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ready:
    """The first `tokens` tokens of a prompt can be read: the embeddings of their media are there."""

    id: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class Cancel:
    """Nobody wants a sequence any more."""

    id: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """A sequence drew an end token or finished a stop text."""

    id: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The media of a sequence are broken."""

    id: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """How long a step took.

    Attributes:
      seconds: of the whole step.
      program: what read its chunk; None if it read none.
      decode: whether it decoded.
    """

    seconds: float
    program: Program | None
    decode: bool


type Event = Arrival | Ready | Cancel | Ended | Failed | Measured


# Plans.


class Placed(NamedTuple):
    """A sequence with its row and its pages, in order."""

    id: str
    row: int
    pages: tuple[int, ...]


class Begin(NamedTuple):
    """A sequence whose prompt is read: `Placed`, and how many tokens its pages hold."""

    id: str
    row: int
    pages: tuple[int, ...]
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Read:
    """A chunk of a prompt.

    Attributes:
      id: the sequence.
      program: what reads it.
      start, count: its tokens.
      pages: those of the whole sequence.
      last: whether the prompt ends with it. Its logits are those of the first token of the answer.
    """

    id: str
    program: Program
    start: int
    count: int
    pages: tuple[int, ...]
    last: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step does, in this order.

    Attributes:
      clear: rows that become idle.
      offload: sequences whose state and pages go to host memory; their rows become idle. The pages are those that
        hold tokens.
      restore: sequences that come back. The first of the pages, as many as were offloaded, are to be filled.
      grow: running sequences that have more pages than before.
      reads: chunks to read together: one, or small ones. A later one may need what earlier ones write.
      begin: the sequences whose last chunks are in `reads`, in that order. Each draws its first token from its chunk's
        logits, and takes its row.
      rows: `(row, id)` of those that decode, each of which draws one token; if there are none, the step decodes
        nothing. What other active rows draw, such as one that begins and wanted one token, does not count.
      ended: sequences that draw their last token, the one of number `max_tokens`, in this step.
      cached: sequences that were admitted, and how many tokens of their prompts the prefix index had.
    """

    clear: tuple[int, ...] = ()
    offload: tuple[Placed, ...] = ()
    restore: tuple[Placed, ...] = ()
    grow: tuple[Placed, ...] = ()
    reads: tuple[Read, ...] = ()
    begin: tuple[Begin, ...] = ()
    rows: tuple[tuple[int, str], ...] = ()
    ended: tuple[str, ...] = ()
    cached: tuple[tuple[str, int], ...] = ()

    @property
    def program(self) -> Program | None:
        """What reads the chunks; None if there are none."""
        return self.reads[0].program if self.reads else None

    @property
    def decode(self) -> bool:
        """Whether the step decodes."""
        return bool(self.rows)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts for metrics.

    Attributes:
      waiting, reading, running, offloaded: sequences.
      pages, free_pages, cached_pages: of the pool, those that hold nothing, and those that hold prefixes without a
        sequence. The others are held by sequences.
      prompt_tokens, cached_tokens: of all prompts that were admitted, and those that the prefix index had.
      preemptions: how often a sequence was offloaded.
    """

    waiting: int
    reading: int
    running: int
    offloaded: int
    pages: int
    free_pages: int
    cached_pages: int
    prompt_tokens: int
    cached_tokens: int
    preemptions: int
