"""How a long operation tells its caller what is done."""

from __future__ import annotations

from collections.abc import Callable

# Called with (units done, units in all).
type Progress = Callable[[int, int], None]
# Called with (phase, units done, units in all).
type PhaseProgress = Callable[[str, int, int], None]
