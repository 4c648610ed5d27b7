"""The shape of requests: messages, their parts and options, in the forms of the OpenAI interface and of other tools."""

from __future__ import annotations

import dataclasses
import json
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keye_jax.errors import UserError, shorten, shorten_name
from keye_jax.processor.data_url import is_data_url, split_frames
from keye_jax.processor.options import collect_options

ROLES = ("system", "developer", "user", "assistant", "tool")
# Levels of lists and objects inside each other.
MAX_DEPTH = 100

_TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
_TEXT_KEYS = ("text", "refusal", "value")
_MEDIA_TYPES = {
    **{"image": "image", "image_url": "image", "input_image": "image"},
    **{"video": "video", "video_url": "video", "input_video": "video"},
}
_FILE_TYPES = ("file", "input_file")
_PART_TYPES = ("text", *_MEDIA_TYPES, *_TEXT_TYPES[1:], *_FILE_TYPES)
# Where the source of a part may stand: under the name of its kind, or under any of these.
_KIND_KEYS = {"image": ("image", "image_url"), "video": ("video", "video_url")}
_SOURCE_KEYS = ("url", "path", "source", "base64", "data", "value", "file", "file_url", "file_data")
_BASE64_KEYS = ("base64", "data", "file_data")
# Fields of a message with media, which belong into its content here.
_MEDIA_FIELDS = ("image", "images", "video", "videos", "audio")
# Variables of chat templates that are not a request's own.
_TEMPLATE_NAMES = ("messages", "tools", "documents", "add_generation_prompt")
_REQUEST_KEYS = ("messages", "tools", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs")
_MAX_DIGITS = 4300


@dataclasses.dataclass(frozen=True)
class MediaPart:
    """One image or video of a request.

    Attributes:
      kind: "image" or "video".
      source: a path, a URL, the content of a file, an image or an array; for a video also a list of them.
      options: its options by name, checked; see `keye_jax.processor.options`.
      field: the name of the source in error messages.
      part_field: the name of the message part in error messages.
    """

    kind: str
    source: Any
    options: Mapping[str, Any]
    field: str
    part_field: str


def read_request(content: bytes, field: str) -> dict[str, Any]:
    """Reads a conversation or a request body from JSON in UTF-8, UTF-16 or UTF-32.

    Args:
      content: a list of messages, or an object with `messages`, `tools`, `chat_template_kwargs`, `media_io_kwargs` and
        `mm_processor_kwargs`. Those may also stand in `extra_body`. Other keys, such as `model`, are left out.
      field: the name of the content in error messages.

    Returns:
      The arguments of `Processor.plan` by name. They are not checked yet.

    Raises:
      UserError: the content is not JSON, or holds no messages.
    """
    if not content.strip(b"\0 \t\r\n"):
        raise UserError(f"{field}; it must hold messages, but it is empty")
    values = read_json(content, field)
    if isinstance(values, Mapping):
        extra = values.get("extra_body")
        values = {**values, **extra} if isinstance(extra, Mapping) else values
    else:
        values = {"messages": values}
    request = {name: values[name] for name in _REQUEST_KEYS if values.get(name) is not None}
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{field}; it must hold a list of messages, or an object with one")
    return request


def read_json(content: bytes, field: str) -> Any:
    """Reads JSON in UTF-8, UTF-16 or UTF-32, whatever the bytes are.

    Args:
      field: the name of the content in error messages.

    Raises:
      UserError: the content is not JSON.
    """
    try:
        return json.loads(content, parse_int=_integer)
    except RecursionError as error:
        raise UserError(f"{field}; its lists and objects must be at most {MAX_DEPTH} levels deep") from error
    except ValueError as error:
        raise UserError(f"{field}; it must be JSON ({error})") from error


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text):,} digits, at most {_MAX_DIGITS:,} are allowed")
    return int(text)


