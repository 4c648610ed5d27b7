"""The batch that is decoded: its state on the devices, and the values of one row on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from keye_jax.runtime.sampling import MOST_SCORES, SamplingParams, SamplingState, TokenScores, sampling_row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The rows of a batch that is decoded; an idle row costs no expert and no page.

    Attributes:
      tokens: int32 `[b]`, the last token of each sequence, not yet in the pool.
      lengths: int32 `[b]`, tokens that the pool holds of it.
      position_delta: int32 `[b]`; a token at index i of its sequence stands at position i + delta.
      active: bool `[b]`, False in an idle row.
      page_table: int32 `[b, m]`, as in `BatchMetadata`.
      sampling: how each row draws.
      scores: of the last token that each row drew.
      heat: int32 `[b, h]`, how often steps of decode have selected each position of a row's sequence, in all layers
        together. h is the number of tokens of a page table, or 0 if that is not counted.
    """

    tokens: jax.Array
    lengths: jax.Array
    position_delta: jax.Array
    active: jax.Array
    page_table: jax.Array
    sampling: SamplingState
    scores: TokenScores
    heat: jax.Array


def active_row(
    *,
    token: int,
    length: int,
    position_delta: int,
    pages: np.ndarray,
    table_width: int,
    vocab: int,
    sampling: SamplingParams,
    prompt: np.ndarray | None = None,
    answer: np.ndarray | None = None,
    bias: Mapping[int, float] | None = None,
    allowed: np.ndarray | None = None,
    heat: np.ndarray | None = None,
    heat_tokens: int = 0,
) -> DecodeState:
    """The values of a row with a sequence: NumPy arrays without the batch dimension.

    Args:
      token, length, position_delta: as in `DecodeState`.
      pages: int32 `[n]`, no more than `table_width`.
      table_width: columns of the state's page tables.
      vocab: size of the vocabulary.
      sampling: how its tokens are drawn.
      prompt, answer, bias, allowed: as for `sampling_row`.
      heat: int32 `[heat_tokens]`, as in `DecodeState`; zeros if left out.
    """
    table = np.zeros(table_width, np.int32)
    table[: len(pages)] = pages
    values: dict[str, Any] = {
        "tokens": np.int32(token),
        "lengths": np.int32(length),
        "position_delta": np.int32(position_delta),
        "active": np.bool_(True),
        "page_table": table,
        "heat": np.zeros(heat_tokens, np.int32) if heat is None else np.asarray(heat, np.int32),
    }
    drawing = sampling_row(sampling, vocab, prompt=prompt, answer=answer, bias=bias, allowed=allowed)
    count = min(MOST_SCORES, vocab)
    zeros: dict[str, Any] = {
        "logprob": np.float32(0),
        "top_tokens": np.zeros(count, np.int32),
        "top_logprobs": np.zeros(count, np.float32),
    }
    return DecodeState(**values, sampling=drawing, scores=TokenScores(**zeros))


def idle_row(table_width: int, vocab: int, heat_tokens: int = 0) -> DecodeState:
    """The values of a row without a sequence, as those of `active_row`."""
    row = active_row(
        token=0,
        length=0,
        position_delta=0,
        pages=np.zeros(0, np.int32),
        table_width=table_width,
        vocab=vocab,
        sampling=SamplingParams(temperature=0.0),
        heat_tokens=heat_tokens,
    )
    idle: Any = np.bool_(False)
    return dataclasses.replace(row, active=idle)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WideValues:
    """What a row has for each token of the vocabulary or of its pages. Mostly it is that of an idle row.

    Attributes:
      counts, in_prompt, bias, allowed: as in `SamplingState`, without the batch dimension.
      heat: as in `DecodeState`.
    """

    counts: Any
    in_prompt: Any
    bias: Any
    allowed: Any
    heat: Any


_SAMPLING = ("counts", "in_prompt", "bias", "allowed")


def wide_values(row: DecodeState) -> WideValues:
    """Those of a row."""
    sampling: Any = {name: getattr(row.sampling, name) for name in _SAMPLING}
    return WideValues(**sampling, heat=row.heat)


def narrow(state: DecodeState) -> Any:
    """A state, or a row, with None in place of `WideValues`."""
    nothing: Any = dict.fromkeys(_SAMPLING)
    others: Any = {"sampling": dataclasses.replace(state.sampling, **nothing), "heat": None}
    return dataclasses.replace(state, **others)


def widen(narrowed: Any, wide: WideValues) -> DecodeState:
    """A row from what `narrow` and `wide_values` gave of it."""
    sampling = dataclasses.replace(narrowed.sampling, **{name: getattr(wide, name) for name in _SAMPLING})
    return dataclasses.replace(narrowed, sampling=sampling, heat=wide.heat)


def pack_row(number: int, row: DecodeState, place: int = 0) -> np.ndarray:
    """The number of a row and its values but `WideValues` as one array, int32 `[n]`: one transfer to the devices.

    Args:
      place: the place of its logits among those of the prompts that were read with its own.
    """
    words = [np.asarray([number, place], np.int32)]
    for value in map(np.atleast_1d, jax.tree.leaves(narrow(row))):
        words.append(value.astype(np.int32) if value.dtype == bool else value.view(np.int32))
    return np.concatenate(words)


def unpack_row(packed: jax.Array, wide: WideValues, state: DecodeState) -> tuple[jax.Array, jax.Array, DecodeState]:
    """Number, place and values of a row of `state` from what `pack_row` returned."""
    like, tree = jax.tree.flatten(narrow(state))
    values, first = [], 2
    for x in like:
        count = int(np.prod(x.shape[1:]))
        words = packed[first : first + count].reshape(x.shape[1:])
        values.append(words != 0 if x.dtype == bool else jax.lax.bitcast_convert_type(words, x.dtype))
        first += count
    return packed[0], packed[1], widen(jax.tree.unflatten(tree, values), wide)
