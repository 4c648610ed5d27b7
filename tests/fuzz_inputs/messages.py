"""Message files: requests of every shape that tools send, and damage to their values and to their text."""

from __future__ import annotations

import base64
import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Files of `seeds` that requests name.
PICTURES = ("plain.png", "exif.jpg", "alpha.webp", "deep.tif", "pictures.gif")
VIDEOS = ("plain.mp4", "uneven.mkv", "alpha.webm", "rotated.mov", "animation.gif")
# Values of options that go together. A request takes some of the groups of a kind.
_IMAGE_OPTIONS: tuple[dict[str, Any], ...] = (
    *({"min_pixels": 3136}, {"max_pixels": 50176}, {"resized_height": 56, "resized_width": 84}),
    *({"detail": "low"}, {"detail": "high"}, {"detail": "auto"}, {"cache_control": {"type": "ephemeral"}}),
)
_VIDEO_OPTIONS: tuple[dict[str, Any], ...] = (
    *({"min_pixels": 50176}, {"max_pixels": 200704}, {"total_pixels": 1003520}, {"min_frames": 2}, {"max_frames": 4}),
    *(
        {"fps": 2},
        {"fps": 0.5},
        {"nframes": 4},
        {"num_frames": 5},
        {"frame_times": [0, 0.5]},
        {"frame_indices": [0, 3]},
    ),
    *(
        {"start": 0, "end": 0.5},
        {"video_start": "00:00.1"},
        {"end": "0:01"},
        {"resized_height": 280, "resized_width": 84},
    ),
    *({"sample_fps": 4.0}, {"native_fps": 29.97}, {"subtitles": "words.srt"}, {"detail": "low"}),
)
_OPTION_VALUES = {name: value for group in (*_IMAGE_OPTIONS, *_VIDEO_OPTIONS) for name, value in group.items()}
_NAMES = (
    *(
        "type",
        "role",
        "content",
        "text",
        "image",
        "image_url",
        "video",
        "video_url",
        "input_text",
        "input_image",
        "url",
    ),
    *("path", "source", "messages", "tools", "tool_calls", "tool_call_id", "function", "name", "arguments", "data"),
    *("preprocess_kwargs", "media_io_kwargs", "mm_processor_kwargs", "chat_template_kwargs", "enable_thinking"),
    *("images_kwargs", "videos_kwargs", "extra_body", "base64", "value", "file", "file_data", "filename"),
    *("reasoning_content", "system", "developer", "user", "assistant", "tool", *_OPTION_VALUES),
)
_DIGITS = (20, 39, 309, 401, 4301, 5001)
_DEPTHS = (10, 200, 1500, 100_000)
_MARK = "\ue010"
_ODD_SOURCES = (
    *(
        "",
        " ",
        ".",
        "/",
        "~",
        "~nobody",
        "-",
        "file:",
        "file://a/b",
        "file:///%00",
        "no\x00name",
        "a" * 5000,
        "a/" * 3000,
    ),
    *(
        "http://",
        "https://[",
        "ftp://a/b",
        "data:",
        "data:,",
        "data:;base64,",
        "data:image/png;base64,AAAA",
        "%",
        "?a#b",
    ),
    *("data:video/jpeg;base64,,,", "data:;base64,%", "plain.png/", "words.srt", "C:\\clip.mp4", "plain.mp4\ud800"),
)


class _Raw(str):
    """A piece of JSON that `json.dumps` cannot write."""


def request(rng: random.Random, folder: Path) -> tuple[bytes, str, str]:
    """A damaged message file.

    Args:
      rng: what draws it.
      folder: where the files of `seeds` lie. Requests name them by relative paths, and hold the content of some.

    Returns:
      the file's content, its shape, and the damage to it.
    """
    shape = rng.choice(_SHAPES)
    tree = shape(rng, folder)
    what = []
    for damage in rng.choices(_VALUE_DAMAGE, k=rng.choice((0, 1, 1, 2, 3))):
        tree = damage(rng, tree)
        what.append(damage)
    data = _write(rng, tree)
    if not what or rng.random() < 0.3:
        damage = rng.choice(_TEXT_DAMAGE)
        data = damage(rng, data)
        what.append(damage)
    return data, _title(shape), ", ".join(map(_title, what))


def _title(function: Callable[..., Any]) -> str:
    return function.__name__.strip("_").replace("_", " ")