def check_depth(value: Any, field: str) -> None:
    """Refuses lists and objects that lie more than `MAX_DEPTH` levels inside each other, or inside themselves."""
    levels = [iter([value])]
    while levels:
        item = next(levels[-1], levels)
        if item is levels:
            levels.pop()
        elif isinstance(item, Mapping | list | tuple):
            if len(levels) > MAX_DEPTH:
                raise UserError(f"{field} is too deep; its lists and objects must be at most {MAX_DEPTH} levels deep")
            levels.append(iter(item.values() if isinstance(item, Mapping) else item))


def check_tools(tools: Any) -> list[Mapping[str, Any]]:
    """Checks descriptions of functions in the OpenAI shape. None is an empty list."""
    if tools is None:
        return []
    check_depth(tools, "tools")
    if not isinstance(tools, list | tuple):
        raise UserError(f"tools is {shorten(tools)}; it must be a list of functions")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"tools[{index}] is {shorten(tool)}; it must be an object with function.name")
    return list(tools)


def check_template_variables(variables: Any, field: str) -> dict[str, Any]:
    """Checks variables of a request for the chat template. None is an empty dictionary."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise UserError(f"{field} is {shorten(variables)}; it must be an object")
    check_depth(variables, field)
    for name in variables:
        if not isinstance(name, str) or name.startswith("_") or name in _TEMPLATE_NAMES:
            raise UserError(f"{field}.{shorten_name(name)} is not known; a request cannot set this variable")
    return dict(variables)


def check_messages(messages: Any) -> tuple[list[dict[str, Any]], list[MediaPart]]:
    """Checks the shape of messages.

    Args:
      messages: see `Processor.plan`.

    Returns:
      The messages as chat templates expect them, and their images and videos in order.

    Raises:
      UserError: a message does not have the shape.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"messages is {shorten(messages)}; it must be a list of at least one message")
    checked: list[dict[str, Any]] = []
    media: list[MediaPart] = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        check_depth(message, field)
        if not isinstance(message, Mapping):
            raise UserError(f"{field} is {shorten(message)}; it must be an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{field}.role is {shorten(role)}; it must be one of {', '.join(ROLES)}")
        for name in _MEDIA_FIELDS:
            if message.get(name) is not None:
                raise UserError(f"{field}.{name} is not known; images and videos must be parts of content")
        result: dict[str, Any] = {"role": "system" if role == "developer" else role}
        content = message.get("content")
        if content is None and role == "assistant":
            content = "" if message.get("refusal") is None else message["refusal"]
        result["content"] = _check_content(content, f"{field}.content", media)
        for name in ("reasoning_content", "name", "tool_call_id"):
            value = message.get(name)
            if value is not None:
                if not isinstance(value, str):
                    raise UserError(f"{field}.{name} is {shorten(value)}; it must be a string")
                result[name] = value
        if calls := _check_tool_calls(message.get("tool_calls"), f"{field}.tool_calls"):
            result["tool_calls"] = calls
        checked.append(result)
    return checked, media


def _check_tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        raise UserError(f"{field} is {shorten(calls)}; it must be a list")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{field}[{index}] is {shorten(call)}; it must be an object with function.name")
    return [dict(call) for call in calls]


