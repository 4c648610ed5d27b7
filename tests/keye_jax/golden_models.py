"""The golden models for tests of the runtime: loading some of their layers, and all that they compute of a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from convert import load_params
from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import BatchMetadata, PagePool
from keye_jax.model.decoder import LayerIntermediates
from keye_jax.model.keye import Keye
from keye_jax.runtime import programs
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules, ShardingConfig, StepSharding

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = Path(__file__).parents[2] / "configs"


@functools.cache
def golden_model(name: str, layers: int | None = None) -> tuple[Keye, KeyeConfig]:
    """A golden model, or its first layers, and its configuration."""
    whole = KeyeConfig.from_file(GOLDEN / name)
    params = load_params(GOLDEN / name, whole)
    layers = layers or whole.num_hidden_layers
    numbered = params["decoder"]["layers"]
    params["decoder"]["layers"] = {number: numbered[number] for number in map(str, range(layers))}
    config = dataclasses.replace(whole, num_hidden_layers=layers)
    return Keye.from_params(config, params), config


def rules_of(
    config: KeyeConfig, mesh: dict[str, int], rules: dict[str, str | list[str]], experts: str = "auto"
) -> MeshRules:
    """A mesh of virtual devices."""
    values = {"mesh": mesh, "rules": rules, "exchange": {"experts": experts}}
    return MeshRules.create(ShardingConfig.from_dict(values), config)


def preset(name: str, config: KeyeConfig) -> MeshRules:
    """The mesh of a file in `configs/sharding`."""
    return MeshRules.create(ShardingConfig.from_file(CONFIGS / "sharding" / f"{name}.yaml"), config)


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    """Token ids of a text, int32 `[count]`."""
    return np.random.default_rng(seed).integers(0, 500, count).astype(np.int32)


def text_positions(count: int, start: int = 0) -> np.ndarray:
    """Positions of text, int32 `[3, count]`."""
    return np.broadcast_to(np.arange(start, start + count, dtype=np.int32), (3, count))


def text(ids: np.ndarray, pages: np.ndarray, start: int = 0, *, end: int | None = None) -> Segment:
    """Tokens `start` to `end - 1` of a text."""
    part = ids[start:end]
    return Segment(part, text_positions(len(part), start), pages, start=start)


@contextlib.contextmanager
def float8() -> Iterator[None]:
    """Skips a test where XLA's compiler has no float8 for the CPU: without F16C it fails to link the conversion."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "Failed to materialize symbols" not in str(error):
            raise
        pytest.skip("XLA converts no float8 for this instruction set")


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a model computed of neighbouring tokens.

    Attributes:
      logits: `[t, vocab]`.
      scores: `[l, t, s]`, -inf after the query.
      selected: int32 `[l, t, top_k]`.
      moe_input: `[l, t, embed]`.
      experts: int32 `[l, t, k]`.
      hidden: `[l, t, embed]`.
    """

    logits: np.ndarray
    scores: np.ndarray
    selected: np.ndarray
    moe_input: np.ndarray
    experts: np.ndarray
    hidden: np.ndarray

    @classmethod
    def join(cls, parts: list[Trace]) -> Trace:
        """The traces of parts, one after the other."""
        joined = {
            field.name: np.concatenate(
                [getattr(part, field.name) for part in parts], axis=0 if field.name == "logits" else 1
            )
            for field in dataclasses.fields(cls)
        }
        return cls(**joined)


def _trace(logits: jax.Array | np.ndarray, layers: tuple[LayerIntermediates, ...]) -> Trace:
    attention = [layer.attention for layer in layers]
    return Trace(
        np.asarray(logits),
        np.stack([np.asarray(each.index_scores) for each in attention]),
        np.stack([np.asarray(each.selected) for each in attention]),
        *(np.stack([np.asarray(getattr(x, name)) for x in layers]) for name in ("moe_input", "experts", "hidden")),
    )


def traced(runtime: Runtime, segment: Segment, pool: PagePool) -> tuple[Trace, PagePool]:
    """What prefill computes of a segment, and the pool."""
    parts = []
    for logits, pool, layers, _ in runtime.forward_with_intermediates(segment, pool):  # noqa: B007, B020 (the last one stays)
        parts.append(_trace(logits, layers))
    return Trace.join(parts), pool


def traced_decode(
    runtime: Runtime, tokens: np.ndarray, lengths: np.ndarray, tables: np.ndarray, pool: PagePool
) -> tuple[Trace, PagePool]:
    """What a step of decode computes of one token of each of t texts, and the pool.

    Args:
      tokens, lengths: int32 `[t]`, each text's token and its position; -1 for a row that is idle.
      tables: int32 `[t, m]`, their pages: row i has those of home `i // (t / homes)`, t rounded up to as many a home.
    """
    homes, step = runtime.rules.size("batch"), runtime.decode_step
    count = len(tokens)
    idle = -count % homes
    active = np.pad(lengths >= 0, (0, idle)).astype(np.int32)
    tokens, lengths, tables = (np.pad(x, ((0, idle), *((0, 0),) * (x.ndim - 1))) for x in (tokens, lengths, tables))
    ids = runtime.put(tokens[:, None].astype(np.int32))
    no_vision = runtime.put(np.zeros((1, runtime.config.hidden_size), np.float32))
    text_only = runtime.put(np.full((count + idle, 1), -1, np.int32))
    x = _embed(runtime.model_def, runtime.params, ids, no_vision, text_only, step=step)
    lengths = np.maximum(lengths, 0).astype(np.int32)
    logits, pool, layers = programs.forward_with_intermediates(
        runtime.model_def,
        runtime.params,
        x,
        runtime.put(np.broadcast_to(lengths[:, None], (3, count + idle, 1))),
        BatchMetadata(runtime.put(tables.astype(np.int32)), runtime.put(lengths), runtime.put(active)),
        pool,
        step=step,
        options=dataclasses.replace(runtime.options, intermediates=True),
    )
    only = jax.tree.map(lambda x: np.asarray(x)[:count, 0], layers)
    return _trace(np.asarray(logits)[:count, 0], only), pool


@functools.partial(jax.jit, static_argnames=("model", "step"))
def _embed(
    model: programs.ModelDef,
    params: programs.Params,
    ids: jax.Array,
    vision_embeds: jax.Array,
    vision_index: jax.Array,
    *,
    step: StepSharding,
) -> jax.Array:
    return model.merge(params).embed(ids, vision_embeds, vision_index, step)
