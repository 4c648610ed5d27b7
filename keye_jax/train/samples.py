"""Samples in the forms in which others write them, one JSON object a line. Needs no JAX.

    {"videos": ["clip.mp4"], "messages": [{"role": "user", "content": "<video>When?"},
                                          {"role": "assistant", "content": "At 3 s."}]}
    {"video": "clip.mp4", "conversations": [{"from": "human", "value": "<video>When?"},
                                            {"from": "gpt", "value": "At 3 s."}]}

The first is LLaMA-Factory's and ms-swift's, the second Qwen's. Content may also be a list of parts, as requests have
it.
"""

from __future__ import annotations

import dataclasses
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keye_jax.errors import UserError, shorten
from keye_jax.processor.messages import read_json

_TAG = re.compile(r"<(image|video)>")
_COLUMNS = {"image": ("images", "image"), "video": ("videos", "video")}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "function_call": "assistant", "observation": "tool"}
_KNOWN = {"messages", "conversations", "tools", "system", *_COLUMNS["image"], *_COLUMNS["video"]}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A sample as the processor takes it.

    Attributes:
      messages: in the OpenAI chat shape.
      learn: whether the model learns each of them.
      tools: function descriptions, or None.
      columns: what else the sample has, by name.
    """

    messages: list[dict[str, Any]]
    learn: list[bool]
    tools: list[Any] | None
    columns: Mapping[str, Any]


def read_conversation(line: bytes, folder: Path) -> Conversation:
    """Reads one line.

    Args:
      folder: what paths of media are relative to.

    Raises:
      UserError: it has none of the forms, or its tags do not match its media.
    """
    values = read_json(line, "the line")
    if not isinstance(values, Mapping):
        raise UserError(f"the line is {shorten(values)}; it must be an object with messages or conversations")
    key = next((name for name in ("messages", "conversations") if values.get(name)), None)
    if key is None or not isinstance(values[key], list):
        raise UserError("messages is missing; a sample must have messages, or conversations")
    messages, learn = [], []
    if isinstance(values.get("system"), str) and values["system"]:
        messages.append({"role": "system", "content": values["system"]})
        learn.append(False)
    for index, given in enumerate(values[key]):
        message, is_learnt = _message(given, f"{key}[{index}]")
        messages.append(message)
        learn.append(is_learnt)
    if not any(learn):
        raise UserError(f"{key} holds nothing to learn; a message of the assistant must be there, not with loss false")
    _insert_media(messages, values, folder)
    tools = values.get("tools")
    if isinstance(tools, str):
        tools = read_json(tools.encode(), "tools") if tools.strip() else None
    return Conversation(messages, learn, tools or None, {k: v for k, v in values.items() if k not in _KNOWN})


def _message(given: Any, field: str) -> tuple[dict[str, Any], bool]:
    """A message in the OpenAI shape, and whether the model learns it."""
    if not isinstance(given, Mapping):
        raise UserError(f"{field} is {shorten(given)}; it must be an object with role and content")
    message = dict(given)
    role = message.pop("role", None) or message.pop("from", None)
    message.pop("from", None)
    if not isinstance(role, str):
        raise UserError(f"{field}.role is missing; it must be system, user, assistant or tool")
    role = _ROLES.get(role, role)
    content = message.pop("content", message.pop("value", None))
    message.pop("value", None)
    loss = message.pop("loss", None)
    if loss is not None and loss not in (True, False, 0, 1):
        raise UserError(f"{field}.loss is {shorten(loss)}; it must be true or false")
    return {**message, "role": role, "content": content}, role == "assistant" and (loss is None or bool(loss))


def _insert_media(messages: list[dict[str, Any]], values: Mapping[str, Any], folder: Path) -> None:
    """Puts the columns of images and videos where the tags of the text are, or without any tag before the question."""
    asked = [each for each in messages if each["role"] in ("user", "tool") and isinstance(each["content"], str)]
    left = {}
    for kind, (several, one) in _COLUMNS.items():
        sources = values[several] if values.get(several) is not None else values.get(one)
        if sources is None:
            continue
        sources = sources if isinstance(sources, list) else [sources]
        tags = sum(message["content"].count(f"<{kind}>") for message in asked)
        if not tags and asked:
            asked[0]["content"] = f"<{kind}>" * len(sources) + asked[0]["content"]
        elif tags != len(sources):
            raise UserError(f"{several} has {len(sources)} file(s), but the messages have {tags} <{kind}> tag(s)")
        left[kind] = iter([_located(source, folder) for source in sources])
    for message in asked:
        message["content"] = _with_media(message["content"], left)


def _located(source: Any, folder: Path) -> Any:
    """A source whose path, or the paths of whose frames, no longer depend on the working directory."""
    if isinstance(source, str):
        return source if re.match(r"[a-z][a-z0-9+.-]*:", source) else str(folder / source)
    if isinstance(source, list):
        return [_located(each, folder) for each in source]
    if isinstance(source, Mapping):
        paths = ("path", "url", "image", "video")
        return {key: _located(value, folder) if key in paths else value for key, value in source.items()}
    return source


def _with_media(text: str, left: Mapping[str, Iterator[Any]]) -> str | list[dict[str, Any]]:
    """The parts of a text with tags. A tag without a column of its kind is text."""
    parts: list[dict[str, Any]] = []
    end = 0
    for match in _TAG.finditer(text):
        if match[1] not in left:
            continue
        source = next(left[match[1]])
        if match.start() > end:
            parts.append({"type": "text", "text": text[end : match.start()]})
        parts.append({"type": match[1], match[1]: source})
        end = match.end()
    if not parts:
        return text
    return [*parts, {"type": "text", "text": text[end:]}] if end < len(text) else parts


class Lines(Sequence[tuple[int, bytes]]):
    """The lines of a file that hold something, with their numbers from 1. They are read when they are needed.

    Attributes:
      path: the file.

    Raises:
      UserError: the file is missing, or holds no line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"--data is {str(path)!r}; it must be a file that is there")
        starts, numbers, offset = [], [], 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    starts.append((offset, offset + len(line)))
                    numbers.append(number)
                offset += len(line)
        if not starts:
            raise UserError(f"--data is {str(path)!r}; it must hold at least one sample")
        self._spans, self._numbers = np.array(starts, np.int64), numbers
        with self.path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        start, end = self._spans[index]
        return self._numbers[index], self._map[start:end]