def _check_content(content: Any, field: str, media: list[MediaPart]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserError(f"{field} is {shorten(content)}; it must be a string or a list of parts")
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        where = f"{field}[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = _kind(part, where)
        if kind == "text":
            parts.append({"type": "text", "text": _text(part, where)})
        else:
            media.append(_media_part(kind, part, where))
            parts.append({"type": kind})
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _kind(part: Any, where: str) -> str:
    """What a part is: "text", "image" or "video". A part without a type shows it by its keys."""
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {shorten(part)}; it must be a string or an object with type")
    name = part.get("type")
    if name is None:
        kinds = {
            kind
            for kind, keys in (("text", ("text",)), *_KIND_KEYS.items())
            if any(part.get(key) is not None for key in keys)
        }
        if len(kinds) == 1:
            return kinds.pop()
    if isinstance(name, str):
        if name in _TEXT_TYPES:
            return "text"
        if name in _MEDIA_TYPES:
            return _MEDIA_TYPES[name]
        if name in _FILE_TYPES:
            return _kind_of_file(part, where)
    raise UserError(f"{where}.type is {shorten(name)}; it must be one of {', '.join(_PART_TYPES)}")


def _kind_of_file(part: Mapping[str, Any], where: str) -> str:
    """Whether a file is an image or a video: by the type in its `data:` URL, or by the ending of its name."""
    inner = part.get("file")
    values = inner if isinstance(inner, Mapping) else part
    for key in ("file_data", "filename", "file_url", "url", "path", "file"):
        if isinstance(name := values.get(key), str):
            name = name.strip() if is_data_url(name) else name[-300:].partition("?")[0]
            kind = (mimetypes.guess_type(name, strict=False)[0] or "").partition("/")[0]
            if kind in ("image", "video"):
                return kind
    raise UserError(f"{where} is {shorten(dict(part))}; a file must be an image or a video by its type or its name")


def _text(part: Mapping[str, Any], where: str) -> str:
    key = next((key for key in _TEXT_KEYS if part.get(key) is not None), "text")
    if not isinstance(part.get(key), str):
        raise UserError(f"{where}.{key} is {shorten(part.get(key))}; it must be a string")
    return part[key]


def _media_part(kind: str, part: Mapping[str, Any], where: str) -> MediaPart:
    source, field, levels = _locate(kind, part, where)
    if kind == "video" and isinstance(source, str) and (frames := split_frames(source)):
        source = frames
    is_frames = isinstance(source, list | tuple | np.ndarray)
    options = collect_options(kind, levels, is_frames=is_frames)
    if kind == "video" and isinstance(source, list | tuple):
        source = list(_frames(source, field))
    return MediaPart(kind, source, options, field, where)


def _frames(sources: Sequence[Any], field: str) -> Iterator[Any]:
    """The sources of a list of frames, each of which may be a part of its own."""
    for index, frame in enumerate(sources):
        where = f"{field}[{index}]"
        if isinstance(frame, Mapping):
            frame, _, levels = _locate("image", frame, where)
            if options := collect_options("image", levels, is_frames=False).keys() - {"detail"}:
                raise UserError(f"{where}.{min(options)} is not known; options must be those of the whole video")
        yield frame


def _locate(
    kind: str, part: Mapping[str, Any], where: str
) -> tuple[Any, str, list[tuple[Mapping[str, Any], str, str]]]:
    """Finds the source of a part.

    Returns:
      The source, its name in error messages, and rows (values, field, key) for the objects around it, from outside.
    """
    levels: list[tuple[Mapping[str, Any], str, str]] = []
    source, field = part, where
    while isinstance(source, Mapping):
        values = {key: value for key, value in source.items() if value is not None}
        given = [key for key in (*_KIND_KEYS[kind], *_SOURCE_KEYS) if key in values]
        if not given:
            wanted = "url" if levels else _wanted_key(kind, part)
            raise UserError(f"{field}.{wanted} is missing; it must be a path, a URL or an object with url")
        if len(given) > 1:
            raise UserError(f"{field}.{given[1]} is given beside {given[0]}; a part must have one source")
        key = given[0]
        levels.append((values, field, key))
        source, field = values[key], f"{field}.{key}"
        if key in _BASE64_KEYS and isinstance(source, str) and not is_data_url(source):
            media_type = values.get("media_type")
            source = f"data:{media_type if isinstance(media_type, str) else ''};base64,{source}"
    return source, field, levels


def _wanted_key(kind: str, part: Mapping[str, Any]) -> str:
    name = part.get("type")
    return name if name in _KIND_KEYS[kind] else f"{kind}_url"
