"""Turns messages into token ids. No text of a user becomes a control token.

The checkpoint's chat template never sees a user's text: it is rendered with a random placeholder for every string of
the request. Control tokens are recognised only in the text that the template itself wrote. Then the strings replace
their placeholders, and a tokenizer without control tokens encodes the text between two control tokens. A text that
spells no control token gets the same ids as by encoding the whole prompt at once.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from tokenizers import Tokenizer

from keye_jax.errors import UserError, shorten
from keye_jax.processor.messages import MediaPart, check_messages, check_tools

# Keys and types that templates compare with, in messages and in descriptions of tools. They are not replaced.
_SHAPE = frozenset(
    (
        *("role", "content", "type", "text", "reasoning_content", "tool_calls", "tool_call_id", "id", "function"),
        *("name", "arguments", "description", "parameters", "properties", "required", "items", "enum", "strict"),
    )
)
_TYPES = ("text", "image", "video", "function")
# Of a checkpoint that names no eos_token.
_END_OF_TURN = "<|im_end|>"


class SafeTokenizer:
    """A tokenizer that distinguishes control tokens from text that is spelled like them.

    Args:
      path: a `tokenizer.json`.

    Attributes:
      control: ids of the control tokens by name.

    Raises:
      UserError: the file is missing or is not a tokenizer.
    """

    def __init__(self, path: Path):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UserError(f"{path.name} is missing in {path.parent}; a checkpoint must have its tokenizer") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not a tokenizer: {error}") from error
        try:
            values = json.loads(text)
            self.control = {token["content"]: int(token["id"]) for token in values["added_tokens"]}
            values |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            self._plain = Tokenizer.from_str(json.dumps(values, ensure_ascii=False))
            self._full = Tokenizer.from_str(text)
            unknown = self._plain.token_to_id(str(values["model"].get("unk_token")))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path} is not a tokenizer: {error}") from error
        # Unknown text may become the unknown token, even if that is among the added tokens.
        self._forbidden = frozenset(self.control.values()) - {unknown}
        longest_first = sorted((name for name in self.control if name), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")

    def encode_template(self, text: str) -> list[int]:
        """Ids of a text of the checkpoint, in which control tokens are recognised."""
        return self.encode_pieces([(text, True)])

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text of a user. No id is that of a control token.

        Raises:
          UserError: the tokenizer has a single character of the text only as a control token.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can hold half a surrogate pair; UTF-8 cannot
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        encoding = self._plain.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # The vocabulary holds a control token as ordinary text: cut that text in two and encode the halves apart.
        cuts = [0]
        for token, (start, end) in zip(ids, encoding.offsets, strict=True):
            if token in self._forbidden:
                if end - start < 2:
                    part = repr(text[start:end])
                    raise UserError(f"the text holds {part}, which this tokenizer has only as a control token")
                cuts.append((start + end) // 2)
        return [
            token
            for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)
            for token in self.encode_text(text[start:end])
        ]

    def encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Ids of a text in pieces of different origin.

        Args:
          pieces: rows (text, trusted). Control tokens are recognised within a trusted piece, never across pieces.
        """
        ids: list[int] = []
        run: list[str] = []

        def flush() -> None:
            if run:
                ids.extend(self.encode_text("".join(run)))
                run.clear()

        for text, trusted in pieces:
            end = 0
            for match in self._pattern.finditer(text) if trusted else ():
                run.append(text[end : match.start()])
                flush()
                ids.append(self.control[match[0]])
                end = match.end()
            run.append(text[end:])
        flush()
        return ids

    def token_id(self, text: str) -> int | None:
        """The id of the token named `text`; None if there is no such token."""
        return self._full.token_to_id(text)

    def strict_json(self) -> str:
        """The tokenizer as `tokenizer.json`, with every added token as a special one, which no text is made of."""
        values = json.loads(self._full.to_str())
        for token in values["added_tokens"]:
            token["special"] = True
        return json.dumps(values, ensure_ascii=False)

    def detokenize(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; see `Processor.detokenize`."""
        return self._full.decode(list(ids), skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Turns the tokens of an answer into text one by one, in pieces that never end inside a character."""

    # Tokens. Bytes that never become a character are emitted after this many.
    _MAX_PENDING = 16

    def __init__(self, tokenizer: SafeTokenizer, *, skip_special_tokens: bool = True):
        self._decode: Callable[[list[int]], str] = lambda ids: tokenizer.detokenize(
            ids, skip_special_tokens=skip_special_tokens
        )
        self._context: list[int] = []
        self._pending: list[int] = []

    def step(self, token: int) -> str:
        """Takes the next token and returns the new text; empty while a character is incomplete."""
        self._pending.append(int(token))
        text = self._text()
        if text.endswith("\ufffd") and len(self._pending) < self._MAX_PENDING:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """The rest of the text at the end of the answer."""
        return self._emit(self._text())

    def _text(self) -> str:
        # The text of a token may depend on the token before it, which is the context.
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _emit(self, text: str) -> str:
        self._context, self._pending = self._pending or self._context, []
        return text


@dataclasses.dataclass(frozen=True)
class RenderedPrompt:
    """A rendered prompt.

    Attributes:
      pieces: rows (text, trusted), in order. Trusted text was written by the template.
      media: images and videos, in order.
      opens_thinking: whether the prompt ends inside `<think>`.
      authors: the message that each piece comes from; None for one of the template or of a tool.
    """

    pieces: list[tuple[str, bool]]
    media: list[MediaPart]
    opens_thinking: bool
    authors: list[int | None]


_PLACEHOLDERS = "_placeholders"


class _Placeholders:
    """Random placeholders for the strings of one request."""

    def __init__(self, request: Any):
        given = list(_strings(request))
        self._start = f"\ue000{secrets.randbits(96)}:"
        while any(self._start in text for text in given):
            self._start = f"\ue000{secrets.randbits(96)}:"
        self._texts: list[str] = []
        self._authors: list[int | None] = []
        self._pattern = re.compile(re.escape(self._start) + r"(\d+)\ue001")

    def hide(self, value: Any, author: int | None = None) -> Any:
        """Replaces every string in `value` by a placeholder, except the fixed names of the OpenAI shape.

        An empty string stays, since templates test for it.

        Args:
          author: the message that the strings are of.
        """
        if isinstance(value, str):
            if not value:
                return value
            self._texts.append(value)
            self._authors.append(author)
            return f"{self._start}{len(self._texts) - 1}\ue001"
        if isinstance(value, Mapping):
            return {
                key if key in _SHAPE else self.hide(key, author): (
                    item if key == "type" and item in _TYPES else self.hide(item, author)
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.hide(item, author) for item in value]
        return value

    def author_of(self, text: str) -> int | None:
        """The message that the first placeholder in `text` is of."""
        found = self._pattern.search(text)
        return self._authors[int(found[1])] if found else None

    def reveal(self, value: Any) -> Any:
        """Replaces every placeholder in `value` by its string."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._texts[int(match[1])], value)
        if isinstance(value, Mapping):
            return {self.reveal(key): self.reveal(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.reveal(item) for item in value]
        return value

    def split(self, text: str) -> tuple[list[tuple[str, bool]], list[int | None]]:
        """Splits a rendered template into rows (text, trusted), and the message of each."""
        pieces, authors, end = [], [], 0
        for match in self._pattern.finditer(text):
            pieces += [(text[end : match.start()], True), (self._texts[int(match[1])], False)]
            authors += [None, self._authors[int(match[1])]]
            end = match.end()
        return [*pieces, (text[end:], True)], [*authors, None]


class ChatTemplate:
    """A checkpoint's chat template, rendered in a sandbox.

    Args:
      source: the Jinja template.
      variables: strings of the checkpoint that the template may use by name, such as `eos_token`.

    Raises:
      UserError: `source` is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _tojson
        self._source, self._variables = source, dict(variables)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the chat template is not valid: {reason}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self._source, self._variables)  # Jinja's compiled template cannot be pickled

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        generation_prompt: bool = True,
    ) -> RenderedPrompt:
        """Renders a conversation, by default ready for the assistant's next message.

        Args:
          messages: the conversation in the OpenAI chat shape.
          tools: function descriptions in the OpenAI shape.
          variables: further template variables, such as `enable_thinking`. Strings in them are text of a user.
          generation_prompt: whether it ends with the beginning of the assistant's next message.

        Raises:
          UserError: a message or a tool does not have that shape, or the template refuses it or leaves it out.
        """
        checked, media = check_messages(messages)
        tools, variables = check_tools(tools), variables or {}
        pieces, authors = self._pieces(checked, tools, variables, generation_prompt)
        if tools and self._leaves_tools_out(pieces, checked, variables, generation_prompt):
            raise UserError(
                f"tools holds {len(tools)} function(s), but the chat template of this checkpoint takes none"
            )
        shown = {text for text, trusted in pieces if not trusted}
        for index, message in enumerate(checked):
            for content in _texts(message["content"]):
                if content and content not in shown:
                    raise UserError(
                        f"messages[{index}].content is {shorten(content)}; the chat template leaves it out; "
                        f"it must take a message of role {message['role']!r} with this kind of content"
                    )
        tail = pieces[-1][0]
        return RenderedPrompt(pieces, media, tail.rfind("<think>") > tail.rfind("</think>"), authors)

    @property
    def end_of_turn(self) -> str:
        """The control token that ends an answer."""
        return self._variables.get("eos_token") or _END_OF_TURN

    def _leaves_tools_out(
        self,
        pieces: list[tuple[str, bool]],
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any],
        generation_prompt: bool,
    ) -> bool:
        try:
            return pieces == self._pieces(messages, [], variables, generation_prompt)[0]
        except UserError:  # these messages need tools
            return False

    def _pieces(
        self,
        messages: list[dict[str, Any]],
        tools: list[Mapping[str, Any]],
        variables: Mapping[str, Any],
        generation_prompt: bool,
    ) -> tuple[list[tuple[str, bool]], list[int | None]]:
        placeholders = _Placeholders([messages, tools, variables])
        given = self._variables | {name: placeholders.hide(value) for name, value in variables.items()}
        given |= {
            _PLACEHOLDERS: placeholders,
            "messages": [
                {**placeholders.hide(message, index), "role": message["role"]} for index, message in enumerate(messages)
            ],
            "tools": placeholders.hide(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        try:
            return placeholders.split(self._template.render(given))
        except Exception as error:  # a template can raise anything, such as ZeroDivisionError or RecursionError
            reason = " ".join(placeholders.reveal(str(error)).split())[:200] or type(error).__name__
            raise UserError(f"the chat template does not take these messages: {reason}") from error


def _strings(value: Any) -> Iterator[str]:
    """All strings in `value`, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


@jinja2.pass_context
def _tojson(context: jinja2.runtime.Context, value: Any, indent: int | None = None, **_: Any) -> str:
    """The filter `tojson`. It escapes the real strings, and hides the resulting JSON as a text of the user."""
    placeholders = context[_PLACEHOLDERS]
    author = placeholders.author_of(json.dumps(value, ensure_ascii=False))
    return placeholders.hide(json.dumps(placeholders.reveal(value), ensure_ascii=False, indent=indent), author)


def _texts(content: str | list[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