def _write(rng: random.Random, tree: Any) -> bytes:
    raw: list[str] = []

    def mark(value: Any) -> Any:
        if isinstance(value, _Raw):
            raw.append(str(value))
            return f"{_MARK}{len(raw) - 1}{_MARK}"
        if isinstance(value, dict):
            return {key: mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(mark(tree), ensure_ascii=False, indent=rng.choice((None, 1)))
    text = re.sub(f'"{_MARK}(\\d+){_MARK}"', lambda match: raw[int(match[1])], text)
    if rng.random() < 0.5:
        text = "".join(_escape(character) if ord(character) > 127 else character for character in text)
    return text.encode("utf-8", "surrogatepass")


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1]


# Shapes of requests.


def _base64(folder: Path, name: str) -> str:
    return base64.b64encode((folder / name).read_bytes()).decode()


def _source(rng: random.Random, folder: Path, names: tuple[str, ...], mime: str) -> str:
    name = rng.choice(names)
    content = _base64(folder, name)
    return rng.choice((name, name, f"file:{name}", f"data:{mime};base64,{content}", content))


def _options(rng: random.Random, kind: str, most: int = 2) -> dict[str, Any]:
    groups = _IMAGE_OPTIONS if kind == "image" else _VIDEO_OPTIONS
    chosen = rng.sample(groups, rng.choice((0, *range(most + 1))))
    return {name: copy.deepcopy(value) for group in chosen for name, value in group.items()}


def _text(rng: random.Random) -> str:
    texts = (
        "What is this?",
        "",
        "<|image_pad|>",
        "<|im_end|>\n<|im_start|>system",
        "汉字 👩‍👩‍👧 é",
        "</think>",
        "a" * 5000,
    )
    return rng.choice(texts)


def _media_part(rng: random.Random, folder: Path) -> dict[str, Any]:
    kind, names, mime = rng.choice((("image", PICTURES, "image/png"), ("video", VIDEOS, "video/mp4")))
    source, content = _source(rng, folder, names, mime), _base64(folder, rng.choice(names))
    name = f"{kind}_url"
    forms = (
        {"type": name, name: {"url": source, **_options(rng, kind)}},
        {"type": name, name: {"url": source}, **_options(rng, kind)},
        {"type": name, name: source},
        {"type": kind, kind: source, **_options(rng, kind)},
        {"type": kind, kind: source, "preprocess_kwargs": _options(rng, kind)},
        {"type": kind, rng.choice(("path", "url")): source},
        {"type": kind, "base64": content},
        {name: {"url": source}},
        {kind: source},
        {"type": f"input_{kind}", name: source, **_options(rng, kind, 1)},
        {"type": kind, "source": {"type": "base64", "media_type": mime, "data": content}},
        {"type": "file", "file": {"file_data": f"data:{mime};base64,{content}", "filename": names[0]}},
    )
    return rng.choice(forms)


def _text_part(rng: random.Random) -> dict[str, Any] | str:
    text = _text(rng)
    parts = ({"type": "text", "text": text}, {"type": "input_text", "text": text}, {"type": "text", "value": text})
    return rng.choice((*parts, {"text": text}, text))


def _plain_text(rng: random.Random, folder: Path) -> Any:
    return [{"role": "user", "content": _text(rng)}]


def _one_medium(rng: random.Random, folder: Path) -> Any:
    return [{"role": "user", "content": [_media_part(rng, folder), _text_part(rng)]}]


def _several_media(rng: random.Random, folder: Path) -> Any:
    parts = [_media_part(rng, folder) for _ in range(rng.randrange(1, 4))] + [_text_part(rng)]
    rng.shuffle(parts)
    return {"messages": [{"role": "user", "content": parts}], **_request_options(rng)}


def _list_of_frames(rng: random.Random, folder: Path) -> Any:
    names = rng.choices(PICTURES, k=rng.randrange(1, 5))
    url = "data:video/jpeg;base64," + ",".join(_base64(folder, name) for name in names)
    video = rng.choice((names, [_source(rng, folder, PICTURES, "image/png") for _ in names], url))
    part = rng.choice(({"type": "video", "video": video}, {"type": "video_url", "video_url": {"url": video}}))
    return [{"role": "user", "content": [part | _options(rng, "video"), _text_part(rng)]}]


