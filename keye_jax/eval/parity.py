"""Holding a checkpoint to recorded reference arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.kv_cache import PagePool
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.decoder import LayerIntermediates
from keye_jax.processor.positions import mrope_positions
from keye_jax.quantization.schemes import Quantization
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams

EXACT = "exact"
"""`Comparison.kind` of arrays that must be identical."""

OVERLAP = "overlap"
"""`Comparison.kind` of selected sets that need not be identical: what a float8 indexer selects."""

MAX_SELECTION_CHANGE = 0.1
"""Share of the selected positions, over all layers, that may be others with a float8 indexer."""


AGREEMENT = "agreement"
"""`Comparison.kind` of a figure of a model of fewer bits: `Comparison.name` says which."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far a model that is less exact agrees with the reference, over all prompts together.

    Attributes:
      logits: `|difference| / |reference|`, root mean squares of all logits.
      greedy: share of positions whose most likely token is the reference's.
      experts: share of the experts of all tokens and layers that are the reference's.
      selected: share of the selected positions that are the reference's, of queries that see more than they select.
    """

    logits: float
    greedy: float
    experts: float
    selected: float


AGREES: Mapping[str, Agreement] = {
    "fp8": Agreement(logits=0.40, greedy=0.55, experts=0.90, selected=0.92),
    "int8": Agreement(logits=0.20, greedy=0.75, experts=0.94, selected=0.96),
    "int4": Agreement(logits=0.50, greedy=0.40, experts=0.87, selected=0.90),
}
"""What `verify` asks by the format of fewest bits, of weights or of the cache; docs/quantize.md has the figures."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One reference array against what the model computed.

    Attributes:
      name: of the array.
      kind: "exact", "close", within a tolerance, "overlap", of selected sets, or "agreement".
      error: largest absolute difference ("close"), how many entries differ ("exact"), or which share of the selected
        positions are others, of the queries that see more than they may select ("overlap"). Of an "agreement" the
        figure itself.
      passed: whether that is allowed.
    """

    name: str
    kind: str
    error: float
    passed: bool


@dataclasses.dataclass(frozen=True)
class _Trace:
    """What a prompt gave, all chunks together; l layers, t tokens."""

    logits: np.ndarray  # [t, vocab]
    hidden: np.ndarray  # [l, t, embed]
    experts: np.ndarray  # [l, t, k]
    queries: np.ndarray  # [l, t, n, d]
    lse: np.ndarray  # [l, t, n]
    keys: np.ndarray  # [l, t, kv_heads, d]
    index_scores: np.ndarray | None  # [l, t, t], 0 after the query
    selected: np.ndarray | None  # [l, t, t] bool


def verify(runtime: Runtime, golden: Mapping[str, np.ndarray], *, atol: float) -> Iterator[Comparison]:
    """Compares every array of `golden` that this way of running has; names and meanings in docs/correctness.md.

    A sparse runtime is held to the sparse arrays, a dense one to the dense ones; both to the vision encoder's. Where a
    float8 indexer selects other positions, all that follows differs: of the sparse arrays only the selected sets are
    compared then. A model of weights or of a cache of fewer bits is held to `AGREES`, and its vision encoder to the
    arrays.

    Raises:
      UserError: an array has not the shape that this model gives.
    """
    compare, config = _Comparer(golden, atol), runtime.config
    top_k = config.sa_config.topk
    sparse = runtime.options.attention == "sparse"
    float8 = sparse and runtime.options.indexer_dtype is not None
    no_vision = jnp.zeros((0, config.hidden_size), runtime.dtype)
    formats = _formats(runtime.options, config.quantization)
    if formats and sparse and not float8:
        yield from _agreements(agreement(runtime, golden), formats)

    if "text_ids" in golden and not formats:
        ids = golden["text_ids"]
        positions = np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids)))
        trace = _trace(runtime, ids, positions, no_vision)
        if sparse:
            yield from compare.sparse("text", trace, top_k if float8 else None)
        else:
            yield from compare.close("text_dense_logits", trace.logits)
        if not float8:
            teacher = "head_mean_attention_sparse" if sparse else "head_mean_attention_dense"
            yield from compare.close(teacher, _head_mean_attention(trace, config))

    if "pixels" not in golden:
        return
    grids = golden["grids"]
    hidden = runtime.encode(golden["pixels"], grids, project=False)
    yield from compare.close("vit_hidden", np.asarray(hidden, np.float32))
    embeds = runtime.encode(golden["pixels"], grids)
    yield from compare.close("vision_embeds", np.asarray(embeds, np.float32))
    if "mm_ids" not in golden or formats:
        return
    ids, positions, delta = _mm_prompt(golden, config)
    yield from compare.exact("mm_positions", positions)
    if sparse:
        yield from compare.sparse("mm", _trace(runtime, ids, positions, embeds), top_k if float8 else None)
        if "mm_greedy" in golden and not float8:
            greedy = _greedy(runtime, ids, positions, delta, embeds, len(golden["mm_greedy"]))
            yield from compare.exact("mm_greedy", greedy)


def _mm_prompt(golden: Mapping[str, np.ndarray], config: KeyeConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids, positions and the position delta of the prompt with pictures and a video."""
    ids, grids = golden["mm_ids"], golden["grids"]
    images = _image_count(ids, grids, config)
    positions, delta = mrope_positions(
        ids,
        grids[:images],
        grids[images:],
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=config.vision_config.spatial_merge_size,
    )
    return ids, positions, delta


