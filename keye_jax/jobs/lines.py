"""The lines of a job's input and output, in the shape of OpenAI's batch files."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from keye_jax.errors import UserError, shorten
from keye_jax.processor.messages import read_json

ENDPOINT = "/v1/chat/completions"
MAX_LINE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a job's lines that one process answers: those whose place in the input is `index` modulo `count`.

    Attributes:
      index: from 0.
      count: how many parts there are.
    """

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads "i/n". Raises UserError for anything else."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard is {shorten(text)}; it must be i/n with i from 0 to n - 1, such as 0/8")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Shard:
        """The shard that a Slurm job array or an indexed Kubernetes Job gives to this process; all lines without one.

        Raises:
          UserError: it is known which part this is, but not of how many; or a number is not one.
        """
        environ = {name: value for name, value in environ.items() if value}
        if "SLURM_ARRAY_TASK_ID" in environ:
            first, step = (_number(environ, f"SLURM_ARRAY_TASK_{name}", default) for name, default in _SLURM.items())
            index = (_number(environ, "SLURM_ARRAY_TASK_ID") - first) // max(1, step)
            names, count = "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT", _number(environ, "SLURM_ARRAY_TASK_COUNT")
        elif "JOB_COMPLETION_INDEX" in environ:
            index = _number(environ, "JOB_COMPLETION_INDEX")
            names, count = "JOB_COMPLETION_INDEX and JOB_COMPLETIONS", _number(environ, "JOB_COMPLETIONS")
        else:
            return cls()
        if not 0 <= index < count:
            raise UserError(
                f"{names} say part {index} of {count}; parts count from 0, and --shard i/n says it otherwise"
            )
        return cls(index, count)

    def size(self, lines: int) -> int:
        """How many of `lines` lines belong to this part."""
        return len(range(self.index, lines, self.count))

    def output(self, path: Path) -> Path:
        """The output of this part: "results.jsonl" is "results.3-of-8.jsonl"."""
        return path if self.count == 1 else path.with_name(f"{path.stem}.{self.index}-of-{self.count}{path.suffix}")


# Where a job array begins, and how far its numbers are apart.
_SLURM = {"MIN": "0", "STEP": "1"}


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None:
        raise UserError(f"{name} is not set; it must be the number of parts, or --shard must be i/n")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise UserError(f"{name} is {shorten(text)}; it must be a number")
    return int(text)


@dataclasses.dataclass(frozen=True)
class Line:
    """One request of the input.

    Attributes:
      number: of the line, from 1.
      custom_id: its name.
      body: of the chat completion; not checked yet.
    """

    number: int
    custom_id: str
    body: Any


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that holds no request.

    Attributes:
      number: of the line, from 1.
      custom_id: its name; None if it has none of its own.
      code, message: why.
    """

    number: int
    custom_id: str | None
    code: str
    message: str


def result_key(custom_id: str | None, number: int | None) -> bytes:
    """16 bytes that stand for the result of a line: for its `custom_id`, or without one for its number."""
    name = f"line {number}" if custom_id is None else f"id {custom_id}"
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16]


def count_lines(path: Path) -> tuple[str, int]:
    """The SHA-256 of a file in hexadecimal, and how many lines of it are not blank."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return digest, sum(1 for _ in _split(file))


def read_lines(file: BinaryIO, shard: Shard) -> Iterator[Line | BadLine]:
    """The requests of a shard, one after the other.

    All lines are read, so that a `custom_id` of one shard does not occur in another. It costs about 130 bytes a line.

    Args:
      file: at its beginning.
    """
    seen: dict[bytes, int] = {}
    for place, (number, content) in enumerate(_split(file)):
        line = _parse(number, content)
        if line.custom_id is not None:
            first = seen.setdefault(result_key(line.custom_id, None), number)
            if first != number:
                message = f"line {number}: custom_id is {shorten(line.custom_id)}; line {first} has the same"
                line = BadLine(number, None, "duplicate_custom_id", message)
        if place % shard.count == shard.index:
            yield line


def _split(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Lines that are not blank, by their numbers; None in place of one that is too long."""
    number = 0
    while content := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        whole = True
        while len(content) > MAX_LINE_BYTES and not content.endswith(b"\n"):
            whole, content = False, file.readline(MAX_LINE_BYTES + 1)
        if not whole:
            yield number, None
        elif not content.isspace():
            yield number, content


def _parse(number: int, content: bytes | None) -> Line | BadLine:
    if content is None:
        message = f"line {number} is too long; it must have at most {MAX_LINE_BYTES >> 20} MiB"
        return BadLine(number, None, "invalid_line", message)
    shown = f"line {number} is {shorten(content[:200].decode('utf-8', 'replace').strip())}"
    try:
        values = read_json(content, shown)
    except UserError as error:
        return BadLine(number, None, "invalid_line", str(error))
    if not isinstance(values, Mapping):
        message = f"{shown}; it must be an object with custom_id, method, url and body"
        return BadLine(number, None, "invalid_line", message)
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        message = f"line {number}: custom_id is {shorten(custom_id)}; it must be a string that is not empty"
        return BadLine(number, None, "invalid_line", message)
    for name, expected in (("method", "POST"), ("url", ENDPOINT)):
        if values.get(name) != expected:
            message = f"{name} is {shorten(values.get(name))}; it must be {expected!r}"
            return BadLine(number, custom_id, "invalid", message)
    return Line(number, custom_id, values.get("body"))


def response_record(custom_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the output with an answer."""
    response = {"status_code": 200, "request_id": uuid.uuid4().hex, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}


def error_record(custom_id: str | None, code: str, message: str, number: int | None = None) -> dict[str, Any]:
    """A line of the output without an answer; `number` is the line's, if it has no `custom_id`."""
    error: dict[str, Any] = {"code": code, "message": message}
    if custom_id is None:
        error["line"] = number
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": None, "error": error}


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as one line of UTF-8. What UTF-8 does not have, half a surrogate pair, is escaped."""
    try:
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        text = json.dumps(record, separators=(",", ":")).encode()
    return text + b"\n"


def video_lines(pattern: str, prompt: str) -> Iterator[bytes]:
    """Lines that ask the same of each video that a pattern finds, by name.

    The `custom_id` is the path below the pattern's folder.

    Args:
      pattern: of paths, with `*`, `?`, `[...]`, and `**` for folders at any depth.

    Raises:
      UserError: there is no such file, or the pattern is not one.
    """
    parts = Path(pattern).parts
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    folder = Path(*parts[: min(fixed, len(parts) - 1)])
    try:
        found = sorted(path for path in folder.glob(str(Path(*parts[len(folder.parts) :]))) if path.is_file())
    except (ValueError, IndexError, NotImplementedError) as error:
        raise UserError(
            f"--videos is {shorten(pattern)}; it must be a pattern of paths, such as clips/*.mp4"
        ) from error
    # As in a shell, a pattern does not find hidden files, such as those that macOS writes beside copied ones.
    paths = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise UserError(f"--videos is {shorten(pattern)}; at least one file must match it")
    for path in paths:
        video = {"type": "video_url", "video_url": {"url": str(path.absolute())}}
        message = {"role": "user", "content": [video, {"type": "text", "text": prompt}]}
        name = str(path.relative_to(folder))
        yield encode({"custom_id": name, "method": "POST", "url": ENDPOINT, "body": {"messages": [message]}})
