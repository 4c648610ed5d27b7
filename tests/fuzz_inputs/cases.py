"""The cases, each made from the seed and its number alone."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from tests.fuzz_inputs import messages, seeds
from tests.fuzz_inputs.mutations import mutate

KINDS = ("media", "messages")


@dataclasses.dataclass(frozen=True)
class Task:
    """Which case: its kind, the seed of the run, and its number."""

    kind: str
    seed: int
    number: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One damaged input.

    Attributes:
      group: the file or the shape of request that it was made from.
      damage: what was done to it.
      file, data: name and content of the damaged file.
      messages: the request for a media file, which names it by a relative path or holds its content; None if the file
        is a message file. A message file names the files of `seeds` by relative paths.
    """

    group: str
    damage: str
    file: str
    data: bytes
    messages: list[dict[str, Any]] | None = None

    def write(self, folder: Path, prefix: str) -> None:
        """Writes the file, and the request for it, into `folder`."""
        (folder / f"{prefix}{self.file}").write_bytes(self.data)
        if self.messages is not None:
            text = json.dumps(self.messages).replace(f'"{self.file}"', f'"{prefix}{self.file}"')
            (folder / f"{prefix}messages.json").write_text(text + "\n", encoding="utf-8")


def make(task: Task, folder: Path) -> Case:
    """The case of a task; `folder` holds the files of `seeds`."""
    rng = random.Random(f"{task.seed} {task.kind} {task.number}")
    if task.kind == "messages":
        data, group, damage = messages.request(rng, folder)
        return Case(group, damage, "messages.json", data)
    names = sorted(path.name for path in folder.iterdir() if path.name != seeds.SUBTITLES)
    name = rng.choice(names)
    data, damage = mutate(rng, (folder / name).read_bytes(), (folder / rng.choice(names)).read_bytes())
    suffix = (
        Path(name).suffix if rng.random() < 0.9 else rng.choice(("", ".mp4", ".mkv", ".ts", ".png", ".gif", ".bin"))
    )
    file = f"input{suffix}"
    part = _part(rng, file, data, as_video=seeds.is_clip(name) != (rng.random() < 0.05))
    return Case(name, damage, file, data, [{"role": "user", "content": [part]}])


def _part(rng: random.Random, file: str, data: bytes, *, as_video: bool) -> dict[str, Any]:
    form = rng.choice(("path", "path", "path", "data URL"))
    source = file if form == "path" else f"data:;base64,{base64.b64encode(data).decode()}"
    if not as_video:
        if rng.random() < 0.05:
            return {"type": "video", "video": [source, source], "native_fps": 2}
        return {"type": "image", "image": source}
    options = rng.choice(({}, {}, {"fps": 30}, {"max_frames": 2}, {"fps": 0.1, "min_frames": 4}))
    return {"type": "video", "video": source, **options}