def agreement(runtime: Runtime, golden: Mapping[str, np.ndarray]) -> Agreement:
    """How far a sparse runtime agrees with the arrays of its prompts; a figure is NaN where these have none of it."""
    config, top_k = runtime.config, runtime.config.sa_config.topk
    traces = {}
    if "text_ids" in golden:
        ids = golden["text_ids"]
        positions = np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids)))
        traces["text"] = _trace(runtime, ids, positions, jnp.zeros((0, config.hidden_size), runtime.dtype))
    if "mm_ids" in golden and "pixels" in golden:
        ids, positions, _ = _mm_prompt(golden, config)
        traces["mm"] = _trace(runtime, ids, positions, runtime.encode(golden["pixels"], golden["grids"]))
    errors, norms, greedy, experts, selected = [], [], [], [], []
    for prompt, trace in traces.items():
        if (logits := golden.get(f"{prompt}_logits")) is not None:
            errors.append(np.square(trace.logits - logits, dtype=np.float64).sum())
            norms.append(np.square(logits, dtype=np.float64).sum())
            greedy.append(trace.logits.argmax(-1) == logits.argmax(-1))
        if (wanted := golden.get(f"{prompt}_experts")) is not None:
            experts.append((wanted[..., :, None] == trace.experts[..., None, :]).any(-1))
        if (wanted := golden.get(f"{prompt}_selected")) is not None and trace.selected is not None:
            selected.append(trace.selected[:, top_k:][wanted[:, top_k:]])
    return Agreement(
        logits=float(np.sqrt(sum(errors) / sum(norms))) if norms else np.nan,
        greedy=_share(greedy),
        experts=_share(experts),
        selected=_share(selected),
    )


def _share(found: list[np.ndarray]) -> float:
    """Which part of bools is true; NaN of none."""
    flat = np.concatenate([each.reshape(-1) for each in found]) if found else np.zeros(0, bool)
    return float(flat.mean()) if flat.size else np.nan


def _formats(options: AttentionOptions, quantization: Quantization) -> list[str]:
    """The formats of fewer bits of weights and of the cache."""
    weights = [scheme.format for scheme in (quantization.experts, quantization.attention) if scheme is not None]
    return [*weights, *(["fp8"] if options.cache_dtype else [])]


def _agreements(found: Agreement, formats: list[str]) -> Iterator[Comparison]:
    # "int4" has the fewest bits, and float8 fewer of a number's own than int8.
    wanted = AGREES[next(each for each in ("int4", "fp8", "int8") if each in formats)]
    for field in dataclasses.fields(Agreement):
        value, limit = getattr(found, field.name), getattr(wanted, field.name)
        if not np.isnan(value):
            passed = value <= limit if field.name == "logits" else value >= limit
            yield Comparison(field.name, AGREEMENT, value, bool(passed))