def _conversation(rng: random.Random, folder: Path) -> Any:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    messages = [
        {"role": rng.choice(("system", "developer")), "content": _text(rng) or "Be brief."},
        {"role": "user", "content": [_media_part(rng, folder), _text_part(rng)], "name": "somebody"},
        {"role": "assistant", "content": _text(rng), "reasoning_content": _text(rng)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": _text(rng)},
        {"role": "user", "content": _text(rng)},
    ]
    return rng.choice((messages, {"messages": messages, **_request_options(rng)}))


def _request_options(rng: random.Random) -> dict[str, Any]:
    function = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}
    given = {
        "tools": [{"type": "function", "function": function}],
        "media_io_kwargs": {"video": _options(rng, "video"), "image": {}},
        "mm_processor_kwargs": rng.choice((_options(rng, "image"), {"videos_kwargs": _options(rng, "video")})),
        "extra_body": {"chat_template_kwargs": {"enable_thinking": True}},
        "chat_template_kwargs": {"enable_thinking": rng.random() < 0.5},
        "model": "keye",
        "temperature": 0.5,
        "max_tokens": 16,
    }
    return {name: given[name] for name in rng.sample(sorted(given), rng.choice((0, 0, 1, 3)))}


_SHAPES = (_plain_text, _one_medium, _one_medium, _several_media, _list_of_frames, _conversation)


# Damage to the values of a request.


def _odd_value(rng: random.Random) -> Any:
    text = rng.choice(
        ("\x00", "\x1b[31m", "\r\nb", "\ud800", "\udfff\ud800", "\u2028", "\ufeff", "\ue0000\ue001", "a" * 100_000)
    )
    digits = "9" * rng.choice(_DIGITS)
    depth = rng.choice(_DEPTHS)
    number = rng.choice(
        (
            0,
            -1,
            1,
            0.5,
            5e-324,
            1e-308,
            1e308,
            -1e300,
            1 << 31,
            1 << 63,
            -(1 << 63),
            1 << 64,
            1e9,
            1000,
            13_000,
            178_956_970,
            10**12,
        )
    )
    clock = rng.choice(("0:00:00:00", "99:99", "-1:00", "1e400", "nan", "٣", "1:2:3.4.5", "00:00:", "inf"))
    raws = ("NaN", "Infinity", "-Infinity", digits, f"-{digits}.5", f"1e{digits}", "1e400", "[" * depth + "]" * depth)
    raw = _Raw(rng.choice((*raws, '{"a":' * depth + "1" + "}" * depth)))
    empty = rng.choice((None, True, False, [], {}, "", [[]], [None], {"": ""}, [{}], {"type": "text"}))
    return rng.choice(
        (text, number, number, raw, raw, empty, empty, rng.choice(_ODD_SOURCES), clock, rng.choice(_NAMES))
    )


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values within a tree; the root is not among them."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, item in items for place in ((*path, key), *_places(item, (*path, key)))]


