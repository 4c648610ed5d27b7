"""What each step of the engine does: which chunk it reads, which rows decode, who comes, goes, and where pages are.

`Scheduler.step` takes what happened since the last step and returns a `Plan`. The scheduler is pure host code: it has
no JAX, no clock and no threads. The same events give the same plans, so every host of a job can run its own, and a
recorded run can be replayed.

The life of a sequence:

    waiting -> reading -> running -> gone
                          |    ^
                          v    |
                         offloaded

- A waiting sequence has nothing. It gets its row and its pages when its first chunk is read.
- A reading sequence has a part of its prompt in its pages. A step reads one chunk of one sequence, or small
  ones of several.
- A running sequence draws one token a step.
- An offloaded one has its pages in host memory, because pages ran short (`optimistic`). It comes back before others
  are admitted, and is never read again.

One step is always queued ahead. So what a step drew is known when the next plan is out already, and an ended row draws
one token too many. Steps run in the order of their plans, and a plan idles rows before it gives their pages away.
Therefore no step writes into pages that its rows have lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from keye_jax.engine.pages import Block, BlockKey, PageManager, Program
from keye_jax.engine.plan import Arrival, Begin, Event, Measured, Placed, Plan, Read, Ready, SchedulerConfig, Stats
from keye_jax.errors import UserError
from keye_jax.page_allocator import pages_for

AGEING_STEPS = 16
"""Steps of waiting that count as much as one chunk less to read."""

RARE_GAP = 21
"""Decode steps between chunks that keep gaps with a chunk in them out of the 95th percentile."""

MOST_DECODES = 100
"""Most decode steps between chunks that a target gap may ask for, so that reading goes on."""

_SMOOTHING = 0.25
"""Weight of a new measurement."""


type _State = Literal["waiting", "reading", "running", "ended", "offloaded"]
"""Of a sequence. One that has ended is in its row until the next plan."""


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A sequence that has not gone.

    Attributes:
      arrived: the step in which it came.
      keys: those of its blocks in the prefix index.
      state: where it is in its life.
      ready, done: tokens of the prompt that can be read, and that are read or found.
      drawn: tokens of the answer.
      prefix, version: blocks that the index had, at that version of the index.
    """

    arrival: Arrival
    arrived: int
    keys: tuple[BlockKey, ...]
    state: _State = "waiting"
    ready: int = 0
    done: int = 0
    drawn: int = 0
    row: int = -1
    pages: tuple[int, ...] = ()
    prefix: tuple[Block, ...] = ()
    version: int = -1

    @property
    def id(self) -> str:
        return self.arrival.id

    @property
    def length(self) -> int:
        """Tokens that the pages hold when the prompt is read: all but the last one that was drawn."""
        return self.arrival.prompt_tokens + max(0, self.drawn - 1)

    @property
    def placed(self) -> Placed:
        return Placed(self.id, self.row, self.pages)


type _Placement = tuple[int, tuple[Block, ...]]
"""A home for a sequence, and the blocks that it reuses there."""


