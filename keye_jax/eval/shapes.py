"""Asking a model about held-out clips of the generated world, through the engine, and scoring what it says."""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from convert import load_params, mapping
from convert.synthetic import random_tensor
from keye_jax.engine.checkpoint import read_checkpoint
from keye_jax.engine.engine import Engine
from keye_jax.engine.handle import Handle
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.request import Request, RequestError
from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.progress import Progress
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.train.shapes.questions import KINDS, Question, ask
from keye_jax.train.shapes.scene import HELD_OUT, SIDE, SceneOptions, make_scene
from keye_jax.train.shapes.score import mean_scores, score
from keye_jax.train.shapes.video import write_video

UNTRAINED = "untrained"
"""Selects by indexers with new random weights, as a training begins with them."""

SELECTIONS: dict[str, AttentionOptions] = {
    "indexer": AttentionOptions(),
    "dense": AttentionOptions("dense"),
    "random": AttentionOptions(selection="random"),
    "recent": AttentionOptions(selection="recent"),
    UNTRAINED: AttentionOptions(),
}
"""What the model may attend to, by the names of the command line."""

LEAST = {"attributes": 0.95, "counts": 0.90, "order": 0.95, "when": 0.80, "clock": 0.95, "needle": 0.95}
"""The mean score of each kind of question that the indexer's selection, and dense attention, must reach."""

MOST_BELOW_DENSE = 0.01
"""How far the mean of all kinds may be below that of dense attention."""

MOST_OF_RANDOM = 0.50
"""The highest score in attributes that random keys may reach: beyond it the questions need no selection."""

MOST_OF_UNTRAINED = 0.25
"""The highest score in attributes that untrained indexers may reach."""

LEAST_BELOW_INDEXER = 0.20
"""How far in attributes the most recent keys must be below the indexer's."""

NEEDLE_CONTEXT = 16
"""Context of a question about a needle, in multiples of `topk`."""

PREFILL_CHUNK = 960

ENGINE = EngineOptions(rows=64, cache_tokens=131072, small_chunk=192, chunks_between=16, media_workers=4)
"""A clip of 24 frames has a few tokens more than a large chunk, and a question fits into a small one: so the first
question is read in two chunks, and each of the others in one."""

_QUESTIONS = 6
_CLIPS_PER_NEEDLE = 4
_CLIPS_AT_ONCE = 32
"""Clips whose videos are read together. They stay in the prefix cache until all is asked."""

