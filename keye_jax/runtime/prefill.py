"""Packing the new tokens of several sequences into chunks, on the host.

A chunk is an array of rows, each a run of neighbouring tokens of one sequence. One long prompt on one device is a
single row. Short prompts share a chunk, in rows of `ROW_TOKENS`; over several devices rows are dealt out in turns, so
that later ones, which see more keys, are on all devices alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import BatchMetadata
from keye_jax.sharding.step import StepSharding

ROW_TOKENS = 128
"""Tokens of a row where several sequences share a chunk."""

SHARDED_ROW_TOKENS = 256
"""Most tokens of a row where rows are dealt out over devices: a multiple of what kernels take together."""

_MIN_SHARDED_ROW_TOKENS = 16

_GATHERED_TOKENS = 2**19
"""Most tokens of context that a layer gathers for one chunk, of all its sequences."""


def round_up(size: int) -> int:
    """`size` rounded up by at most an eighth (to 64 at least), so that similar sizes share a compiled step."""
    unit = max(64, 1 << max(0, size.bit_length() - 4))
    return -(-size // unit) * unit


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """New tokens of one sequence, at `start` and on.

    Attributes:
      input_ids: int32 `[t]`.
      positions: int32 `[3, t]`.
      pages: int32 `[m]`, the pages of the whole sequence, with room for the new tokens.
      vision_embeds: `[v, embed]`, in the order of the segment's pads: images first, then frames; None for none.
      start: tokens of the sequence that its pages hold already.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    pages: np.ndarray
    vision_embeds: jax.Array | np.ndarray | None = None
    start: int = 0

    def part(self, first: int, end: int) -> Segment:
        """Its tokens `first` to `end - 1`, with all embeddings."""
        tokens, positions = self.input_ids[first:end], self.positions[:, first:end]
        return dataclasses.replace(self, input_ids=tokens, positions=positions, start=self.start + first)


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """What one step of prefill reads, as host arrays of b rows of t tokens.

    Attributes:
      ids: int32 `[b, t]`.
      token: int32 `[b, t]`, the place of each in its segment.
      positions: int32 `[3, b, t]`.
      batch: of NumPy arrays.
      segments: the segment that each of the step's s sequences is; -1 behind the last one.
      last: int32 `[s]`, each segment's last token in this chunk, counted row by row.
      done: tokens of each segment in `segments` that are read after this chunk.
      dense: whether its tokens attend to all keys that they see.
    """

    ids: np.ndarray
    token: np.ndarray
    positions: np.ndarray
    batch: BatchMetadata
    segments: np.ndarray
    last: np.ndarray
    done: tuple[int, ...]
    dense: bool

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each token that there is, in the order of one segment's tokens."""
        rows, columns = np.nonzero(np.arange(self.ids.shape[1]) < self.batch.count[:, None])
        order = np.argsort(self.token[rows, columns])
        return rows[order], columns[order]

    def lay_out(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Values int32 `[t]` of each segment's tokens, where the tokens stand in the chunk, `[b, t]`; -1 elsewhere."""
        there = np.full(self.ids.shape, -1, np.int32)
        sequence = self.batch.sequence if self.batch.sequence is not None else np.zeros(1, np.int32)
        for row, (member, count) in enumerate(zip(sequence, self.batch.count, strict=True)):
            there[row, :count] = values[int(self.segments[member])][self.token[row, :count]]
        return there

    def pack(self, vision_rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """What the devices have to know of it, in two arrays: each transfer takes a host tens of microseconds.

        Args:
          vision_rows: of each segment int32 `[t]`, as `vision_rows` below returns them.

        Returns:
          int32 `[5, b, t]`, ids, rows of vision embeddings, and positions; and int32 `[n]` for `unpack_others`.
        """
        tokens = np.concatenate([self.ids[None], self.lay_out(vision_rows)[None], self.positions])
        sequence = np.zeros_like(self.batch.start) if self.batch.sequence is None else self.batch.sequence
        parts = self.batch.start, self.batch.count, self.last, sequence, np.ravel(self.batch.page_table)
        return tokens, np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class ChunkShape:
    """The shapes of a step of prefill: they decide its program.

    Attributes:
      rows, tokens: b and t.
      sequences: most sequences in it, s.
      table_width: columns of the page table, m.
      dense: as in `Chunk`.
    """

    rows: int
    tokens: int
    sequences: int
    table_width: int
    dense: bool = False


type _Span = tuple[int, int, int]
"""`(segment, first, end)`: tokens `first` to `end - 1` of a segment."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbouring tokens of a segment that go into one row."""

    segment: int
    first: int
    count: int


def chunk_tokens(total: int, prefill_chunk: int, step: StepSharding) -> int:
    """Tokens that a step reads of a prompt of `total` tokens, by itself."""
    devices = step.size(step.query_sequence)
    if devices == 1:
        return 1 if total == 1 else min(prefill_chunk, round_up(total))
    multiple = devices * _MIN_SHARDED_ROW_TOKENS
    return -(-min(prefill_chunk * devices, round_up(total)) // multiple) * multiple


def single_shape(total: int, table_width: int, prefill_chunk: int, step: StepSharding) -> ChunkShape:
    """The shape of the steps that read one prompt of `total` tokens by itself."""
    tokens, shared, homes = (
        chunk_tokens(total, prefill_chunk, step),
        step.size(step.query_sequence),
        step.size(step.batch),
    )
    row = tokens if shared == 1 else int(np.gcd(tokens // shared, SHARDED_ROW_TOKENS))
    return ChunkShape(tokens // row * homes, row, 1, table_width)


def packed_shape(table_width: int, prefill_chunk: int, step: StepSharding) -> ChunkShape:
    """The shape of the steps in which several prompts share a chunk."""
    shared, homes = step.size(step.query_sequence), step.size(step.batch)
    row = min(ROW_TOKENS, round_up(prefill_chunk))
    rows = max(1, prefill_chunk // row) * shared * homes
    sequences = rows
    if step.gathers_pages:
        sequences = max(1, min(rows, _GATHERED_TOKENS // (table_width * 64)))
    return ChunkShape(rows, row, sequences, table_width)


def plan_chunks(
    segments: Sequence[Segment], prefill_chunk: int, step: StepSharding, pool_pages: int, *, dense_below: int = 0
) -> Iterator[Chunk]:
    """Chunks that read all segments, each segment's tokens in their order.

    A segment that is alone, or fills whole chunks, is read by itself; what is left of several shares chunks.

    Args:
      prefill_chunk: tokens that each device reads in one step.
      pool_pages: of the whole pool. They say at home on which shard along `batch` a segment's pages are.
      dense_below: tokens at positions below it attend to all keys that they see, in chunks of their own.
    """
    width = max(len(segment.pages) for segment in segments)
    width += -width % step.size(step.cache_sequence)
    for dense in (True, False):
        spans = []
        for index, segment in enumerate(segments):
            cut = int(np.clip(dense_below - segment.start, 0, len(segment.input_ids)))
            first, end = (0, cut) if dense else (cut, len(segment.input_ids))
            if end > first:
                spans.append((index, first, end))
        shared = []
        for index, first, end in spans:
            shape = dataclasses.replace(single_shape(end - first, width, prefill_chunk, step), dense=dense)
            whole = prefill_chunk * step.size(step.query_sequence)
            alone = end if len(spans) == 1 else first + (end - first) // whole * whole
            if alone > first:
                yield from _chunks([(index, first, alone)], segments, shape, step, pool_pages)
            if end > alone:
                shared.append((index, alone, end))
        if shared:
            shape = dataclasses.replace(packed_shape(width, prefill_chunk, step), dense=dense)
            yield from _chunks(shared, segments, shape, step, pool_pages)


def fixed_shape(tokens: int, sequences: int, table_width: int, step: StepSharding) -> ChunkShape:
    """The shape of a step that reads at most `tokens` tokens of each of at most so many sequences.

    On several devices together it reads one sequence.
    """
    if sequences == 1:
        return single_shape(tokens, table_width, tokens, step)
    assert step.size(step.query_sequence) * step.size(step.batch) == 1, "several sequences are read on one device"
    return ChunkShape(sequences, tokens, sequences, table_width)


def plan_chunk(segments: Sequence[Segment], shape: ChunkShape, step: StepSharding, pool_pages: int) -> Chunk:
    """One chunk of a shape of `fixed_shape` that reads all of some segments.

    Args:
      pool_pages: as for `plan_chunks`.
    """
    spans = [(index, 0, len(segment.input_ids)) for index, segment in enumerate(segments)]
    (chunk,) = _chunks(spans, segments, shape, step, pool_pages)
    return chunk


def unpack_others(
    others: jax.Array, rows: int, sequences: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Start, count, last, sequence and page table from what `Chunk.pack` returned second.

    Args:
      rows, sequences: b and s.
    """
    start, count, last, sequence, table = jnp.split(others, np.cumsum([rows, rows, sequences, rows]))
    return start, count, last, sequence, table.reshape(sequences, -1)


def _chunks(
    spans: Sequence[_Span], segments: Sequence[Segment], shape: ChunkShape, step: StepSharding, pool_pages: int
) -> Iterator[Chunk]:
    return (_fill(runs, segments, shape, step) for runs in _deal(spans, segments, shape, step, pool_pages))


def _deal(
    spans: Sequence[_Span], segments: Sequence[Segment], shape: ChunkShape, step: StepSharding, pool_pages: int
) -> Iterator[list[list[_Run]]]:
    """Runs of each chunk: lists of those on each home, each home's in the order of its segments' tokens."""
    homes = step.size(step.batch)
    room = shape.rows // homes
    waiting: list[list[_Run]] = [[] for _ in range(homes)]
    for index, first, end in spans:
        runs = [_Run(index, at, min(shape.tokens, end - at)) for at in range(first, end, shape.tokens)]
        waiting[_home(int(segments[index].pages[0]), pool_pages, step)] += runs
    while any(waiting):
        chunk: list[list[_Run]] = [[] for _ in range(homes)]
        members: set[int] = set()
        for home, runs in enumerate(waiting):
            while runs and len(chunk[home]) < room and len(members | {runs[0].segment}) <= shape.sequences:
                members.add(runs[0].segment)
                chunk[home].append(runs.pop(0))
        yield chunk


def _home(page: int, pool_pages: int, step: StepSharding) -> int:
    """The number along `step.batch` of the shard that a page is on."""
    shard, number, stride = page * step.size(step.home) // pool_pages, 0, 1
    for axis in reversed(step.home):
        shard, coordinate = divmod(shard, step.size((axis,)))
        if axis in step.batch:
            number, stride = number + coordinate * stride, stride * step.size((axis,))
    return number


def _fill(chunk: list[list[_Run]], segments: Sequence[Segment], shape: ChunkShape, step: StepSharding) -> Chunk:
    shared, homes = step.size(step.query_sequence), step.size(step.batch)
    room = shape.rows // homes
    ids = np.zeros((shape.rows, shape.tokens), np.int32)
    token = np.zeros_like(ids)
    positions = np.zeros((3, shape.rows, shape.tokens), np.int32)
    start, count, sequence = (np.zeros(shape.rows, np.int32) for _ in range(3))
    table = np.zeros((shape.sequences, shape.table_width), np.int32)
    last = np.zeros(shape.sequences, np.int32)
    members: dict[int, int] = {}
    done: dict[int, int] = {}
    for home, runs in enumerate(chunk):
        for number, run in enumerate(runs):
            segment = segments[run.segment]
            # Device r of n has rows r, r + n, r + 2 n and so on, which lie one after the other in the array.
            row = home * room + (number % shared) * (room // shared) + number // shared
            tokens = slice(run.first, run.first + run.count)
            ids[row, : run.count] = segment.input_ids[tokens]
            token[row, : run.count] = np.arange(run.first, run.first + run.count)
            positions[:, row, : run.count] = segment.positions[:, tokens]
            start[row], count[row] = segment.start + run.first, run.count
            sequence[row] = member = members.setdefault(run.segment, len(members))
            table[member, : len(segment.pages)] = segment.pages
            last[member] = row * shape.tokens + run.count - 1
            done[run.segment] = run.first + run.count
    named = np.full(shape.sequences, -1, np.int32)
    named[: len(members)] = list(members)
    arrays: dict[str, Any] = {"page_table": table, "start": start, "count": count}
    if shape.rows > 1:
        arrays["sequence"] = sequence
    batch = BatchMetadata(**arrays)
    return Chunk(ids, token, positions, batch, named, last, tuple(done[each] for each in members), shape.dense)


def pad_rows(segments: Sequence[Segment], config: KeyeConfig) -> list[np.ndarray]:
    """As `vision_rows`, of embeddings that are in the order of the pads."""
    rows, before = [], 0
    for segment in segments:
        pads = np.isin(segment.input_ids, (config.image_token_id, config.video_token_id))
        rows.append(np.where(pads, before + np.cumsum(pads) - 1, -1).astype(np.int32))
        before += np.count_nonzero(pads)
    return rows


def vision_rows(segments: Sequence[Segment], config: KeyeConfig) -> tuple[list[np.ndarray], int]:
    """Where the embedding of each pad is, among those of all segments one after the other.

    Returns:
      of each segment int32 `[t]`, the row of each token's embedding, -1 for text; and how many embeddings there are.

    Raises:
      ValueError: a segment has more or fewer embeddings than pads.
    """
    rows, before = [], 0
    for segment in segments:
        images, frames = (segment.input_ids == token for token in (config.image_token_id, config.video_token_id))
        count, image_count = int(np.count_nonzero(images | frames)), np.count_nonzero(images)
        given = 0 if segment.vision_embeds is None else len(segment.vision_embeds)
        if given != count:
            raise ValueError(f"{given} vision embeddings for {count} pads")
        row = np.full(len(segment.input_ids), -1, np.int32)
        row[images] = before + np.arange(image_count)
        row[frames] = before + np.arange(image_count, count)
        rows.append(row)
        before += count
    return rows, before
