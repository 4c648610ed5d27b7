"""Choosing the next token."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from keye_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; static in the compiled step.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_p: draws from the fewest tokens that together have this probability, 0 to 1.
      top_k: draws from this many of the most likely tokens; 0 for all.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's `generation_config.json` says.

    Attributes:
      sampling: temperature, top_p and top_k; those of `Sampling` where the file has none.
      end_tokens: ids that end an answer.
    """

    sampling: Sampling
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
        names = {field.name for field in dataclasses.fields(Sampling)}
        sampling = Sampling(**{name: value for name, value in values.items() if name in names and value is not None})
        if values.get("do_sample") is False:
            sampling = dataclasses.replace(sampling, temperature=0.0)
        ends = values.get("eos_token_id", fallback_end)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return cls(sampling, frozenset(ends))


@functools.partial(jax.jit, static_argnames="sampling")
def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token for each row, which does not depend on the other rows.

    Args:
      logits: float32 `[b, vocab]`.
      keys: a random key for each row, `[b]`; unused when greedy.
      sampling: how.

    Returns:
      int32 `[b]`; of equally likely tokens the lower id wins when greedy.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    vocab = logits.shape[-1]
    kept, ids = jax.lax.top_k(logits / sampling.temperature, min(sampling.top_k or vocab, vocab))
    probabilities = jax.nn.softmax(kept, axis=-1)
    # A token stays while those before it do not yet reach top_p, so the most likely one always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where(before < sampling.top_p, kept, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