def _holder(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _holders(tree: Any, kind: type) -> list[Any]:
    """All values of type `kind` within a tree."""
    found = [tree, *(_holder(tree, path)[path[-1]] for path in _places(tree))]
    return [value for value in found if isinstance(value, kind) and value]


def _copies(value: Any, count: int) -> list[Any]:
    return [copy.deepcopy(value) for _ in range(count)]


def _other_value(rng: random.Random, tree: Any) -> Any:
    places = _places(tree)
    if not places or rng.random() < 0.02:
        return _odd_value(rng)
    path = rng.choice(places)
    _holder(tree, path)[path[-1]] = _odd_value(rng)
    return tree


def _swapped_values(rng: random.Random, tree: Any) -> Any:
    places = _places(tree)
    if len(places) > 1:
        first, second = rng.sample(places, 2)
        one, other = (copy.deepcopy(_holder(tree, path)[path[-1]]) for path in (first, second))
        _holder(tree, second)[second[-1]] = one
        # The first place may lie within what was just replaced.
        if first[: len(second)] != second:
            _holder(tree, first)[first[-1]] = other
    return tree


def _missing_key(rng: random.Random, tree: Any) -> Any:
    if places := _places(tree):
        path = rng.choice(places)
        del _holder(tree, path)[path[-1]]
    return tree


def _extra_key(rng: random.Random, tree: Any) -> Any:
    if objects := _holders(tree, dict):
        value = _OPTION_VALUES[rng.choice(sorted(_OPTION_VALUES))]
        rng.choice(objects)[rng.choice(_NAMES)] = copy.deepcopy(rng.choice((value, _odd_value(rng), _copies(value, 3))))
    return tree


def _other_key(rng: random.Random, tree: Any) -> Any:
    if objects := _holders(tree, dict):
        chosen = rng.choice(objects)
        value = chosen.pop(rng.choice(list(chosen)))
        chosen[rng.choice((*_NAMES, "\ud800", "\x00", "", "Type", "type "))] = value
    return tree


def _odd_option(rng: random.Random, tree: Any) -> Any:
    if objects := _holders(tree, dict):
        rng.choice(objects)[rng.choice(sorted(_OPTION_VALUES))] = _odd_value(rng)
    return tree


def _odd_source(rng: random.Random, tree: Any) -> Any:
    names = ("url", "path", "image", "video", "image_url", "video_url", "base64", "data", "file_data")
    if places := [path for path in _places(tree) if path[-1] in names]:
        path = rng.choice(places)
        value = _holder(tree, path)[path[-1]]
        changed = (
            [f" {value}", f"{value}\n", [value, value], value[: len(value) // 2]] if isinstance(value, str) else []
        )
        _holder(tree, path)[path[-1]] = rng.choice((*changed, *_ODD_SOURCES))
    return tree


def _repeated_item(rng: random.Random, tree: Any) -> Any:
    if lists := _holders(tree, list):
        chosen = rng.choice(lists)
        chosen += _copies(rng.choice(chosen), rng.choice((1, 2, 20)))
    return tree


def _wrapped_value(rng: random.Random, tree: Any) -> Any:
    if places := _places(tree):
        path = rng.choice(places)
        holder = _holder(tree, path)
        value = holder[path[-1]]
        holder[path[-1]] = rng.choice(
            ([value], {"url": value}, {rng.choice(_NAMES): value}, str(value), _copies(value, 2))
        )
    return tree


_VALUE_DAMAGE = (
    *(
        _other_value,
        _other_value,
        _odd_option,
        _odd_option,
        _odd_source,
        _swapped_values,
        _missing_key,
        _extra_key,
        _other_key,
    ),
    *(_repeated_item, _wrapped_value),
)


# Damage to the text of a request.


def _truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _random_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 20))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _inserted_text(rng: random.Random, data: bytes) -> bytes:
    pieces = (
        b"\x00",
        b"\x1b",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"}",
        b"]",
        b",",
        b'"',
        b"\\u",
        b"\\",
        b"//",
        b"\n\n",
        b"[" * 2000,
    )
    place = rng.randrange(len(data))
    return data[:place] + rng.choice(pieces) + data[place:]


def _huge_number(rng: random.Random, data: bytes) -> bytes:
    numbers = list(re.finditer(rb"(?<![\w.])\d+(?![\w.])", data))
    if not numbers:
        return data
    chosen = rng.choice(numbers)
    return data[: chosen.start()] + b"9" * rng.choice(_DIGITS) + data[chosen.end() :]


def _deep_nesting(rng: random.Random, data: bytes) -> bytes:
    depth = rng.choice(_DEPTHS)
    start, stop = rng.choice(((b"[", b"]"), (b'{"messages":', b"}"), (b'{"a":', b"}")))
    return start * depth + data + stop * rng.choice((depth, depth, 0))


def _byte_order_mark(rng: random.Random, data: bytes) -> bytes:
    return b"\xef\xbb\xbf" + data


def _other_encoding(rng: random.Random, data: bytes) -> bytes:
    encodings = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-7")
    return data.decode("utf-8", "surrogatepass").encode(rng.choice(encodings), "replace")


def _half_of_a_pair(rng: random.Random, data: bytes) -> bytes:
    return data.replace(b'": "', rng.choice((b'": "\\ud83d', b'": "\xed\xa0\xbd', b'": "\\udc00\\ud800')), 1)


def _repeated_text(rng: random.Random, data: bytes) -> bytes:
    start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 10)) + data[stop:]


def _repeated_key(rng: random.Random, data: bytes) -> bytes:
    return data.replace(
        b"{", rng.choice((b'{"role": 1, ', b'{"content": null, ', b'{"type": [], ')), rng.choice((1, -1))
    )


_TEXT_DAMAGE = (
    *(_truncated, _random_bytes, _inserted_text, _huge_number, _deep_nesting, _byte_order_mark, _other_encoding),
    *(_half_of_a_pair, _repeated_text, _repeated_key),
)
