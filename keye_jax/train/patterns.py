"""Patterns over the dotted paths of parameters, such as `decoder.layers.*.indexer`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern names a parameter: its path, with `*` and `?` as in file names, or a module above it."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def chosen(patterns: Sequence[str], path: str) -> bool:
    """Whether a list of patterns takes a parameter. A pattern after `!` leaves out; the last one that matches holds."""
    taken = False
    for pattern in patterns:
        if matches(pattern.removeprefix("!"), path):
            taken = not pattern.startswith("!")
    return taken


def unmatched(patterns: Iterable[str], paths: Sequence[str]) -> list[str]:
    """The patterns that no parameter matches."""
    return [pattern for pattern in patterns if not any(matches(pattern.removeprefix("!"), path) for path in paths)]
