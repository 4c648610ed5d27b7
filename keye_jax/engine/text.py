"""From token ids to text as they come, reasoning apart from the answer."""

from __future__ import annotations

from collections.abc import Callable

from keye_jax.processor import Processor


class AnswerWriter:
    """Turns the tokens of one answer into text.

    Attributes:
      token_ids: those written so far.
      reasoning_tokens: how many of them belong to the reasoning.
    """

    def __init__(self, processor: Processor, thinking: bool, emit: Callable[[str, bool], None]):
        """Takes whether the prompt opens the think block, and `emit(piece, reasoning)`, called for each new piece."""
        self.token_ids: list[int] = []
        self.reasoning_tokens = 0
        self._open, self._close = processor.token_id("<think>"), processor.token_id("</think>")
        self._stream, self._emit_piece, self._thinking = processor.stream(), emit, thinking
        self._text = {True: "", False: ""}

    def write(self, token: int) -> None:
        """Adds a token."""
        self.token_ids.append(token)
        self.reasoning_tokens += self._thinking
        if token == self._open:
            self._thinking = True
        elif token == self._close:
            if not self._thinking:
                # An answer may hold only the closing mark: all before it was reasoning.
                self._text = {True: self._text[True] + self._text[False], False: ""}
                self.reasoning_tokens = len(self.token_ids)
            self._thinking = False
        else:
            self._emit(self._stream.step(token))

    def finish(self) -> tuple[str, str]:
        """Emits what was held back; returns the answer and the reasoning."""
        self._emit(self._stream.flush())
        return self._text[False].strip(), self._text[True].strip()

    def _emit(self, piece: str) -> None:
        if piece:
            self._text[self._thinking] += piece
            self._emit_piece(piece, self._thinking)
