"""Rows that are sorted by group, cut into blocks of one group each."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of `size` rows. The last block of a group may have fewer.

    Attributes:
      size: rows of a block.
      most: a bound of the number of blocks: at most one block of each group is not full.
      starts, ends: of each group's rows, int32 `[e]`.
      block_starts, block_ends: of each group's blocks, int32 `[e]`.
    """

    size: int
    most: int
    starts: jax.Array
    ends: jax.Array
    block_starts: jax.Array
    block_ends: jax.Array

    @classmethod
    def of(cls, rows: int, ends: jax.Array, size: int) -> "Blocks":
        sizes = jnp.diff(ends, prepend=0)
        blocks = (sizes + size - 1) // size
        block_ends = jnp.cumsum(blocks)
        return cls(size, most_blocks(rows, len(ends), size), ends - sizes, ends, block_ends - blocks, block_ends)

    @property
    def number(self) -> jax.Array:
        """How many blocks have rows, int32 scalar."""
        return self.block_ends[-1]

    def locate(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Group, first row, and the end of the group's rows, of blocks int32 `[...]`.

        A block behind the last counts as one of the last group, and begins behind the group's end.
        """
        group = jnp.minimum(
            jnp.searchsorted(self.block_ends, index, side="right", method="compare_all"), len(self.ends) - 1
        )
        first = (index - self.block_starts[group]) * self.size
        return group, self.starts[group] + first, self.ends[group]

    def place(self, rows: jax.Array) -> jax.Array:
        """Where rows int32 `[...]` are in an array of all blocks, `size` rows each."""
        group = group_of_row(rows, self.ends)
        return self.block_starts[group] * self.size + rows - self.starts[group]


def most_blocks(rows: int, groups: int, size: int) -> int:
    """A bound of the number of blocks of `size` rows."""
    return rows // size + min(groups, rows)


def group_of_row(rows: jax.Array, ends: jax.Array) -> jax.Array:
    """The group of rows int32 `[...]`; the last one's for rows of no group."""
    return jnp.minimum(jnp.searchsorted(ends, rows, side="right", method="compare_all"), len(ends) - 1)
