"""Calibrates the experts of a checkpoint: what their matrices are multiplied with in the prompts of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from convert import buckets, mapping
from keye_jax.engine.checkpoint import load_runtime, read_checkpoint
from keye_jax.engine.limits import new_token_limit
from keye_jax.engine.openai import read_chat
from keye_jax.engine.request import Request
from keye_jax.errors import UserError
from keye_jax.jobs.lines import BadLine, Shard, count_lines, read_lines
from keye_jax.quantization.calibration import MatrixInputs
from keye_jax.runtime.calibration import Prompt, expert_inputs
from keye_jax.runtime.device import memory_limit_bytes
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules


class PromptCalibration:
    """A `Calibration` of experts by the prompts of a file, in the form of a batch's input.

    Attributes:
      digest: SHA-256 of the file in hexadecimal.
      tokens: tokens of all prompts.
    """

    def __init__(self, checkpoint: str | Path, requests: Path, *, progress: Callable[[int, int], None]):
        """Reads and plans all prompts; their media are decoded later.

        Args:
          checkpoint: directory or URL; its weights have all bits.
          requests: lines of OpenAI's batches. What they say of the answer does not matter.
          progress: called with the tokens read and the tokens of all prompts.

        Raises:
          UserError: the checkpoint is not whole, a line is no request, or model and cache do not fit one device.
        """
        self._directory, self._progress = buckets.local(checkpoint), progress
        shown = f"--calibrate is {requests}; it must"
        try:
            self.digest, count = count_lines(requests)
        except OSError as error:
            raise UserError(f"{shown} be a file that can be read: {error.strerror}") from error
        if not count:
            raise UserError(f"{shown} have at least one line")
        self._config, self._processor, defaults = read_checkpoint(self._directory)
        self._requests: list[Request] = []
        self.tokens = self._longest = number = 0
        with requests.open("rb") as file:
            for line in read_lines(file, Shard()):
                if isinstance(line, BadLine):
                    raise UserError(f"--calibrate: {line.message}")
                try:
                    request = read_chat(line.body, sampling=defaults.sampling, batch=True).request
                    with self._processor.plan(request.messages or (), **request.options) as plan:
                        tokens = plan.num_tokens
                except UserError as error:
                    raise UserError(f"--calibrate: line {line.number}: {error}") from error
                self._requests.append(request)
                self.tokens += tokens
                if tokens > self._longest:
                    self._longest, number = tokens, line.number
        device = {"memory_limit": memory_limit_bytes(), "rules": MeshRules.single_device()}
        try:
            new_token_limit(self._config, self._longest, 1, dtype=self._config.dtype, **device)
        except UserError as error:
            raise UserError(f"--calibrate: line {number}: {error}") from error

    def inputs(self) -> Mapping[str, MatrixInputs]:
        """Loads the model, reads all prompts, and forgets the model."""
        runtime, done = load_runtime(self._directory, self._config), 0

        def progress(tokens: int) -> None:
            nonlocal done
            done += tokens
            self._progress(done, max(done, self.tokens))

        layers = expert_inputs(runtime, self._prompts(runtime), longest=self._longest, progress=progress)
        paths = [row.dotted_path for row in mapping.rows(self._config) if row.part == "experts"]
        found = {}
        for path in paths:
            _, _, layer, _, name = path.split(".")
            found[path] = layers[int(layer)][("gate_up_proj", "down_proj").index(name)]
        return found

    def _prompts(self, runtime: Runtime) -> Iterator[Prompt]:
        processor = self._processor
        for request in self._requests:
            with processor.plan(request.messages or (), **request.options) as plan:
                inputs = processor.process(plan)
            patches = np.concatenate([inputs.image_patches, inputs.video_patches])
            grids = np.concatenate([inputs.image_grids, inputs.video_grids])
            scale, shift = processor.pixel_scale, processor.pixel_shift
            embeds = runtime.encode(patches, grids, scale=scale, shift=shift) if len(patches) else None
            yield Prompt(inputs.input_ids, inputs.positions, embeds)
