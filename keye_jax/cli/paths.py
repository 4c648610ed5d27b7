"""Paths on the command line: `~` in quotes, and URLs where only a path of this machine can be."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from keye_jax.errors import UserError

# Parameters that take a path as text, since they may also be a preset, a pattern, a URL or standard input.
_TEXTS = {"sharding", "image", "video", "videos", "subtitles", "train", "config"}
# Parameters that may be the URL of a checkpoint in a bucket.
_BUCKETS = {"checkpoint", "paths", "path", "config"}


class App(typer.Typer):
    """A Typer app whose commands get every path with `~` expanded.

    The shell does that only without quotes, and not behind `=`.
    """

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        register = super().command(*args, **kwargs)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_paths(function))
            return function

        return decorate


def _with_paths(function: Callable[..., Any]) -> Callable[..., Any]:
    names = {
        name: _option(name, parameter.annotation)
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
    }

    @functools.wraps(function)
    def call(**values: Any) -> Any:
        return function(**{name: _expanded(name, names[name], value) for name, value in values.items()})

    return call


def _option(name: str, annotation: Any) -> str:
    """What the user calls a parameter."""
    found = next((each for each in getattr(annotation, "__metadata__", ()) if hasattr(each, "param_decls")), None)
    declared = [text for text in getattr(found, "param_decls", None) or () if text.startswith("--")]
    return declared[0] if declared else f"--{name.replace('_', '-')}"


def _expanded(name: str, option: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(name, option, each) for each in value]
    if not isinstance(value, Path) and not (isinstance(value, str) and name in _TEXTS):
        return value
    text = str(value)
    # `pathlib` has made one slash of two.
    if isinstance(value, Path) and name not in _BUCKETS and (url := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text)):
        shown = f"{url[1]}://{text[url.end() :]}"
        raise UserError(f"{option} is {shown!r}; it must be a path of this machine, not a URL")
    if not text.startswith("~"):
        return value
    try:
        found = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{option} is {text!r}; there is no such user, or no home directory") from error
    return found if isinstance(value, Path) else str(found)
