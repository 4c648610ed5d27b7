"""What a checkpoint says of how its answers are drawn, and where they end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from keye_jax.errors import UserError
from keye_jax.runtime.sampling import SamplingParams


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
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        names = {field.name for field in dataclasses.fields(SamplingParams)} - {"seed"}
        sampling = SamplingParams(
            **{name: value for name, value in values.items() if name in names and value is not None}
        )
        if values.get("do_sample") is False:
            sampling = dataclasses.replace(sampling, temperature=0.0)
        ends = values.get("eos_token_id", fallback_end)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return cls(sampling, frozenset(ends))
