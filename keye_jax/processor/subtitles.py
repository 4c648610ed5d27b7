"""Subtitles: SRT, WebVTT and JSON lines, and the text streams of a video file."""

from __future__ import annotations

import codecs
import dataclasses
import html
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keye_jax.errors import UserError

MAX_SUBTITLE_BYTES = 64 << 20
_TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
# Tags of SRT and WebVTT, and times within a WebVTT cue. Other text between angle brackets is text.
_NAMES = "b|i|u|s|font|c|v|lang|ruby|rt|span|br|em|strong"
_TAG = re.compile(rf"</?(?:{_NAMES})(?:[\s.:=/][^<>]*)?>|<[\d:.]+>", re.IGNORECASE)
_ASS_OVERRIDE = re.compile(r"\{\\[^{}]*\}")
_NO_CUE = ("WEBVTT", "NOTE", "STYLE", "REGION", "X-TIMESTAMP-MAP")
# Codecs of text, with the containers that hold them. Bitmaps, such as those of DVDs, are no text.
_TEXT_CODECS = ("subrip", "mov_text", "webvtt", "ass", "ssa", "text", "srt")
_CONTAINERS = "mov,mp4,matroska,webm,avi,ogg,nut,mpegts,asf"


@dataclasses.dataclass(frozen=True)
class Cue:
    """A subtitle: its text on one line, and when it is shown, in seconds from the first frame of the video."""

    start: float
    end: float
    text: str


def read_subtitles(source: Path | bytes, field: str, warn: Callable[[str], None]) -> tuple[Cue, ...]:
    """Reads SRT, WebVTT, or JSON lines of `{"start": seconds, "end": seconds, "text": ...}`.

    The text is UTF-8, UTF-16 with a byte-order mark, or else Latin-1. Markup is removed.

    Args:
      source: a path, or the content of a file.
      field: the name of the subtitles in error messages.
      warn: takes a sentence about cues that are left out.

    Returns:
      The cues by increasing start.

    Raises:
      UserError: the file is too large, or has no cue.
    """
    text = _decode(source, field)
    start = text.lstrip()[:1]
    results = list(_json_lines(text) if start == "{" else _blocks(text))
    cues = [cue for cue in results if cue is not None]
    if not cues:
        raise UserError(f"{field} holds no subtitles; it must be SRT, WebVTT, or JSON lines with start, end and text")
    if len(cues) < len(results):
        warn(f"{field} has {len(results) - len(cues)} broken of {len(results)} subtitles; they are left out")
    return _sorted(cues)


def container_subtitles(source: Path | bytes, field: str) -> tuple[Cue, ...]:
    """Reads the text stream of a video file: the default one, or else the first.

    Args:
      source: a path, or the content of a file.
      field: the name of the video in error messages.

    Returns:
      The cues by increasing start.

    Raises:
      UserError: PyAV is missing, or the file has no stream of subtitles that are text.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise UserError(f"{field} is a video, which needs PyAV: pip install 'keye-jax[video]'") from error
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    cues = []
    try:
        with av.open(opened, "r", options=options) as container:
            streams: list[Any] = [s for s in container.streams.subtitles if s.name in _TEXT_CODECS]
            if not streams:
                raise UserError(f"{field} has no text subtitles; give them as a file, or leave subtitles out")
            stream = next((s for s in streams if s.disposition & type(s.disposition).default), streams[0])
            video = next(iter(container.streams.video), None)
            zero = float(video.start_time * video.time_base) if video and video.start_time else 0.0
            for packet in container.demux(stream):
                text = _packet_text(bytes(packet), stream.name) if packet.size else ""
                if text and packet.pts is not None:
                    start = float(packet.pts * packet.time_base) - zero
                    cues.append(Cue(start, start + float((packet.duration or 0) * packet.time_base), text))
    except (FFmpegError, OSError) as error:
        if not cues:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{field} is not a file with subtitles that can be read: {reason}") from error
    return _sorted(cues)


def clip_cues(cues: Sequence[Cue], start: float | None, end: float | None) -> tuple[Cue, ...]:
    """The cues that are shown between `start` and `end`, in seconds; None is the start or the end of the video."""
    low, high = -math.inf if start is None else start, math.inf if end is None else end
    return tuple(cue for cue in cues if cue.start < high and max(cue.end, cue.start) >= low)


def _sorted(cues: Sequence[Cue]) -> tuple[Cue, ...]:
    """Cues that have text, by increasing start."""
    return tuple(sorted((cue for cue in cues if cue.text), key=lambda cue: cue.start))


def _decode(source: Path | bytes, field: str) -> str:
    if isinstance(source, bytes):
        data = source
    else:
        with source.open("rb") as file:
            data = file.read(MAX_SUBTITLE_BYTES + 1)
    if len(data) > MAX_SUBTITLE_BYTES:
        raise UserError(f"{field} is a file of more than {MAX_SUBTITLE_BYTES >> 20} MiB; subtitles must be smaller")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _blocks(text: str) -> Iterator[Cue | None]:
    """The cues of SRT or WebVTT; None for one that is broken."""
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")):
        lines = block.strip("\n").split("\n")
        # Some files have no empty line between two cues.
        starts = [number for number, line in enumerate(lines) if "-->" in line]
        if not starts and block.strip() and not block.strip().startswith(_NO_CUE):
            yield None
        for number, after in itertools.pairwise([*starts, len(lines)] if starts else ()):
            body = lines[number + 1 : after]
            if after < len(lines) and body and body[-1].strip().isdecimal():
                body = body[:-1]
            if (timing := _TIMING.fullmatch(lines[number])) is None:
                yield None
            else:
                parts = timing.groups()
                yield _cue(_seconds(parts[:4]), _seconds(parts[4:]), "\n".join(body))


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0) + float(f"0.{fraction}")


def _json_lines(text: str) -> Iterator[Cue | None]:
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            start, end, words = float(value["start"]), float(value["end"]), value["text"]
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            yield None
            continue
        yield _cue(start, end, words) if isinstance(words, str) else None


def _cue(start: float, end: float, text: str) -> Cue | None:
    valid = math.isfinite(start) and math.isfinite(end) and 0 <= start <= end
    return Cue(start, end, _plain(text)) if valid else None


def _plain(text: str) -> str:
    """A subtitle without markup, on one line."""
    text = _ASS_OVERRIDE.sub("", text).replace("\\N", " ").replace("\\n", " ").replace("\\h", " ")
    return " ".join(html.unescape(_TAG.sub("", text)).split())


def _packet_text(data: bytes, codec: str) -> str:
    if codec == "mov_text":
        data = data[2 : 2 + int.from_bytes(data[:2])]
    text = data.decode("utf-8", "replace").strip("\0")
    if codec in ("ass", "ssa"):
        # ReadOrder, Layer, Style, Name, MarginL, MarginR, MarginV, Effect, Text
        text = text.split(",", 8)[-1]
    return _plain(text)