_ANSWER_TOKENS = 16
_GREEDY = SamplingParams(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video file and what is asked about it."""

    path: Path
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said: the clip's name, the question, the answer and its score from 0 to 1."""

    clip: str
    question: Question
    said: str
    score: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        asked = {name: getattr(self.question, name) for name in ("kind", "form", "text", "answer")}
        return {"clip": self.clip, **asked, "said": self.said, "score": self.score}


def write_clips(
    directory: Path, videos: int, seed: int, top_k: int, progress: Progress = lambda done, total: None
) -> list[Clip]:
    """Draws held-out scenes and writes them as H.264.

    Args:
      directory: the folder to write to.
      videos: clips of the usual length, of all kinds but needles; a quarter as many are written with a needle.
      seed: the same one gives the same clips and questions. No training sees them.
      top_k: keys that attention selects: a needle's clip has `NEEDLE_CONTEXT` times as many tokens, at least.
    """
    kinds = {kind: float(kind != "needle") for kind in KINDS}
    # A frame has 36 tokens and four or five of its time.
    frames = -(-NEEDLE_CONTEXT * top_k // ((SIDE // 28) ** 2 + 4))
    usual, long = SceneOptions(needle=0.0), SceneOptions(frames=max(frames, 8), needle=1.0)
    needles = max(1, videos // _CLIPS_PER_NEEDLE)

    def write(number: int) -> Clip:
        needle = number >= videos
        scene = make_scene(HELD_OUT + seed, long if needle else usual, number=number)
        key = (HELD_OUT + seed, number)
        asked = ask(scene, 1, key, kinds={"needle": 1.0}) if needle else ask(scene, _QUESTIONS, key, kinds=kinds)
        path = directory / f"{'needle' if needle else 'clip'}_{number:05d}.mp4"
        write_video(path, scene)
        return Clip(path, tuple(asked))

    clips = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for clip in pool.map(write, range(videos + needles)):
            clips.append(clip)
            progress(len(clips), videos + needles)
    return clips


def open_engine(checkpoint: Path, selection: str) -> Engine:
    """An engine for a checkpoint that attends to what one of `SELECTIONS` selects.

    Raises:
      UserError: the checkpoint is not whole.
    """
    config, processor, defaults = read_checkpoint(checkpoint)
    params = load_params(checkpoint, config)
    if selection == UNTRAINED:
        for tensor in mapping.rows(config):
            if "indexer" in tensor.path:
                *owner, name = tensor.path
                module = functools.reduce(operator.getitem, owner, params)
                module[name] = jnp.asarray(random_tensor(tensor, 0, module[name].dtype))
    runtime = Runtime(
        Keye.from_params(config, params), config, options=SELECTIONS[selection], prefill_chunk=PREFILL_CHUNK
    )
    return Engine(runtime, processor, defaults, options=ENGINE)


def answers(engine: Engine, clips: Sequence[Clip], progress: Progress = lambda done, total: None) -> Iterator[Answer]:
    """Asks all questions, each in a conversation of its own, greedily.

    Raises:
      UserError: the engine cannot answer a question.
    """
    total, done = sum(len(clip.questions) for clip in clips), 0
    waiting = collections.deque(clips)
    reading: collections.deque[tuple[Clip, Handle]] = collections.deque()
    asked: collections.deque[tuple[Clip, Question, Handle]] = collections.deque()
    while waiting or reading or asked:
        while waiting and len(reading) < _CLIPS_AT_ONCE:
            clip = waiting.popleft()
            reading.append((clip, _submit(engine, _opening(clip, clip.questions[0]))))
        if reading and len(asked) < _QUESTIONS * _CLIPS_AT_ONCE:
            # The first question reads the video, and the others find its prefix in the cache.
            clip, first = reading.popleft()
            _said(clip, clip.questions[0], first)
            later = [(clip, each, _submit(engine, _opening(clip, each))) for each in clip.questions[1:]]
            asked += [(clip, clip.questions[0], first), *later]
            continue
        clip, question, handle = asked.popleft()
        said = _said(clip, question, handle)
        done += 1
        progress(done, total)
        yield Answer(clip.path.name, question, said, score(question, said))


def later_answers(
    engine: Engine, clips: Sequence[Clip], progress: Progress = lambda done, total: None
) -> Iterator[Answer]:
    """Asks a clip's questions one after the other in one conversation, greedily. Gives all answers but the first.

    Raises:
      UserError: the engine cannot answer a question.
    """
    waiting = collections.deque(clip for clip in clips if len(clip.questions) > 1)
    total, done = sum(len(clip.questions) - 1 for clip in waiting), 0
    asked: collections.deque[tuple[Clip, int, list[dict[str, Any]], Handle]] = collections.deque()
    while waiting or asked:
        while waiting and len(asked) < _CLIPS_AT_ONCE:
            clip = waiting.popleft()
            messages = _opening(clip, clip.questions[0])
            asked.append((clip, 0, messages, _submit(engine, messages)))
        clip, turn, messages, handle = asked.popleft()
        said = _said(clip, clip.questions[turn], handle)
        if turn + 1 < len(clip.questions):
            question = {"role": "user", "content": clip.questions[turn + 1].text}
            messages = [*messages, {"role": "assistant", "content": said}, question]
            asked.append((clip, turn + 1, messages, _submit(engine, messages)))
        if turn > 0:
            done += 1
            progress(done, total)
            yield Answer(clip.path.name, clip.questions[turn], said, score(clip.questions[turn], said))


def _opening(clip: Clip, question: Question) -> list[dict[str, Any]]:
    """The messages of a conversation that begins with this question."""
    content = [{"type": "video", "video": str(clip.path)}, {"type": "text", "text": question.text}]
    return [{"role": "user", "content": content}]


def _submit(engine: Engine, messages: list[dict[str, Any]]) -> Handle:
    return engine.submit(Request(messages, sampling=_GREEDY, max_tokens=_ANSWER_TOKENS))


def _said(clip: Clip, question: Question, handle: Handle) -> str:
    """Waits for the answer."""
    try:
        return handle.result().choices[0].text
    except RequestError as error:
        raise UserError(f"{question.text!r} about {clip.path.name} cannot be answered: {error}") from error


def scores(given: Sequence[Answer]) -> dict[str, float]:
    """The mean score of each kind."""
    return mean_scores([answer.question for answer in given], [answer.score for answer in given])


def failures(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Sentences about what is below its threshold, or above it.

    Args:
      found: scores by kind, for each selection that was tried. Selections are compared if both were tried.
    """
    wrong = []
    for selection in ("indexer", "dense"):
        for kind, least in LEAST.items():
            value = found.get(selection, {}).get(kind)
            if value is not None and value < least:
                wrong.append(f"{selection}: {kind} is {value:.3f}; it must be at least {least:.2f}")
    means = {name: sum(kinds.values()) / len(kinds) for name, kinds in found.items()}
    if {"indexer", "dense"} <= means.keys() and means["indexer"] < means["dense"] - MOST_BELOW_DENSE:
        wrong.append(
            f"indexer: the mean of all kinds is {means['indexer']:.3f}; it must be at least that of dense attention "
            f"less {MOST_BELOW_DENSE:.2f}, {means['dense'] - MOST_BELOW_DENSE:.3f}"
        )
    attributes = {name: kinds["attributes"] for name, kinds in found.items() if "attributes" in kinds}
    for selection, most in (("random", MOST_OF_RANDOM), (UNTRAINED, MOST_OF_UNTRAINED)):
        if attributes.get(selection, 0.0) > most:
            wrong.append(f"{selection}: attributes is {attributes[selection]:.3f}; it must be at most {most:.2f}")
    if {"indexer", "recent"} <= attributes.keys():
        most = attributes["indexer"] - LEAST_BELOW_INDEXER
        if attributes["recent"] > most:
            wrong.append(f"recent: attributes is {attributes['recent']:.3f}; it must be at most {most:.3f}")
    return wrong
