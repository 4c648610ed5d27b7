"""What a checkpoint says of how its answers are drawn, and where they end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keye_jax.errors import UserError, shorten
from keye_jax.parsing import read_json
from keye_jax.runtime.sampling import SamplingParams

# Ways of drawing that an answer would depend on and that there are not here, each with the value that means "off".
_UNSUPPORTED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": [],
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "force_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": [],
    "forced_eos_token_id": [],
    "sequence_bias": {},
    "constraints": [],
    "watermarking_config": {},
    "stop_strings": [],
}


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's `generation_config.json` says.

    Attributes:
      sampling: what the file says of it; the defaults of `SamplingParams` for the rest.
      end_tokens: ids that end an answer.
    """

    sampling: SamplingParams
    end_tokens: frozenset[int]

    @classmethod
    def from_checkpoint(
        cls, directory: str | Path, *, fallback_end: int | list[int] | None = None
    ) -> GenerationDefaults:
        """Reads `directory/generation_config.json`; without one, `fallback_end` (the model config's) ends answers.

        Raises:
          UserError: the file is not JSON, or a value in it is impossible.
        """
        path = Path(directory) / "generation_config.json"
        values = read_json(path) if path.exists() else {}
        try:
            return cls._read({name: value for name, value in values.items() if value is not None}, fallback_end)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def _read(cls, values: Mapping[str, Any], fallback_end: int | list[int] | None) -> GenerationDefaults:
        for name, without in _UNSUPPORTED.items():
            if values.get(name, without) != without:
                raise UserError(f"{name} is {shorten(values[name])}; it must be {without!r} or left out")
        read = {}
        for field in dataclasses.fields(SamplingParams):
            if field.name in values and field.name != "seed":
                value = values[field.name]
                kinds = (int,) if field.name == "top_k" else (int, float)
                if isinstance(value, bool) or not isinstance(value, kinds):
                    allowed = "an integer" if kinds == (int,) else "a number"
                    raise UserError(f"{field.name} is {shorten(value)}; it must be {allowed}")
                read[field.name] = value
        sampling = SamplingParams(**read)
        if values.get("do_sample") is False:
            sampling = dataclasses.replace(sampling, temperature=0.0)
        ends = values.get("eos_token_id", fallback_end)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(type(each) is int and 0 <= each < 1 << 31 for each in ends):
            raise UserError(f"eos_token_id is {shorten(ends)}; it must be a token id or a list of them")
        return cls(sampling, frozenset(ends))
