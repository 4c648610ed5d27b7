"""`keye-jax eval`: measure what a model gets right."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from keye_jax import presets
from keye_jax.cli import options, paths
from keye_jax.errors import UserError

app = paths.App(help="Measure what a model gets right.", no_args_is_help=True)

_SELECTIONS = ("indexer", "dense", "random", "recent", "untrained")


@app.callback()
def group() -> None:
    """Measure what a model gets right."""


@app.command("shapes")
def shapes(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Directory of a checkpoint; the model in the package if left out.")
    ] = None,
    videos: Annotated[int, typer.Option(help="Clips to draw; a quarter as many long ones come on top.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed draws the same clips. None of them are trained on.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="File to write scores and all answers to.")
    ] = None,
    selection: Annotated[
        list[str] | None,
        typer.Option(
            help="What attention selects: 'indexer', 'dense' (everything), 'random' or 'recent' keys, or those of "
            "indexers with new random weights ('untrained'); may be repeated."
        ),
    ] = None,
    conversation: Annotated[
        bool,
        typer.Option(
            "--conversation",
            help="Ask a clip's six questions one after the other in one conversation, and score all but the first. "
            "There are no thresholds then.",
        ),
    ] = False,
) -> int:
    """Ask about clips of coloured shapes, a clock and a word, which are drawn, compressed and read like any video.

    Each question is asked in a conversation of its own. Prints the score of each kind of question beside that of a
    guess without the video. Exits with 1 if a score is beyond its threshold.
    """
    chosen = list(dict.fromkeys(selection or ["indexer"]))
    for each in chosen:
        if each not in _SELECTIONS:
            raise UserError(f"--selection is {each!r}; it must be one of: {', '.join(_SELECTIONS)}")
    if videos < 1:
        raise UserError(f"--videos is {videos}; it must be at least 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be 0 or more")
    if checkpoint is None:
        checkpoint = presets.EMBEDDED_CHECKPOINT

    import rich
    from rich.table import Table

    from convert import buckets
    from keye_jax.config import KeyeConfig
    from keye_jax.eval.shapes import answers, failures, later_answers, open_engine, scores, write_clips
    from keye_jax.runtime.compilation_cache import enable_compilation_cache
    from keye_jax.train.shapes.score import guessing_scores

    enable_compilation_cache()
    checkpoint = buckets.local(checkpoint)
    config = KeyeConfig.from_file(checkpoint)
    found, given = {}, {}
    with tempfile.TemporaryDirectory() as directory, options.ProgressBars() as bars:
        clips = write_clips(
            *(Path(directory), videos, seed, config.sa_config.topk),
            progress=lambda done, total: bars("drawing clips", done, total),
        )
        ask = later_answers if conversation else answers
        for each in chosen:
            with open_engine(checkpoint, each) as engine:
                asked = ask(engine, clips, lambda done, total, each=each: bars(f"asking, {each}", done, total))
                given[each] = list(asked)
            found[each] = scores(given[each])

    questions = [answer.question for answer in given[chosen[0]]]
    guess = guessing_scores(questions)
    table = Table("question", "asked", "guess", *chosen, title=f"{checkpoint}, {len(clips)} clips, seed {seed}")
    for kind in guess:
        count = sum(question.kind == kind for question in questions)
        table.add_row(kind, f"{count:,}", f"{guess[kind]:.3f}", *(f"{found[each][kind]:.3f}" for each in chosen))
    rich.print(table)
    wrong = [] if conversation else failures(found)
    for sentence in wrong:
        print(sentence)
    if json_file is not None:
        result = {
            **{"videos": videos, "seed": seed, "conversation": conversation},
            **{"guess": guess, "scores": found, "failures": wrong},
            "answers": {each: [answer.to_dict() for answer in given[each]] for each in chosen},
        }
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0
