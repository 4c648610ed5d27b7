"""How the steps of a sequence's blocks of queries are numbered, so that they can be divided equally among CTAs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax


def _before(blocks: Any, ratio: int, steps: int) -> Any:
    """Steps that the first blocks of a sequence see that begins at position 0.

    Block i ends at the end of part i of the keys, and a step has `ratio` parts. So it sees `i // ratio + 1` steps, of
    those that there are.
    """
    inside = jnp.minimum(blocks, ratio * steps)
    whole = inside // ratio
    rest = inside - whole * ratio
    return ratio * (whole * (whole + 1) // 2) + rest * (whole + 1) + (blocks - inside) * steps


@dataclasses.dataclass(frozen=True)
class EqualSteps:
    """Blocks that all have the same steps.

    Attributes:
      blocks: number of blocks, an int.
      steps: int32 scalar, steps of each.
    """

    blocks: int
    steps: Any

    @property
    def total(self) -> Any:
        """Steps of all blocks."""
        return self.blocks * self.steps

    def before(self, block: Any) -> Any:
        """Steps of all blocks before one."""
        return block * self.steps

    def count(self, block: Any) -> Any:
        """Steps of one block."""
        del block
        return self.steps

    def blocks_of(self, first: Any, end: Any) -> tuple[Any, Any]:
        """The first block that has steps `first` to `end - 1`, and the end of its last; no block if there are none."""
        divisor = jnp.maximum(self.steps, 1)
        block = first // divisor
        return block, jnp.where(end > first, (end + divisor - 1) // divisor, block)


@dataclasses.dataclass(frozen=True)
class SeenSteps:
    """Blocks of neighbouring queries whose steps are those that a block sees, or one more.

    Attributes:
      offset: int32 scalar, how many blocks would lie before the first one.
      skipped: int32 scalar, how many of the first blocks have no steps.
      blocks: number of blocks, an int.
      ratio: blocks of a step.
      steps: steps that there are, an int.
    """

    offset: Any
    skipped: Any
    blocks: int
    ratio: int
    steps: int

    @classmethod
    def of(cls, start: Any, blocks: int, block: int, *, step: int, steps: int, skip_below: int) -> SeenSteps:
        """Of blocks of `block` queries, the first at position `start`.

        Args:
          step: keys of a step, a multiple of `block`.
          skip_below: blocks whose queries all lie below this position are skipped.
        """
        start = jnp.maximum(start, 0)
        skipped = jnp.clip((skip_below - start) // block, 0, blocks)
        return cls((start + (block - 1)) // block, skipped, blocks, step // block, steps)

    @property
    def total(self) -> Any:
        """Steps of all blocks."""
        return self.before(self.blocks)

    def before(self, block: Any) -> Any:
        """Steps of all blocks before one, which is not skipped."""
        return self._upto(self.offset + block) - self._upto(self.offset + self.skipped)

    def count(self, block: Any) -> Any:
        """Steps of one block, which is not skipped."""
        return jnp.minimum((self.offset + block) // self.ratio + 1, self.steps)

    def blocks_of(self, first: Any, end: Any) -> tuple[Any, Any]:
        """The first block that has steps `first` to `end - 1`, and the end of its last; no block if there are none."""
        some = end > first
        block = self._block_of(first, some)
        return block, jnp.where(some, self._block_of(end - 1, some) + 1, block)

    def _upto(self, blocks: Any) -> Any:
        return _before(blocks, self.ratio, self.steps)

    def _block_of(self, at: Any, some: Any) -> Any:
        """The block that has step `at`, by bisection; it is not looked for unless `some`."""

        def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = bounds
            middle = (low + high) // 2
            below = self.before(middle) <= at
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        turns = jnp.where(some, self.blocks.bit_length(), 0)
        return lax.fori_loop(0, turns, halve, (self.skipped, jnp.int32(self.blocks)))[0]
