"""What a step's tokens attend to: the pages of a pool, or the step's own tokens alone. Attention knows only `Keys`.

`PagedContext` is for prefill and decode. `PackedContext` needs no pool, and its samples never see each other; it is for
training and for evaluating a batch once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.kv_cache import PAGE_SIZE, BatchMetadata, PagePool, Pages
from keye_jax.sharding.collectives import Axes, all_gather, from_owner, rank
from keye_jax.sharding.step import StepSharding, spec


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys that the rows of one device attend to.

    Attributes:
      pages: they and their values.
      page_table: int32 `[b, m]`, each row's pages.
      start: int32 `[b]`, the position of each row's first query among these keys; -1 if it sees none of them.
      split: mesh axes along which devices hold other keys of the same sequences, in turns, page by page.
      count: int32 `[b]`, how many queries each row has; None if all are filled. Those behind see the keys that the last
        one sees, and none that an earlier owner left in a page: kernels attend from neighbouring queries together.
    """

    pages: Pages
    page_table: jax.Array
    start: jax.Array
    split: Axes = ()
    count: jax.Array | None = None


class Context(Protocol):
    """What a decoder layer's tokens attend to. Methods but `specs` run inside `StepSharding.shard_map`."""

    @property
    def batch(self) -> BatchMetadata: ...

    def append(self, new: Pages, step: StepSharding) -> tuple[Self, Keys]:
        """The context with the rows of new tokens `[b, t, ...]`, and the keys that those attend to."""
        ...

    def specs(self, step: StepSharding) -> Any:
        """Partitions in place of the arrays."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedContext:
    """One layer's pages of a pool, and which of them the step's rows belong to."""

    pages: Pages
    batch: BatchMetadata

    def append(self, new: Pages, step: StepSharding) -> tuple[PagedContext, Keys]:
        """Writes the new rows into the pages that this device has.

        Memory: where a row needs pages of other devices (`query_sequence`), a copy of those of all s sequences.
        """
        batch, tokens, pages = self.batch, new.kv.shape[1], self.pages
        table = self._own_table(step)
        # Gathered before the new rows are there, so that it can begin while they are computed.
        gathered = _gather_pages(pages, table, step) if step.gathers_pages else None
        rows = jax.tree.map(lambda x: all_gather(x, step.query_sequence, axis=0), new)
        pages = pages.write(self.slots(step, tokens), rows)
        if not gathered:
            return self.with_new_rows(pages, step)
        own = own_rows(batch, step)
        whole, whole_table = gathered
        whole = whole.write(batch.slots(whole_table, whole.count, tokens), rows)
        return PagedContext(pages, batch), Keys(whole, own.tables(whole_table), own.start, count=own.count)

    def slots(self, step: StepSharding, tokens: int) -> jax.Array:
        """Where the step's tokens belong among the pages that this device has, as `BatchMetadata.slots`."""
        return self.batch.slots(self._own_table(step), self.pages.count, tokens)

    def with_new_rows(self, pages: Pages, step: StepSharding) -> tuple[PagedContext, Keys]:
        """As `append`, of this device's pages with the new rows, where no row needs pages of other devices."""
        own = own_rows(self.batch, step)
        table = _own_columns(own.tables(self._own_table(step)), step)
        # Entries of pages that are not here are not looked at, but kernels may read what they point to.
        table = jnp.clip(table, 0, pages.count - 1) if step.pages else table
        keys = Keys(pages, table, _start_among_own(own.start, step), step.cache_sequence, own.count)
        return PagedContext(pages, self.batch), keys

    def _own_table(self, step: StepSharding) -> jax.Array:
        """The page table, relative to this device's pages."""
        return self.batch.page_table - rank(step.pages) * self.pages.count

    def specs(self, step: StepSharding) -> Any:
        return PagedContext(self.pages.specs((step.pages,), step), _batch_specs(self.batch, step))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedContext:
    """No cache: each row attends to earlier tokens of its own sample, all of which the step has.

    Attributes:
      batch: `page_table` counts pages of the step's own tokens: page i holds tokens `i * PAGE_SIZE` and on of all rows
        one after the other, so rows have a multiple of `PAGE_SIZE` tokens. Where rows have their places along axes of
        the batch, each part of them has its own samples, and counts its own pages and samples.
      branch: int32 `[rows, t]`, or None. In training of rows that are samples, tokens of a branch above 0 see of other
        branches only those of 0: so one clip has several questions that do not see each other.
    """

    batch: BatchMetadata
    branch: jax.Array | None = None

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        tokens: int,
        *,
        rows: int | None = None,
        samples: int | None = None,
        longest: int | None = None,
    ) -> PackedContext:
        """Samples of these lengths in rows of `tokens` tokens, each sample from the beginning of a row.

        Args:
          rows, samples: how many there are at least; those that are not needed are idle.
          longest: tokens of the longest sample that there may be. One shape serves all samples that fit.
        """
        assert tokens % PAGE_SIZE == 0, "a row holds whole pages"
        needed = [-(-length // tokens) for length in lengths]
        width = max([*needed, -(-(longest or 0) // tokens)]) * tokens // PAGE_SIZE
        first = np.cumsum([0, *needed])[: len(needed)] * tokens // PAGE_SIZE
        start = [row * tokens for count in needed for row in range(count)]
        left = [length - row * tokens for length, count in zip(lengths, needed, strict=True) for row in range(count)]
        sample = [index for index, count in enumerate(needed) for _ in range(count)]
        rows, samples = max(rows or 0, sum(needed)), max(samples or 0, len(needed))

        def padded(values: Any, size: int) -> np.ndarray:
            return np.pad(np.asarray(values, np.int32), (0, size - len(values)))

        table = padded(first, samples)[:, None] + np.arange(width, dtype=np.int32)
        return cls(
            BatchMetadata(
                page_table=jnp.asarray(np.minimum(table, rows * tokens // PAGE_SIZE - 1)),
                start=jnp.asarray(padded(start, rows)),
                count=jnp.asarray(padded(np.minimum(left, tokens), rows)),
                sequence=jnp.asarray(padded(sample, rows)),
            )
        )

    @classmethod
    def join(cls, parts: Sequence[PackedContext]) -> PackedContext:
        """The parts of a batch, one for each part of the axes of `StepSharding.batch`; all have the same shapes."""
        return cls(jax.tree.map(lambda *x: jnp.concatenate(x), *(part.batch for part in parts)))

    def append(self, new: Pages, step: StepSharding) -> tuple[PackedContext, Keys]:
        rows = jax.tree.map(lambda x: all_gather(x, step.query_sequence, axis=0), new)
        pages = jax.tree.map(lambda x: x.reshape(-1, PAGE_SIZE, *x.shape[2:]), rows)
        own = own_rows(self.batch, step)
        return self, Keys(pages, own.tables(self.batch.page_table), own.start, count=own.count)

    def specs(self, step: StepSharding) -> Any:
        branch: Any = None if self.branch is None else spec(step.rows)
        return PackedContext(jax.tree.map(lambda _: spec(step.batch), self.batch), branch)


def paged_contexts(pool: PagePool, batch: BatchMetadata) -> tuple[PagedContext, ...]:
    """The context of each layer."""
    return tuple(PagedContext(pages, batch) for pages in pool.layers)


def _batch_specs(batch: BatchMetadata, step: StepSharding) -> Any:
    """Partitions of a step's metadata: rows that are dealt out are known to all devices that share them."""
    rows: Any = spec(step.batch)
    everywhere: Any = spec()
    return BatchMetadata(
        page_table=rows if batch.sequence is None else everywhere,
        start=rows,
        count=rows,
        sequence=None if batch.sequence is None else rows,
    )


def own_rows(batch: BatchMetadata, step: StepSharding) -> BatchMetadata:
    """The rows that this device has of those that are dealt out."""
    rows = len(batch.start) // step.size(step.query_sequence)
    if rows == len(batch.start):
        return batch
    assert batch.sequence is not None, "rows that are dealt out name their sequences"

    def own(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, rank(step.query_sequence) * rows, rows)

    return BatchMetadata(batch.page_table, own(batch.start), own(batch.count), own(batch.sequence))


def _start_among_own(start: jax.Array, step: StepSharding) -> jax.Array:
    """The position of a query among the keys that this shard has, from that among all; -1 if it sees none of them."""
    turn, turns = rank(step.cache_sequence), step.size(step.cache_sequence)
    if turns == 1:
        return start
    page, offset = jnp.divmod(start, PAGE_SIZE)
    pages_before = (page + turns - 1 - turn) // turns
    return pages_before * PAGE_SIZE + jnp.where(page % turns == turn, offset + 1, 0) - 1


def _own_columns(table: jax.Array, step: StepSharding) -> jax.Array:
    """The columns of page tables `[n, m]` whose pages lie on this shard, `[n, m / parts]`."""
    parts = step.size(step.cache_sequence)
    if parts == 1:
        return table
    columns = table.reshape(len(table), -1, parts)
    return jax.lax.dynamic_index_in_dim(columns, rank(step.cache_sequence), axis=2, keepdims=False)


def _gather_pages(pages: Pages, table: jax.Array, step: StepSharding) -> tuple[Pages, jax.Array]:
    """All pages of s sequences from the shards that have them.

    Args:
      table: int32 `[s, m]`, relative to this shard's pages.

    Returns:
      `s * m` pages, and their page table `[s, m]`.
    """
    sequences, width = table.shape
    parts = step.size(step.cache_sequence)
    own = _own_columns(table, step).reshape(-1)
    here = (own >= 0) & (own < pages.count)

    def gather(stored: jax.Array) -> jax.Array:
        part = stored[jnp.clip(own, 0, pages.count - 1)]
        return all_gather(from_owner(part, here, step.broadcast), step.cache_sequence, axis=0)

    sequence, column = jnp.arange(sequences)[:, None], jnp.arange(width)[None]
    place = ((column % parts) * sequences + sequence) * (width // parts) + column // parts
    return jax.tree.map(gather, pages), place
