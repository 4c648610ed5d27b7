"""Checkpoints of a run: weights that train, moments, step and the position in the data. Written whole or not at all.

OUTPUT/run.json            the stage and what it was started with; a run resumes only with the same
OUTPUT/checkpoints/<step>  Orbax: the last ones and the best one
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from convert.orbax_io import quiet_orbax
from keye_jax.errors import UserError, shorten
from keye_jax.parsing import read_json

RUN, CHECKPOINTS = "run.json", "checkpoints"

# A checkpoint of fewer bytes is written in files of at most `_SMALL_FILE` bytes, which travel easily.
_SMALL, _SMALL_FILE = 1 << 30, 8 << 20
# Bytes at either end of a file that tell it from others of its length.
_END = 1 << 16

# Fields of a stage that may differ when a run resumes: its result does not depend on them, but for rounding.
_FREE = ("scan_layers", "checkpoint_every", "evaluate_every", "keep", "tensorboard", "data.workers", "data.byte_budget")


class RunCheckpoints:
    """The checkpoints of one run.

    Args:
      output: the folder of the run; it is made if it does not exist.
      run: what the run is started with, a JSON object: `stage`, `StageConfig.to_dict`, and other values by name.
      keep: how many of the last checkpoints stay.

    Raises:
      UserError: the folder belongs to a run that was started with something else, which the message names.
    """

    def __init__(self, output: str | Path, run: Mapping[str, Any], *, keep: int):
        output = Path(output).absolute()
        file = output / RUN
        if file.is_file():
            _refuse_others(file, run)
        elif output.is_dir() and any(output.iterdir()):
            raise UserError(f"--output is {str(output)!r}; it must be a new folder, or that of a run to resume")
        output.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        new.replace(file)
        policies: Any = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"], n=1, keep_checkpoints_without_metrics=False
        )
        with quiet_orbax():
            self._checkpointer = ocp.training.Checkpointer(
                str(output / CHECKPOINTS),
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                cleanup_tmp_directories=True,
            )

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints there are, in order."""
        return sorted(found.step for found in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, position: Mapping[str, Any], loss: float | None = None) -> None:
        """Writes a checkpoint, unless that step has one.

        Args:
          state: a pytree of arrays, a tuple that begins with the weights by path.
          position: where the data stand, a JSON object.
          loss: of the evaluation; None if there was none.
        """
        if step in self.steps:
            return
        leaves = _by_name(state)
        context = ocp.Context()
        if sum(leaf.nbytes for leaf in leaves.values()) < _SMALL:
            context.array.saving.ocdbt_target_data_file_size = _SMALL_FILE
        metrics: Any = None if loss is None else {"loss": loss}
        with context, quiet_orbax():
            self._checkpointer.save(
                step, leaves, force=True, metrics=metrics, custom_metadata={"position": dict(position)}
            )

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The last checkpoint; None if there is none.

        Args:
          like: the state to restore, arrays or shapes, each where it is to lie.

        Returns:
          its step, the state and the position of the data.
        """
        step = next(reversed(self.steps), None)
        if step is None:
            return None
        state = self._load(step, like)
        with quiet_orbax():
            metadata: Any = self._checkpointer.metadata(step).custom_metadata
        return step, state, dict(metadata["position"])

    def restore_weights(self, like: Mapping[str, Any], which: str) -> tuple[int, dict[str, Any]]:
        """The first part of the state of a checkpoint, the weights.

        Args:
          like: the weights, as for `restore`.
          which: "last", "best" or the number of a step.

        Returns:
          the checkpoint's step, and the weights.

        Raises:
          UserError: there is no such checkpoint.
        """
        losses: Any = {found.step: found.metrics for found in self._checkpointer.checkpoints}
        chosen = {str(step): step for step in self.steps}
        if self.steps:
            chosen["last"] = self.steps[-1]
        evaluated = {step: metrics["loss"] for step, metrics in losses.items() if metrics}
        if evaluated:
            chosen["best"] = min(evaluated, key=lambda step: evaluated[step])
        if which not in chosen:
            allowed = ", ".join(chosen) or "nothing yet, since the run has no checkpoint"
            raise UserError(f"--export-step is {which!r}; it must be one of: {allowed}")
        return chosen[which], self._load(chosen[which], (dict(like),), partial=True)[0]

    def _load(self, step: int, like: Any, *, partial: bool = False) -> Any:
        """The state of a step, or with `partial` a part of it."""
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _by_name(like).items()
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        with context, quiet_orbax():
            found = self._checkpointer.load(step, wanted)
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])

    def close(self) -> None:
        self._checkpointer.close()


def fingerprint(path: str | Path) -> str:
    """A digest of a file, or of a folder: of the names and lengths of its files, and of both ends of each."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_END))
            stream.seek(max(0, size - _END))
            digest.update(stream.read(_END))
    return digest.hexdigest()


def _by_name(state: Any) -> dict[str, Any]:
    """The arrays of a pytree by their paths in it, in the order of its leaves."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _refuse_others(file: Path, run: Mapping[str, Any]) -> None:
    before = read_json(file)
    known, given = _flat(before), _flat(run)
    for name in dict.fromkeys((*known, *given)):
        field = name.removeprefix("stage.")
        if field not in _FREE and known.get(name) != given.get(name):
            raise UserError(
                f"{field} is {shorten(given.get(name))}; the run in {file.parent} was started with "
                f"{shorten(known.get(name))}, and resumes only with the same"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values:
        return {prefix.rstrip("."): values}
    return {name: leaf for key, value in values.items() for name, leaf in _flat(value, f"{prefix}{key}.").items()}
