"""Choosing the next token of each row of a batch, each by settings of its own, in one compiled step for all of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.errors import UserError
from pallas_kernels.nucleus import MOST_TOP_K, nucleus
from pallas_kernels.select_topk import select_topk

MOST_SCORES = 20
"""How many of the likeliest tokens of a step `TokenScores` has."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one sequence are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_p: draws from the fewest tokens that together have this probability, above 0 to 1.
      top_k: draws from this many of the most likely tokens, at most `MOST_TOP_K`; 0 for all.
      min_p: draws from tokens at least this many times as likely as the most likely one, 0 to 1.
      repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the prompt or the answer
        (Keskar et al., arXiv 1909.05858); 1 for none.
      presence_penalty: is subtracted from the logits of tokens in the answer; -2 to 2.
      frequency_penalty: is subtracted once for each time that a token is in the answer; -2 to 2.
      seed: two sequences of the same seed and logits draw the same tokens.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed, fits in (
            ("temperature", "0 (greedy) or more", self.temperature >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("top_k", f"from 0 (all tokens) to {MOST_TOP_K}", 0 <= self.top_k <= MOST_TOP_K),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
            ("presence_penalty", "from -2 to 2", -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", "from -2 to 2", -2 <= self.frequency_penalty <= 2),
        ):
            value = getattr(self, name)
            if not fits or not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be {allowed}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """`SamplingParams` of the rows of a batch, as arrays, and what they have to remember; all `[b]` or `[b, ...]`.

    Attributes:
      temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: float32.
      top_k: int32.
      seed: uint32.
      counts: int32 `[b, vocab]`, how often the row's answer has each token.
      in_prompt: bool `[b, vocab]`, whether its prompt has it; False without a repetition penalty.
      bias: float32 `[b, vocab]`, added to the logits.
      allowed: uint32 `[b, ceil(vocab / 32)]`; a token may be drawn if bit `token % 32` of word `token // 32` is set.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array
    counts: jax.Array
    in_prompt: jax.Array
    bias: jax.Array
    allowed: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Log probabilities of the tokens that the rows of a batch drew last, before temperature, penalties and bias.

    Attributes:
      logprob: float32 `[b]`.
      top_tokens: int32 `[b, min(MOST_SCORES, vocab)]`, the likeliest first.
      top_logprobs: float32, theirs.
    """

    logprob: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


@functools.cache
def _plain_values(vocab: int) -> dict[str, np.ndarray]:
    """What a row has for each token if it is asked for nothing special. Nobody may write to these arrays."""
    values = {
        "counts": np.zeros(vocab, np.int32),
        "in_prompt": np.zeros(vocab, bool),
        "bias": np.zeros(vocab, np.float32),
        "allowed": np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32),
    }
    for array in values.values():
        array.setflags(write=False)
    return values


def sampling_row(
    params: SamplingParams,
    vocab: int,
    *,
    prompt: np.ndarray | None = None,
    answer: np.ndarray | None = None,
    bias: Mapping[int, float] | None = None,
    allowed: np.ndarray | None = None,
) -> SamplingState:
    """The state of one row, NumPy arrays without the batch dimension. Nobody may write to them.

    Args:
      vocab: size of the vocabulary.
      prompt, answer: int token ids that penalties count; none if left out.
      bias: what is added to the logits of some tokens.
      allowed: uint32 `[ceil(vocab / 32)]`, as in `SamplingState`; all tokens if left out.

    Raises:
      UserError: a biased token is not in the vocabulary.
    """
    for token in bias or ():
        if not 0 <= token < vocab:
            raise UserError(f"logit_bias has token {token}; it must be from 0 to {vocab - 1}")
    wide = dict(_plain_values(vocab))
    if bias:
        wide["bias"] = wide["bias"].copy()
        wide["bias"][list(bias)] = list(bias.values())
    if prompt is not None and params.repetition_penalty != 1:
        wide["in_prompt"] = wide["in_prompt"].copy()
        wide["in_prompt"][np.asarray(prompt, np.int64)] = True
    if allowed is not None:
        wide["allowed"] = np.asarray(allowed, np.uint32)
    assert wide["allowed"].shape == (-(-vocab // 32),), "one word for each 32 tokens"
    if answer is not None and len(answer):
        wide["counts"] = np.bincount(np.asarray(answer, np.int64), minlength=vocab).astype(np.int32)
    values: dict[str, Any] = {
        "temperature": np.float32(params.temperature),
        "top_p": np.float32(params.top_p),
        "top_k": np.int32(params.top_k),
        "min_p": np.float32(params.min_p),
        "repetition_penalty": np.float32(params.repetition_penalty),
        "presence_penalty": np.float32(params.presence_penalty),
        "frequency_penalty": np.float32(params.frequency_penalty),
        "seed": np.uint32(params.seed % 2**32),
        **wide,
    }
    return SamplingState(**values)


def sample(
    logits: jax.Array,
    state: SamplingState,
    positions: jax.Array,
    *,
    active: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Draws one token for each row, which does not depend on the other rows.

    A row's draw adds Gumbel noise to the logits that it may draw from, and takes the largest sum. The noise follows
    from the row's seed and position alone.

    Args:
      logits: float32 `[b, vocab]`.
      state: how each row draws.
      positions: int32 `[b]`, the index that the token will have in its sequence.
      active: bool `[b]`, the rows that draw; None for all. The others cost less and get any token.
      implementation: of `nucleus`; None for the best there is.

    Returns:
      int32 `[b]`; of equally likely tokens the lower id where temperature is 0.
    """
    logits = adjusted_logits(logits, state)
    greedy = state.temperature == 0
    # Computed once: what is compared with a candidate must be the same to the bit.
    scaled = jax.lax.optimization_barrier(logits / jnp.where(greedy, 1.0, state.temperature)[:, None])
    kept = kept_tokens(scaled, state, active=active, implementation=implementation)
    kept = jnp.where(kept, scaled, -jnp.inf)
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(state.seed, positions)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    # Greedy rows are divided by 1. So this reads one array, not all that logits are adjusted by.
    scores = jnp.where(greedy[:, None], scaled, kept + noise)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def token_scores(
    logits: jax.Array, tokens: jax.Array, *, active: jax.Array | None = None, implementation: str | None = None
) -> TokenScores:
    """Log probabilities of `tokens`, int32 `[b]`, and of the likeliest ones.

    Args:
      logits, active: as for `sample`.
      implementation: of `select_topk`; None for the best there is.
    """
    total = jax.nn.logsumexp(logits, axis=-1)
    found = _likeliest(logits, MOST_SCORES, active, implementation)
    values = jnp.take_along_axis(logits, found, axis=1)
    # Positions rise in `found`, and sorting is stable: of equally likely tokens the lower id comes first.
    negated, top = jax.lax.sort((-values, found), dimension=1, num_keys=1, is_stable=True)
    drawn = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return TokenScores(drawn - total, top, -negated - total[:, None])


def adjusted_logits(logits: jax.Array, state: SamplingState) -> jax.Array:
    """Logits with penalties and bias, -inf for tokens that are not allowed; float32 `[b, vocab]`."""

    def column(values: jax.Array) -> jax.Array:
        return values[:, None]

    seen = state.in_prompt | (state.counts > 0)
    repeated = column(state.repetition_penalty)
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repeated, logits * repeated), logits)
    logits -= column(state.frequency_penalty) * state.counts
    logits -= column(state.presence_penalty) * (state.counts > 0)
    bits = (state.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(len(logits), -1)[:, : logits.shape[-1]] == 1
    return jnp.where(allowed, logits + state.bias, -jnp.inf)


def counted(state: SamplingState, tokens: jax.Array, active: jax.Array) -> SamplingState:
    """The state after each active row (bool `[b]`) has drawn its token (int32 `[b]`)."""
    row = jnp.arange(len(tokens))
    return dataclasses.replace(state, counts=state.counts.at[row, tokens].add(active.astype(jnp.int32)))


def _likeliest(logits: jax.Array, most: int, active: jax.Array | None, implementation: str | None) -> jax.Array:
    """Tokens of the `most` highest logits of each active row, or of all tokens if they are fewer; int32 `[b, n]`."""
    rows, vocab = logits.shape
    lengths = jnp.full(rows, vocab) if active is None else jnp.where(active, vocab, 0)
    return select_topk(logits[:, None], lengths[:, None], min(most, vocab), implementation=implementation)[:, 0]


def kept_tokens(
    scaled: jax.Array,
    state: SamplingState,
    *,
    active: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Which tokens top-k, top-p and min-p leave, bool `[b, vocab]`; tokens as likely as the last one stay too.

    top_p counts the probabilities among the tokens that top_k leaves. See `pallas_kernels.nucleus` for how exact it is.

    Args:
      scaled: float32 `[b, vocab]`, logits divided by the temperature.
      active, implementation: as for `sample`.
    """
    counts = jnp.ones(len(scaled), jnp.int32) if active is None else active.astype(jnp.int32)
    highest, span = nucleus(scaled, state.top_k, state.top_p, counts, implementation=implementation)
    span = jnp.minimum(span, -jnp.log(state.min_p))
    return highest[:, None] - scaled <= span[:, None]