class Scheduler:
    """Decides what each step does.

    Attributes:
      config: what it decides by.
    """

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self._pages = PageManager(
            config.pages_per_shard, homes=config.homes, turns=config.turns, block_tokens=config.small
        )
        self._sequences: dict[str, _Sequence] = {}  # the oldest first
        self._rows: list[_Sequence | None] = [None] * config.rows
        self._step = 0
        self._chunks = self._decodes = 0  # since the last decode step, and since the last chunk
        self._seconds: dict[str, float] = {}
        self._prompt_tokens = self._cached_tokens = self._preemptions = 0

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Refuses what can never run.

        Raises:
          UserError: a number is below 1, or together they are too many tokens.
        """
        for name, value in (("prompt_tokens", prompt_tokens), ("max_tokens", max_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if prompt_tokens + max_tokens > self.config.most_tokens:
            raise UserError(
                f"max_tokens is {max_tokens} and the prompt has {prompt_tokens} tokens; "
                f"together they must be at most {self.config.most_tokens}"
            )

    def step(self, events: Sequence[Event] = ()) -> Plan:
        """The next step. If it is an empty plan, nothing can be done before there are events.

        Args:
          events: in the order in which they happened. Those about sequences that have gone are ignored.

        Raises:
          UserError: an arrival can never run; `check` tells it before.
        """
        clear = self._apply(events)
        offload, grow = self._grow()
        restore = () if offload else self._restore()
        reads, begin, cached = self._read()
        rows, ended = self._decode(reads=bool(reads))
        self._step += 1
        return Plan(clear, offload, restore, grow, reads, begin, rows, ended, cached)

    @property
    def stats(self) -> Stats:
        """Counts for metrics."""
        # Other threads may ask meanwhile; `tuple` takes all sequences at once.
        states = [sequence.state for sequence in tuple(self._sequences.values())]
        return Stats(
            waiting=states.count("waiting"),
            reading=states.count("reading"),
            running=states.count("running"),
            offloaded=states.count("offloaded"),
            pages=self._pages.page_count,
            free_pages=self._pages.free_pages,
            cached_pages=self._pages.cached_pages,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._preemptions,
        )

    # Coming and going.

    def _apply(self, events: Sequence[Event]) -> tuple[int, ...]:
        """Takes note of events, and of what the last step ended; returns rows that become idle."""
        gone = self._in_state("ended")
        for event in events:
            if isinstance(event, Arrival):
                self._arrive(event)
            elif isinstance(event, Measured):
                self._measure(event)
            elif sequence := self._sequences.get(event.id):
                if isinstance(event, Ready):
                    sequence.ready = event.tokens
                elif sequence not in gone:
                    gone.append(sequence)
        clear = []
        for sequence in gone:
            if sequence.state in ("running", "ended"):
                clear.append(sequence.row)
            self._leave_row(sequence)
            del self._sequences[sequence.id]
        return tuple(clear)

    def _arrive(self, arrival: Arrival) -> None:
        self.check(arrival.prompt_tokens, arrival.max_tokens)
        assert arrival.id not in self._sequences, "ids are unique"
        small, keys = self.config.small, []
        if self.config.prefix_cache:
            large = arrival.prompt_tokens // self.config.large * self.config.large
            for index, block_hash in enumerate(arrival.block_hashes[: arrival.prompt_tokens // small]):
                keys.append((block_hash, "large" if index * small < large else "small"))
        self._sequences[arrival.id] = _Sequence(arrival, self._step, tuple(keys))

    def _leave_row(self, sequence: _Sequence) -> None:
        """Takes the row and the pages of a sequence, if it has any, back."""
        if sequence.row >= 0:
            self._rows[sequence.row] = None
        self._pages.release(sequence.pages)
        sequence.row, sequence.pages = -1, ()

    def _in_state(self, *states: _State) -> list[_Sequence]:
        """Sequences in one of these states, the oldest first."""
        return [sequence for sequence in self._sequences.values() if sequence.state in states]

    # Rows and pages.

    def _home(self, sequence: _Sequence) -> int:
        return sequence.row * self.config.homes // self.config.rows

    def _free_row(self, home: int) -> int | None:
        each = self.config.rows // self.config.homes
        return next((row for row in range(home * each, (home + 1) * each) if self._rows[row] is None), None)

    def _reserve(self, sequence: _Sequence) -> int:
        """Pages that a sequence is to have now."""
        total = sequence.arrival.prompt_tokens + sequence.arrival.max_tokens
        if self.config.optimistic:
            total = min(total, sequence.length + self.config.small)
        return pages_for(total)

    def _placement(self, sequence: _Sequence) -> _Placement | None:
        """Where a sequence can be now; None if it has to wait for a row or pages."""
        homes = sorted(range(self.config.homes), key=lambda home: -self._pages.room(home))
        choices: list[_Placement] = [(home, ()) for home in homes]
        if sequence.prefix:
            choices.insert(0, (sequence.prefix[0].home, sequence.prefix))
        for home, prefix in choices:
            if self._free_row(home) is not None and self._pages.fits(self._reserve(sequence), home, prefix=prefix):
                return home, prefix
        return None

    def _place(self, sequence: _Sequence, home: int, prefix: tuple[Block, ...]) -> None:
        row = self._free_row(home)
        assert row is not None, "a placement has a row"
        sequence.pages = self._pages.allocate(self._reserve(sequence), home, prefix=prefix)
        sequence.row, self._rows[row] = row, sequence
        sequence.prefix = ()

    def _grow(self) -> tuple[tuple[Placed, ...], tuple[Placed, ...]]:
        """Gives running sequences pages for their next tokens; where pages are short, it offloads the youngest."""
        offload, grow = [], []
        for sequence in self._in_state("running"):
            if sequence.state != "running" or pages_for(sequence.length + 1) <= len(sequence.pages):
                continue
            home, first, wanted = self._home(sequence), len(sequence.pages), self._reserve(sequence)
            while sequence.state == "running" and not self._pages.fits(wanted, home, first=first):
                youngest = [each for each in self._in_state("running") if self._home(each) == home][-1]
                offload.append(Placed(youngest.id, youngest.row, youngest.pages[: pages_for(youngest.length)]))
                self._leave_row(youngest)
                youngest.state = "offloaded"
            if sequence.state == "running":
                sequence.pages += self._pages.allocate(wanted, home, first=first)
                grow.append(sequence.placed)
        self._preemptions += len(offload)
        return tuple(offload), tuple(grow)

    def _restore(self) -> tuple[Placed, ...]:
        """Brings offloaded sequences back, the oldest first."""
        restore = []
        for sequence in self._in_state("offloaded"):
            placement = self._placement(sequence)
            if placement is None:
                break
            self._place(sequence, *placement)
            sequence.state = "running"
            restore.append(sequence.placed)
        return tuple(restore)

    # Reading.

    def _read(self) -> tuple[tuple[Read, ...], tuple[Begin, ...], tuple[tuple[str, int], ...]]:
        """Reads a chunk of the prompt whose turn it is, or small ones in the order of turns, and admits new prompts."""
        reads, begin, cached = [], [], []
        running = bool(self._in_state("running"))
        while not reads or (reads[0].program == "small" and len(reads) < self.config.prompts_together):
            choice = self._choose()
            if choice is None:
                break
            sequence, start, placement = choice
            prompt = sequence.arrival.prompt_tokens
            program, count = self.config.next_chunk(prompt, start)
            if (reads and program != "small") or (not reads and running and not self._may_read(program)):
                break
            if placement:
                self._place(sequence, *placement)
                sequence.state = "reading"
                cached.append((sequence.id, start))
                self._prompt_tokens += prompt
                self._cached_tokens += start
            sequence.done = start + count
            # Pages are written before any are read: so chunks of the same step may use this one.
            self._index(sequence, start)
            last = sequence.done == prompt
            reads.append(Read(sequence.id, program, start, count, sequence.pages, last))
            if last:
                sequence.state, sequence.drawn = "running", 1
                begin.append(Begin(*sequence.placed, prompt))
        if reads:
            self._chunks, self._decodes = self._chunks + 1, 0
        return tuple(reads), tuple(begin), tuple(cached)

    def _choose(self) -> tuple[_Sequence, int, _Placement | None] | None:
        """The prompt to read next, from where, and its place if it has none yet.

        A prompt's turn comes later by `AGEING_STEPS` for each of its chunks. So short ones overtake, but not for ever.
        One without a place is passed over until the step of its turn; from then on no later one is admitted.
        """
        admits = None in self._rows and not self._in_state("offloaded")
        prompts = self._in_state("reading", "waiting") if admits else self._in_state("reading")
        for sequence in prompts:
            if sequence.state == "waiting":
                self._match(sequence)
        for turn, sequence in sorted(((self._turn(each), each) for each in prompts), key=lambda pair: pair[0]):
            start, placement, waiting = sequence.done, None, sequence.state == "waiting"
            if waiting and admits:
                placement = self._placement(sequence)
                start = len(placement[1]) * self.config.small if placement else 0
            _, count = self.config.next_chunk(sequence.arrival.prompt_tokens, start)
            if start + count > sequence.ready:
                continue
            if placement or not waiting:
                return sequence, start, placement
            admits = admits and turn > self._step
        return None

    def _index(self, sequence: _Sequence, start: int) -> None:
        """Puts the blocks from token `start` on that are read into the prefix index: later steps may reuse them."""
        each = self._pages.block_pages
        blocks = range(start // self.config.small, sequence.done // self.config.small)
        for index, key in enumerate(sequence.keys[: blocks.stop]):
            if index >= blocks.start:
                self._pages.add(key, self._home(sequence), sequence.pages[index * each : (index + 1) * each])

    def _match(self, sequence: _Sequence) -> None:
        """Looks the prompt up in the prefix index, if that has changed."""
        if sequence.version == self._pages.version:
            return
        config, prompt = self.config, sequence.arrival.prompt_tokens
        # At least one token is read, for its logits.
        prefix = self._pages.match(sequence.keys[: (prompt - 1) // config.small])
        tokens = len(prefix) * config.small
        if tokens < prompt // config.large * config.large:
            # A large chunk is read as a whole.
            prefix = prefix[: tokens // config.large * config.large // config.small]
        sequence.prefix, sequence.version = prefix, self._pages.version

    def _turn(self, sequence: _Sequence) -> int:
        """The step at which it is a prompt's turn."""
        done = sequence.done or len(sequence.prefix) * self.config.small
        return sequence.arrived + AGEING_STEPS * self.config.chunks_left(sequence.arrival.prompt_tokens, done)

    # Reading and decoding in turns.

    def _may_read(self, program: Program) -> bool:
        """Whether a chunk may be read while sequences run."""
        return 0 < self._chunks < self.config.chunks_between or self._decodes >= self._decodes_between(program)

    def _decode(self, *, reads: bool) -> tuple[tuple[tuple[int, str], ...], tuple[str, ...]]:
        """Draws a token for each running row, unless more chunks may come before; says whose token is the last one."""
        decodes = not reads or self._chunks >= self.config.chunks_between
        rows, ended = [], []
        for row, sequence in enumerate(self._rows):
            if sequence is None or sequence.state != "running":
                continue
            if decodes and sequence.drawn < sequence.arrival.max_tokens:
                sequence.drawn += 1
                rows.append((row, sequence.id))
            if sequence.drawn == sequence.arrival.max_tokens:
                sequence.state = "ended"
                ended.append(sequence.id)
        if rows:
            self._chunks, self._decodes = 0, self._decodes + 1
        return tuple(rows), tuple(ended)

    def _measure(self, event: Measured) -> None:
        name, seconds = event.program or "decode", event.seconds
        if event.program and event.decode:
            # The chunk took what the step took longer than steps that only decode.
            seconds -= self._seconds.get("decode", 0.0)
        before = self._seconds.get(name, seconds)
        self._seconds[name] = before + _SMOOTHING * (max(0.0, seconds) - before)

    def _decodes_between(self, program: Program) -> int:
        """Decode steps between chunks of this program: the setting, or what the target gap needs."""
        least, target = self.config.decodes_between, self.config.target_gap_ms
        if target is None or program not in self._seconds or "decode" not in self._seconds:
            return least
        reading, spare = self.config.chunks_between * self._seconds[program], target / 1e3 - self._seconds["decode"]
        if reading <= spare:
            return least
        mean = math.ceil(reading / spare) if reading < spare * MOST_DECODES else MOST_DECODES
        return max(least, RARE_GAP, mean)
