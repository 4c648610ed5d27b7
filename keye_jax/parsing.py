"""Reads JSON and YAML that others wrote: bounds are checked before anything is built of it.

Size, encoding and depth are checked first. Then numbers must be finite and of at most `MAX_DIGITS` characters, and a
key may stand once. So a damaged or hostile file is one `UserError`, never an error of recursion, memory or arithmetic.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from keye_jax.errors import UserError, shorten

MAX_BYTES = 16 << 20
"""Most bytes of a JSON file."""

MAX_YAML_BYTES = 256 << 10
MAX_DEPTH = 100
"""Levels of lists and objects inside each other."""

MAX_DIGITS = 100
"""Characters of a number."""

# A string, whether or not it ends: what is left over holds all brackets. It never tries a byte twice.
_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      UserError: the file is too large, is not JSON in UTF-8, holds no object, or exceeds a bound of this module.
      FileNotFoundError: there is no such file.
    """
    values = parse_json(_read(Path(path), MAX_BYTES), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {shorten(values)}; it must be a JSON object")
    return values


def parse_json(content: bytes, source: str) -> Any:
    """Reads JSON.

    Args:
      source: what messages call the content.

    Raises:
      UserError: as `read_json` does, but for the size.
    """
    text = _decode(content, source, "JSON")
    levels = (1 if bracket in b"[{" else -1 for bracket in _BRACKET.findall(_JSON_STRING.sub(b"", content)))
    _check_depth(max(itertools.accumulate(levels), default=0), source)
    try:
        return json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_float, object_pairs_hook=_object
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {error}") from error


def read_yaml(path: str | Path) -> Any:
    """Reads a YAML file of one document, without anchors, aliases or tags of its own.

    Raises:
      UserError: the file is too large, is not such YAML in UTF-8, or exceeds a bound of this module.
      FileNotFoundError: there is no such file.
    """
    source = str(path)
    text = _decode(_read(Path(path), MAX_YAML_BYTES), source, "YAML")
    try:
        _check_events(text, source)
        return yaml.load(text, Loader=_Loader)
    except UserError:
        raise
    # YAML's own tags convert with Python's functions, whose errors come as they are.
    except (yaml.YAMLError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def _read(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes:,} bytes; it must have at most {max_bytes:,}")
    return content


def _decode(content: bytes, source: str, kind: str) -> str:
    if content.startswith(_BYTE_ORDER_MARKS):
        raise UserError(f"{source} begins with a byte order mark; it must be {kind} in UTF-8 without one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not {kind}: it must be in UTF-8 ({error})") from error


def _check_depth(depth: int, source: str) -> None:
    if depth > MAX_DEPTH:
        raise UserError(f"{source} has lists or objects {depth:,} levels deep; at most {MAX_DEPTH} are allowed")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text):,} digits; at most {MAX_DIGITS} are allowed")
    return int(text)


def _float(text: str) -> float:
    number = float(text) if len(text) <= MAX_DIGITS else math.nan
    if not math.isfinite(number):
        raise ValueError(f"the number {shorten(text)[1:-1]} is not finite, or too long")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shorten(twice)} stands twice in one object")
    return values


def _check_events(text: str, source: str) -> None:
    """Refuses depth, aliases and tags while the text is scanned, before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            _check_depth(depth, source)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UserError(f"{source} has an anchor or an alias in line {line}; write the value where it is used")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise UserError(f"{source} has the tag {shorten(event.tag)} in line {line}; tags are not allowed")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which plain YAML would silently keep the last, and numbers without bounds."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        if node.tag in _NUMBER_TAGS and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number has {len(node.value):,} digits; at most {MAX_DIGITS} are allowed")
        return super().construct_scalar(node)

    def construct_finite(self, node: Any) -> float:
        number = self.construct_yaml_float(node)
        if not math.isfinite(number):
            raise ValueError(f"the number {node.value} is not finite")
        return number


_Loader.add_constructor(_NUMBER_TAGS[1], _Loader.construct_finite)
