"""From token ids to an answer as it comes: reasoning, text and tool calls apart, up to a stop text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from keye_jax.engine.request import (
    AnswerPiece,
    Choice,
    FinishReason,
    Piece,
    Request,
    TextPart,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
)
from keye_jax.processor import Processor

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
"""Control tokens around a call, which chat templates write as a JSON object with `name` and `arguments`."""

# A call is told from what only looks like one within so many characters, or else when it ends.
_LONGEST_HEAD = 4096
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*+")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL)


class AnswerWriter:
    """Turns the tokens of one answer into events, and into the whole answer.

    One state machine serves both: the whole is put together from the events. White space around text and around
    reasoning is left out. So is all of the text from a stop text on. What may still turn out to be either is held back.
    The answer to a raw prompt is all text, with its white space.

    A tool call is what stands between `<tool_call>` and `</tool_call>` outside of the reasoning. It counts as a call
    from the moment that it has a name of `Request.tool_names` and its arguments have begun; from then on these are what
    the model writes, up to the bracket that closes them, even if the answer is cut. What follows them in the call is
    left out. A call in another order of fields, or without arguments, counts when it ends. Anything else, such as text
    that is no JSON, an unknown name, or a call that is cut before its arguments, stays text of the answer, marks
    included. Stop texts are looked for in the text alone.

    Attributes:
      token_ids: those written so far.
      reasoning_tokens: how many of them belong to the reasoning.
    """

    def __init__(
        self,
        processor: Processor,
        request: Request,
        choice: int,
        thinking: bool,
        emit: Callable[[AnswerPiece], None],
    ):
        """Begins an answer.

        Args:
          request: says which texts end the answer, and which tools there are.
          choice: which of the request's answers it is.
          thinking: whether the prompt opens the think block.
          emit: called with each event.
        """
        self.token_ids: list[int] = []
        self.reasoning_tokens = 0
        self._request, self._choice, self._thinking, self._emit = request, choice, thinking, emit
        raw = request.prompt is not None
        marks = (THINK, END_THINK, *((TOOL_CALL, END_TOOL_CALL) if request.tool_names else ()))
        # A token that the vocabulary lacks has the id None, which is never drawn.
        self._marks = {} if raw else {processor.token_id(mark): mark for mark in marks}
        self._stream = processor.stream()
        self._text, self._reasoning = _Text(request.stop, strip=not raw), _Text((), strip=True)
        self._call: _Call | None = None
        self._calls: list[tuple[ToolCall, list[str]]] = []
        # Texts of one kind, or the number of a call.
        self._parts: list[tuple[bool, list[Piece]] | int] = []
        self._logprobs: list[TokenLogprob] | None = None if request.top_logprobs is None else []
        self._told = 0

    @property
    def stopped(self) -> bool:
        """Whether the answer has reached a stop text, or made all calls that it may."""
        most = self._request.max_tool_calls
        return self._text.stopped or (most is not None and self._call is None and len(self._calls) >= most)

    def write(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Adds a token, with its log probability if these were asked for."""
        self.token_ids.append(token)
        self.reasoning_tokens += self._thinking
        mark = self._marks.get(token)
        if self._logprobs is not None and logprob is not None:
            in_call = self._call is not None and self._call.name is not None
            in_text = not (self._thinking or in_call or mark in (THINK, END_THINK))
            self._logprobs.append(logprob if in_text else dataclasses.replace(logprob, in_text=False))
        if mark is None:
            self._take(self._stream.step(token))
            return
        self._take(self._stream.flush())  # a mark ends a character that is incomplete
        if mark in (THINK, END_THINK):
            # A closing mark that closes nothing is left out: what came before it was shown as text already.
            self._end_call()
            self._thinking = mark == THINK
        elif mark == TOOL_CALL and not self._thinking:
            self._end_call()
            self._call = _Call(self._stream.step(token), self._request.tool_names)
        elif mark == END_TOOL_CALL and self._call is not None:
            self._end_call(self._stream.step(token))
        else:
            self._take(self._stream.step(token))

    def finish(self, reason: FinishReason, **known: Any) -> Choice:
        """Emits what was held back and belongs to the answer, and returns the whole of it.

        Args:
          reason: why it ended. "stop" becomes "tool_calls" if there are calls.
          known: other fields of the result.
        """
        self._take(self._stream.flush())
        self._end_call()
        self._tell(self._reasoning.end(), reasoning=True)
        self._tell(self._text.end(), reasoning=False)
        calls = tuple(ToolCall(call.id, call.name, "".join(arguments)) for call, arguments in self._calls)
        return Choice(
            text=self._text.text,
            reasoning=self._reasoning.text,
            finish_reason="tool_calls" if reason == "stop" and calls else reason,
            token_ids=tuple(self.token_ids),
            reasoning_tokens=self.reasoning_tokens,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            tool_calls=calls,
            parts=tuple(calls[part] if isinstance(part, int) else _text_part(part[0], part[1]) for part in self._parts),
            **known,
        )

    def _take(self, text: str) -> None:
        """Adds text to what is being written."""
        if self._call is not None:
            known = self._call.name is not None
            arguments = self._call.add(text)
            if self._call.name is not None and not known:
                self._begin_call(self._call.name)
            self._argue(arguments)
        elif self._thinking:
            self._tell(self._reasoning.add(text), reasoning=True)
        else:
            self._tell(self._text.add(text), reasoning=False)

    def _end_call(self, mark: str | None = None) -> None:
        """Ends the call that is being written, if any; `mark` is the text of the mark that closes it, if one does."""
        call, self._call = self._call, None
        if call is None or call.name is not None:
            return
        found = None if mark is None else call.parse()
        if found is None:
            self._take(call.written + (mark or ""))
        else:
            self._begin_call(found[0])
            self._argue(found[1])

    def _begin_call(self, name: str) -> None:
        index = len(self._calls)
        call = ToolCall(_call_id(self._request.id, self._choice, index), name, "")
        self._parts.append(index)
        self._calls.append((call, []))
        self._emit(ToolCallPiece(self._choice, index, call.id, name, "", self._new_logprobs()))

    def _argue(self, arguments: str) -> None:
        """Adds to the arguments of the last call."""
        if arguments:
            index = len(self._calls) - 1
            call, written = self._calls[index]
            written.append(arguments)
            self._emit(ToolCallPiece(self._choice, index, call.id, None, arguments, self._new_logprobs()))

    def _tell(self, text: str, *, reasoning: bool) -> None:
        if not text:
            return
        piece = Piece(self._choice, text, reasoning, self._new_logprobs())
        last = self._parts[-1] if self._parts else None
        if isinstance(last, tuple) and last[0] == reasoning:
            last[1].append(piece)
        else:
            self._parts.append((reasoning, [piece]))
        self._emit(piece)

    def _new_logprobs(self) -> tuple[TokenLogprob, ...]:
        if self._logprobs is None:
            return ()
        new, self._told = tuple(self._logprobs[self._told :]), len(self._logprobs)
        return new