def skipped(
    golden: Mapping[str, np.ndarray],
    options: AttentionOptions,
    quantization: Quantization = Quantization(),  # noqa: B008 (frozen)
) -> tuple[list[str], list[str]]:
    """Arrays that `golden` lacks, and those it has that are not compared with these options."""
    other = _DENSE_ARRAYS if options.attention == "sparse" else _SPARSE_ARRAYS
    if options.attention == "sparse" and options.indexer_dtype is not None:
        other = other | (_SPARSE_ARRAYS - {"text_selected", "mm_selected"})
    if _formats(options, quantization):
        used = _AGREEMENT_ARRAYS if options.attention == "sparse" and options.indexer_dtype is None else set()
        other = (_SPARSE_ARRAYS | _DENSE_ARRAYS) - used
    return sorted((_COMMON_ARRAYS | _SPARSE_ARRAYS | _DENSE_ARRAYS) - golden.keys()), sorted(other & golden.keys())


_COMMON_ARRAYS = {"text_ids", "mm_ids", "mm_positions", "grids", "pixels", "vit_hidden", "vision_embeds"}
_SPARSE_ARRAYS = {f"{prompt}_{what}" for prompt in ("text", "mm") for what in ("logits", "hidden", "index_scores")}
_SPARSE_ARRAYS |= {"text_selected", "text_experts", "mm_selected", "mm_greedy", "head_mean_attention_sparse"}
_AGREEMENT_ARRAYS = {"text_logits", "text_experts", "text_selected", "mm_logits", "mm_selected"}
_DENSE_ARRAYS = {"text_dense_logits", "head_mean_attention_dense"}


class _Comparer:
    def __init__(self, golden: Mapping[str, np.ndarray], atol: float):
        self.golden, self.atol = golden, atol

    def close(self, name: str, computed: np.ndarray) -> Iterator[Comparison]:
        if name in self.golden:
            self._check_shape(name, computed)
            difference = np.abs(computed.astype(np.float64) - self.golden[name])
            # max() of a NaN is a NaN, and no NaN is within a tolerance.
            error = float(difference.max(initial=0.0))
            yield Comparison(name, "close", error, error <= self.atol)

    def exact(self, name: str, computed: np.ndarray) -> Iterator[Comparison]:
        if name in self.golden:
            self._check_shape(name, computed)
            differing = int(np.count_nonzero(computed != self.golden[name]))
            yield Comparison(name, EXACT, differing, differing == 0)

    def overlap(self, name: str, computed: np.ndarray, top_k: int) -> Iterator[Comparison]:
        if name in self.golden:
            self._check_shape(name, computed)
            expected = self.golden[name][:, top_k:]
            common = np.count_nonzero(expected & computed[:, top_k:])
            change = 1 - common / max(1, np.count_nonzero(expected))
            yield Comparison(name, OVERLAP, change, bool(change <= MAX_SELECTION_CHANGE))

    def sparse(self, prompt: str, trace: _Trace, float8_top_k: int | None) -> Iterator[Comparison]:
        """All sparse arrays of a prompt, or the overlap of its selected sets with those of a float8 indexer."""
        assert trace.index_scores is not None and trace.selected is not None
        if float8_top_k is not None:
            yield from self.overlap(f"{prompt}_selected", trace.selected, float8_top_k)
            return
        yield from self.close(f"{prompt}_logits", trace.logits)
        yield from self.close(f"{prompt}_hidden", trace.hidden)
        yield from self.close(f"{prompt}_index_scores", trace.index_scores)
        yield from self.exact(f"{prompt}_selected", trace.selected)
        yield from self.exact(f"{prompt}_experts", trace.experts)

    def _check_shape(self, name: str, computed: np.ndarray) -> None:
        if computed.shape != self.golden[name].shape:
            raise UserError(f"{name} has shape {self.golden[name].shape}; this checkpoint gives {computed.shape}")


