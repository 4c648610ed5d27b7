"""A double of the tokens that a model draws. All else of the engine is real."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


@contextlib.contextmanager
def scripted_tokens(engine: Any, checkpoint: Path, script: Sequence[str]) -> Iterator[list[str]]:
    """Makes the answers of an engine those of a script, each with the tokens of its text and an end token.

    Args:
      script: texts of answers in the order in which they begin; names of control tokens are the tokens.

    Yields:
      Those that are left.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    answers, left = engine._answers, list(script)
    deliver, written = answers.deliver, {}

    def deliver_script(tokens):
        for drawn in tokens:
            if drawn.id not in written:
                ids = tokenizer.encode(left.pop(0), add_special_tokens=False).ids
                written[drawn.id] = iter([*ids, min(engine.defaults.end_tokens)])
            token = next(written[drawn.id], None)
            if token is not None:
                deliver([dataclasses.replace(drawn, token=token)])

    answers.deliver = deliver_script
    try:
        yield left
    finally:
        del answers.deliver
