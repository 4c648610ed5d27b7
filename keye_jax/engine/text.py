"""From token ids to text as they come: reasoning apart from the answer, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from keye_jax.processor import Processor


class AnswerWriter:
    """Turns the tokens of one answer into text.

    Pieces are what is new of the answer, and of the reasoning. White space around either is left out. So is all from a
    stop text on. What may still turn out to be either is held back. So the pieces put together are the whole.

    Attributes:
      token_ids: those written so far.
      reasoning_tokens: how many of them belong to the reasoning.
      stopped: whether the answer has reached a stop text.
    """

    def __init__(
        self, processor: Processor, thinking: bool, emit: Callable[[str, bool], None], stop: Sequence[str] = ()
    ):
        """Begins an answer.

        Args:
          thinking: whether the prompt opens the think block.
          emit: called with (piece, whether it is reasoning) for each new piece.
          stop: texts that end the answer; the reasoning may hold them.
        """
        self.token_ids: list[int] = []
        self.reasoning_tokens = 0
        self.stopped = False
        self._open, self._close = processor.token_id("<think>"), processor.token_id("</think>")
        self._stream, self._emit_piece, self._thinking = processor.stream(), emit, thinking
        self._stop = stop
        self._text = {True: "", False: ""}
        self._held = {True: "", False: ""}

    def write(self, token: int) -> None:
        """Adds a token."""
        self.token_ids.append(token)
        self.reasoning_tokens += self._thinking
        if token in (self._open, self._close):
            self._add(self._stream.flush())  # half a character belongs to the part before the mark
        if token == self._open:
            self._thinking = True
        elif token == self._close:
            if not self._thinking:
                # An answer may hold only the closing mark: all before it was reasoning.
                self._text = {True: self._text[True] + self._text[False], False: ""}
                self._held = {True: self._held[True] + self._held[False], False: ""}
                self.reasoning_tokens = len(self.token_ids)
            self._thinking = False
        else:
            self._add(self._stream.step(token))

    def finish(self) -> tuple[str, str]:
        """Emits what was held back and belongs to the text; returns the answer and the reasoning."""
        self._add(self._stream.flush())
        for reasoning, held in self._held.items():
            if not (self.stopped and not reasoning):
                self._emit(held.rstrip(), reasoning)
        return self._text[False], self._text[True]

    def _add(self, piece: str) -> None:
        reasoning = self._thinking
        if not piece or (self.stopped and not reasoning):
            return
        text = self._held[reasoning] + piece
        if not self._text[reasoning]:
            text = text.lstrip()
        sure = len(text.rstrip())
        if not reasoning:
            found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
            if found:
                self.stopped = True
                sure = len(text[: min(found)].rstrip())
            else:
                sure = len(text[: min([sure, *(_safe(text, stop) for stop in self._stop)])].rstrip())
        self._held[reasoning] = "" if self.stopped and not reasoning else text[sure:]
        self._emit(text[:sure], reasoning)

    def _emit(self, piece: str, reasoning: bool) -> None:
        if piece:
            self._text[reasoning] += piece
            self._emit_piece(piece, reasoning)


def _safe(text: str, stop: str) -> int:
    """Length of the part of `text` that cannot belong to a stop text which goes on behind it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return len(text) - length
    return len(text)