def _trace(runtime: Runtime, ids: np.ndarray, positions: np.ndarray, vision_embeds: jax.Array) -> _Trace:
    total = len(ids)
    pool, tables = runtime.new_cache(1, total)
    parts: list[dict[str, np.ndarray]] = []
    segment = Segment(ids, positions, tables[0], vision_embeds)
    for logits, pool, layers, _ in runtime.forward_with_intermediates(segment, pool):  # noqa: B007, B020 (the last stays)

        def stack(pick: Callable[[LayerIntermediates], jax.Array | None], layers=layers) -> np.ndarray:
            return np.stack([np.asarray(pick(layer), np.float32) for layer in layers])

        part = {
            "logits": np.asarray(logits),
            "hidden": stack(lambda layer: layer.hidden),
            "experts": stack(lambda layer: layer.experts).astype(np.int32),
            "queries": stack(lambda layer: layer.attention.query),
            "lse": stack(lambda layer: layer.attention.lse),
        }
        if layers[0].attention.selected is not None:
            part["index_scores"] = stack(lambda layer: layer.attention.index_scores)[..., :total]
            part["selected"] = np.stack([_as_mask(layer, total) for layer in layers])
        parts.append(part)

    def join(name: str, axis: int = 1) -> np.ndarray:
        return np.concatenate([part[name] for part in parts], axis=axis)

    scores = join("index_scores") if "index_scores" in parts[0] else None
    return _Trace(
        logits=join("logits", axis=0),
        hidden=join("hidden"),
        experts=join("experts"),
        queries=join("queries"),
        lse=join("lse"),
        keys=_cached_keys(runtime, pool, tables[0], total),
        index_scores=None if scores is None else np.where(np.isneginf(scores), 0.0, scores),
        selected=None if scores is None else join("selected"),
    )


def _as_mask(layer: LayerIntermediates, total: int) -> np.ndarray:
    """The positions that each of t queries selected as a mask, bool `[t, total]`."""
    assert layer.attention.selected is not None
    selected = np.asarray(layer.attention.selected)
    mask = np.zeros((len(selected), total), bool)
    rows, columns = np.nonzero(selected >= 0)
    mask[rows, selected[rows, columns]] = True
    return mask


def _cached_keys(runtime: Runtime, pool: PagePool, pages: np.ndarray, total: int) -> np.ndarray:
    """Keys of the first `total` tokens of a sequence, float32 `[l, total, kv_heads, d]`."""
    keys = (pool.keys(layer, pages, runtime.rules)[:total] for layer in range(len(pool.layers)))
    return np.stack([multihost_utils.process_allgather(each, tiled=True) for each in keys]).astype(np.float32)


def _head_mean_attention(trace: _Trace, config: KeyeConfig) -> np.ndarray:
    """Attention probabilities averaged over heads, `[l, t, t]`, from queries, cached keys and log-sum-exps."""
    _, tokens, heads, dim = trace.queries.shape
    groups = heads // config.num_key_value_heads
    keys = np.repeat(trace.keys, groups, axis=2)
    logits = np.einsum("ltnd,lsnd->ltsn", trace.queries, keys, dtype=np.float64) * dim**-0.5
    visible = np.tril(np.ones((tokens, tokens), bool))[None] if trace.selected is None else trace.selected
    exponents = np.where(visible[..., None], logits - trace.lse[:, :, None], -np.inf)
    return np.exp(exponents).mean(axis=-1)


def _image_count(ids: np.ndarray, grids: np.ndarray, config: KeyeConfig) -> int:
    """How many of the grids are images: those whose tokens the prompt's image pads are."""
    tokens = np.cumsum([0, *(grids.prod(axis=1) // config.vision_config.spatial_merge_size**2)])
    return int(np.searchsorted(tokens, np.count_nonzero(ids == config.image_token_id)))


def _greedy(
    runtime: Runtime, ids: np.ndarray, positions: np.ndarray, delta: int, vision_embeds: jax.Array, count: int
) -> np.ndarray:
    """The `count` most likely tokens that follow the prompt, one at a time from the cache."""
    pool, tables = runtime.new_cache(1, len(ids) + count)
    logits, pool = runtime.prefill([Segment(ids, positions, tables[0], vision_embeds)], pool)
    state = runtime.new_state(runtime.rules.size("batch"), len(tables[0]))
    greedy = SamplingParams(temperature=0.0)
    where = {"length": len(ids) - 1, "position_delta": delta, "pages": tables[0]}
    state = runtime.set_row(state, 0, token=int(ids[-1]), sampling=greedy, **where)
    tokens = []
    for _ in range(count):
        state = runtime.draw(jnp.broadcast_to(logits, (len(state.tokens), logits.shape[1])), state)
        tokens.append(int(state.tokens[0]))
        logits, state, pool = runtime.decode(state, pool)
        logits = logits[:1]
    return np.asarray(tokens)