def _text_part(reasoning: bool, pieces: Sequence[Piece]) -> TextPart:
    text = "".join(piece.text for piece in pieces)
    return TextPart(text, reasoning, tuple(each for piece in pieces for each in piece.logprobs if each.in_text))


def _call_id(request_id: str, choice: int, index: int) -> str:
    """The id of a call: it follows from its place, so that a stream and the whole have the same."""
    return f"call_{hashlib.sha256(f'{request_id} {choice} {index}'.encode()).hexdigest()[:24]}"


class _Text:
    """Text of which the end may still be left out: white space around it, and all from a stop text on.

    Args:
      stop: texts that end it.
      strip: whether white space around it is left out.

    Attributes:
      stopped: whether it has reached a stop text.
    """

    def __init__(self, stop: Sequence[str], *, strip: bool):
        self._stop, self._strip = stop, strip
        self._told: list[str] = []
        self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        return "".join(self._told)

    def add(self, piece: str) -> str:
        """Adds text, and returns what is sure now and was not before."""
        if self.stopped or not piece:
            return ""
        text = self._held + piece
        if self._strip and not self._told:
            text = text.lstrip()
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        sure = text[: min(found or [len(text), *(_safe(text, stop) for stop in self._stop)])]
        return self._tell(sure.rstrip() if self._strip else sure, text)

    def end(self) -> str:
        """What was held back and belongs to the text."""
        return "" if self.stopped else self._tell(self._held.rstrip() if self._strip else self._held, "")

    def _tell(self, sure: str, text: str) -> str:
        self._held = text[len(sure) :]
        if sure:
            self._told.append(sure)
        return sure


def _safe(text: str, stop: str) -> int:
    """Length of the part of `text` that cannot belong to a stop text which goes on behind it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return len(text) - length
    return len(text)


class _Call:
    """What is being written between `<tool_call>` and `</tool_call>`.

    Args:
      mark: the text of the opening mark.
      names: of the tools that there are.

    Attributes:
      name: that of the tool, as soon as it is sure that this is a call of it.
    """

    def __init__(self, mark: str, names: Collection[str]):
        self._mark, self._names = mark, names
        self._texts: list[str] = []
        self._head: str | None = ""
        self._depth, self._in_string, self._escaped, self._complete = 0, False, False, False
        self.name: str | None = None

    @property
    def written(self) -> str:
        """All of it, as text."""
        return self._mark + "".join(self._texts)

    def add(self, text: str) -> str:
        """Adds text, and returns what is new of the arguments."""
        self._texts.append(text)
        if self.name is not None:
            return self._arguments(text)
        if self._head is None:
            return ""
        self._head += text
        found = _HEAD.match(self._head)
        if found and (name := _decoded(found[1])) in self._names:
            self.name = name
            return self._arguments(self._head[found.end() :])
        if found or len(self._head) > _LONGEST_HEAD:
            self._head = None
        return ""

    def parse(self) -> tuple[str, str] | None:
        """Name and arguments of a call that ended before it was sure to be one; None if it is none."""
        value = _decoded("".join(self._texts))
        name = value.get("name") if isinstance(value, Mapping) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _decoded(arguments)
        return (name, json.dumps(arguments)) if isinstance(arguments, Mapping) else None

    def _arguments(self, text: str) -> str:
        """The part of `text` that belongs to the arguments: up to the bracket that closes them."""
        for place, character in enumerate(text if not self._complete else ""):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._complete = True
                    return text[: place + 1]
        return "" if self._complete else text


def _decoded(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
