"""What a run tells: a line of progress, a file of measures, and curves for TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from keye_jax.errors import UserError, shorten

MEASURES = "measures.jsonl"

_TERMINAL_S, _PLAIN_S = 1.0, 15.0
"""Seconds between lines of progress, on a terminal and elsewhere."""


class Report:
    """Takes the measures of each step.

    Args:
      output: folder of the run; each step is a line of `measures.jsonl` there.
      steps: of the whole run.
      begun: steps that were done before; later lines of an earlier process are dropped.
      tensorboard: folder of curves; None for none.
      stream: of progress; standard error if left out.

    Raises:
      UserError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        output: Path,
        *,
        steps: int,
        begun: int = 0,
        tensorboard: Path | None = None,
        stream: TextIO | None = None,
    ):
        self._steps, self._begun, self._stream = steps, begun, stream or sys.stderr
        self._writer = None if tensorboard is None else _tensorboard(tensorboard)
        file = output / MEASURES
        kept = [line for line in _lines(file) if _step(line, file) <= begun]
        new = file.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        new.replace(file)
        self._file = file.open("a", encoding="utf-8")
        self._start = self._shown = time.monotonic()
        self._tokens = 0
        self._on_terminal = self._stream.isatty()

    def step(self, step: int, measures: Mapping[str, Any], epoch: float | None = None) -> None:
        """Takes the measures of a step, numbers by name; `tokens` is how many it read."""
        now = time.monotonic()
        done = step - self._begun - 1
        if done:
            self._tokens += int(measures["tokens"])
        else:
            self._start = now  # the first step compiles
        elapsed = max(now - self._start, 1e-9)
        rate = self._tokens / elapsed
        self._write(step, {**measures, "tokens_per_second": round(rate, 1)}, "train")
        interval = _TERMINAL_S if self._on_terminal else _PLAIN_S
        if step in (self._begun + 1, self._steps) or now - self._shown >= interval:
            self._shown = now
            parts = [f"step {step:,}/{self._steps:,}", *([] if epoch is None else [f"epoch {epoch:.1f}"])]
            parts += [f"loss {measures['language']:.4f}", f"accuracy {measures['accuracy']:.3f}"]
            if "indexer_norm" in measures:
                parts.append(f"KL {measures['kl']:.4f}")
                parts += [f"recall {measures['recall']:.3f}"] if "recall" in measures else []
            if done:
                parts += [f"{rate:,.0f} tokens/s", f"{_duration((self._steps - step) * elapsed / done)} left"]
            end = "\r" if self._on_terminal and step < self._steps else "\n"
            self._stream.write(", ".join(parts) + ("\x1b[K" if self._on_terminal else "") + end)
            self._stream.flush()

    def evaluation(self, step: int, measures: Mapping[str, Any]) -> None:
        """Takes the measures of an evaluation after a step."""
        self._write(step, measures, "evaluation")
        self.say(
            f"evaluation after step {step:,}: loss {measures['language']:.4f}, accuracy {measures['accuracy']:.3f}, "
            f"KL {measures['kl']:.4f}, recall {measures['recall']:.3f}"
        )

    def say(self, sentence: str) -> None:
        """Prints a sentence, in a line of its own."""
        self._stream.write(("\x1b[K" if self._on_terminal else "") + sentence + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, measures: Mapping[str, Any], kind: str) -> None:
        values = {name: value if isinstance(value, int) else float(value) for name, value in measures.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)


def _lines(file: Path) -> list[str]:
    """The whole lines of a file; none if it is not there."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text.split("\n")[:-1]


def _step(line: str, file: Path) -> int:
    """The step of a line of measures. Raises UserError if it has none."""
    try:
        return int(json.loads(line)["step"])  # a loss may be NaN
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{file} has the line {shorten(line)}; each line must be an object with 'step'") from error


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError("tensorboard needs tensorboardX: pip install tensorboardX") from error
    return SummaryWriter(str(folder))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
