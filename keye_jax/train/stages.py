"""Stages one after the other, each from the model that the one before has written.

OUTPUT/<stage>         the run of a stage, as `keye_jax.train.session.train` makes it
OUTPUT/<stage>/model   its model in the released layout, once all its steps are done
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keye_jax.errors import UserError
from keye_jax.train.checkpoints import RUN
from keye_jax.train.config import StageConfig
from keye_jax.train.loop import Ended
from keye_jax.train.session import train

MODEL = "model"
"""Folder below that of a stage's run."""


def train_in_turn(
    stages: Sequence[tuple[str, StageConfig]],
    *,
    checkpoint: Path | None,
    output: Path,
    export: Path | None = None,
    export_step: str | None = None,
    stop_after: float | None = None,
    begin: Callable[[str], None] = lambda name: None,
    **settings: Any,
) -> Ended:
    """Trains by stages in turn; what earlier sittings did in `output` is not done again.

    A stage whose model is there is done, and so are those before it: their folders are not needed any more.

    Args:
      stages: each with its file. The name of the file, without its end, is that of the stage's folder.
      checkpoint: what the first stage begins with; it and `settings`, which all stages get, are as for
        `keye_jax.train.session.train`.
      output: folder of the runs.
      export: where the last stage's model is written too.
      export_step: the checkpoint of the stage that the runs have reached that is written to `export` in place of
        training.
      stop_after: seconds for all stages together; None for no limit.
      begin: called with the name of each stage that is trained.

    Returns:
      how the stage that was reached ended.

    Raises:
      UserError: two stages have one name, or as `train` does.
    """
    names = [Path(source).stem for source, _ in stages]
    if len(set(names)) < len(names):
        raise UserError(f"--config names the stages {', '.join(names)}; each must have a name of its own")
    start = time.monotonic()
    written = [output / name / MODEL for name in names]
    done = max((number for number, model in enumerate(written, 1) if model.is_dir()), default=0)

    def run(number: int, export: Path | None) -> Ended:
        source, stage = stages[number]
        begin(names[number])
        return train(
            stage,
            source=source,
            checkpoint=written[number - 1] if number else checkpoint,
            output=output / names[number],
            export=export,
            export_step=export_step,
            stop_after=None if stop_after is None else stop_after - (time.monotonic() - start),
            **settings,
        )

    if export_step is not None:
        return run(max((n for n, name in enumerate(names) if (output / name / RUN).is_file()), default=0), export)
    ended = Ended(0, finished=True, signal=None)
    for number in range(done, len(stages)):
        if stop_after is not None and time.monotonic() - start >= stop_after:
            return Ended(0, finished=False, signal=None)
        ended = run(number, written[number])
        if not ended.finished:
            return ended
    if export is not None:
        shutil.copytree(written[-1], export, dirs_exist_ok=True)
    return ended
