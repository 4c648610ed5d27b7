"""A row's bits do not depend on what the other rows of its batch are: every operation, and the runtime's programs.

A row stands among others, and then alone, the other rows idle or of other numbers, in a batch of the same shape. What
it gives is the same to the bit. Only so does an answer not depend on who else asks at the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams, sample, sampling_row
from pallas_kernels.decode_layer import combine_experts, finish_projections, route
from pallas_kernels.dispatch import available
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention import flash_attention, paged_flash_attention
from pallas_kernels.grouped_matmul import expert_mlp, grouped_matmul
from pallas_kernels.indexer_scores import indexer_scores
from pallas_kernels.select_topk import select_topk
from pallas_kernels.sparse_attention import sparse_attention
from pallas_kernels.topk_attention import topk_attention
from tests.keye_jax.golden_models import golden_model, random_ids, text

ROWS, PAGE, PAGES, HEADS, KV_HEADS, DIM, INDEX_DIM, TOP_K = 4, 64, 5, 32, 4, 128, 64, 64


def numbers(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def integers(seed: int, below: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, below, shape), jnp.int32)


def tables() -> jax.Array:
    """Pages of each row, in any order."""
    return jnp.asarray(np.random.default_rng(0).permutation(ROWS * PAGES).reshape(ROWS, PAGES), jnp.int32)


def lengths(tokens: int) -> jax.Array:
    """The position of each row's first query."""
    return jnp.asarray([17, 200, PAGES * PAGE - tokens, 64], jnp.int32)


type Case = tuple[Callable[..., Any], tuple[jax.Array, ...], tuple[jax.Array, ...], dict[str, Any]]
"""An operation, its arguments by row, those that all rows share, and others."""


def _attention(tokens: int) -> dict[str, Case]:
    q, kv = numbers(1, ROWS, tokens, HEADS, DIM), numbers(2, ROWS * PAGES, PAGE, 2 * KV_HEADS, DIM)
    scores = jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, tokens, PAGES * PAGE)), jnp.float32)
    visible = lengths(tokens)[:, None] + jnp.arange(tokens) + 1
    selected = select_topk(scores, visible, TOP_K, implementation="xla")

    def own(q: jax.Array, table: jax.Array, start: jax.Array, kv: jax.Array, **kwargs: Any) -> Any:
        return paged_flash_attention(q, kv, table, start, **kwargs)

    def sparse(q: jax.Array, selected: jax.Array, table: jax.Array, kv: jax.Array, **kwargs: Any) -> Any:
        return sparse_attention(q, kv, selected, table, **kwargs)

    def topk(
        q: jax.Array, scores: jax.Array, visible: jax.Array, table: jax.Array, kv: jax.Array, **kwargs: Any
    ) -> Any:
        return topk_attention(q, scores, visible, kv, table, **kwargs)

    def index(q: jax.Array, gates: jax.Array, table: jax.Array, start: jax.Array, keys: jax.Array, **kw: Any) -> Any:
        return indexer_scores(q, gates, keys, table, start, fill=True, **kw)

    scale = {"scale": DIM**-0.5}
    gates = jnp.asarray(np.random.default_rng(4).normal(size=(ROWS, tokens, 16)), jnp.float32)
    keys = numbers(6, ROWS * PAGES, PAGE, INDEX_DIM)
    index_rows = (numbers(5, ROWS, tokens, 16, INDEX_DIM), gates, tables(), lengths(tokens))
    return {
        "indexer_scores": (index, index_rows, (keys,), {"scale": INDEX_DIM**-0.5}),
        "select_topk": (select_topk, (scores, visible), (), {"k": TOP_K}),
        "paged_flash_attention": (own, (q, tables(), lengths(tokens)), (kv,), scale),
        "sparse_attention": (sparse, (q, selected, tables()), (kv,), scale),
        "topk_attention": (topk, (q, scores, visible, tables()), (kv,), scale | {"top_k": TOP_K}),
    }


def _flash(tokens: int) -> Case:
    q, k, v = (numbers(seed, ROWS, tokens, 16, 72) for seed in (1, 2, 3))
    return flash_attention, (q, k, v, jnp.asarray([tokens, 1, tokens // 2, tokens], jnp.int32)), (), {"scale": 72**-0.5}


def _decode_layer() -> dict[str, Case]:
    size = 256
    x, index_size = numbers(1, ROWS, size), 16 * (INDEX_DIM + 1)
    angles = [jnp.cos(numbers(seed, ROWS, dim // 2)).astype(jnp.float32) for dim in (DIM, INDEX_DIM) for seed in (3, 4)]
    heads = (numbers(5 + i, ROWS, count, DIM) for i, count in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    products = *heads, numbers(8, ROWS, index_size), numbers(9, ROWS, INDEX_DIM)
    norms = tuple(numbers(10 + i, dim) for i, dim in enumerate((DIM, DIM, INDEX_DIM, INDEX_DIM, INDEX_DIM)))

    def finish(*arrays: jax.Array, **kwargs: Any) -> Any:
        products, angles, norms = arrays[:5], arrays[5:9], arrays[9:]
        run: Callable[..., Any] = finish_projections
        return run(*products, *norms, *angles, **kwargs)

    def combine(
        rows: jax.Array, weights: jax.Array, x: jax.Array, row_of: jax.Array, norm: jax.Array, **kwargs: Any
    ) -> Any:
        return combine_experts(rows.reshape(-1, size), row_of, weights, x, norm, **kwargs)

    def routing(x: jax.Array, update: jax.Array, valid: jax.Array, *arrays: jax.Array, **kwargs: Any) -> Any:
        run: Callable[..., Any] = route
        found = run(x, update, *arrays, valid, **kwargs)
        # Where a row is depends on all tokens, and what it is does not.
        return found.y, found.normed, found.experts, found.weights, found.rows[found.row_of]

    expert_rows, shares = numbers(19, ROWS, 8, size), jax.nn.softmax(numbers(20, ROWS, 8).astype(jnp.float32))
    places = jnp.arange(ROWS)[:, None] * 8 + jnp.asarray([3, 0, 7, 5, 1, 2, 6, 4])
    eps = {"eps": 1e-6}
    router, valid = (numbers(17, size), numbers(18, 32, size)), jnp.asarray([True, True, False, True])
    return {
        "finish_projections": (finish, (*products, *angles), norms, eps | {"index_eps": 1e-6}),
        "route": (routing, (x, numbers(22, ROWS, size), valid), router, eps | {"top_k": 8}),
        "combine_experts": (combine, (expert_rows, shares, x), (places, numbers(21, size)), eps),
    }


CASES: dict[str, Case] = {
    **{f"{name}, decode": case for name, case in _attention(1).items()},
    **{f"{name}, prefill": case for name, case in _attention(24).items()},
    "flash_attention": _flash(64),
    **_decode_layer(),
}


class TestRowsAreIndependent:
    """Each holds what it tests to bits that the other rows do not change."""

    @pytest.mark.parametrize("implementation", available())
    @pytest.mark.parametrize("name", CASES)
    def test_operations(self, name: str, implementation: str):
        operation, by_row, shared, kwargs = CASES[name]
        run = jax.jit(lambda *arrays: operation(*arrays, **kwargs, implementation=implementation))
        try:
            together = jax.tree.leaves(run(*by_row, *shared))
        except (UnsupportedError, ValueError) as error:
            if implementation == "xla":
                raise
            pytest.skip(str(error))
        for row in range(ROWS):
            # The other rows get the arguments of another row: other numbers, lengths and pages.
            others = jnp.asarray([row if each == row else (row + 1) % ROWS for each in range(ROWS)])
            for mine, expected in zip(
                jax.tree.leaves(run(*(x[others] for x in by_row), *shared)), together, strict=True
            ):
                _assert_same_bits(mine[row], expected[row], f"{name}, row {row}")

    @pytest.mark.parametrize("implementation", available())
    @pytest.mark.parametrize("tokens", [4, 96])
    @pytest.mark.parametrize("operation", [grouped_matmul, expert_mlp], ids=lambda operation: operation.__name__)
    def test_rows_of_experts(self, operation: Callable[..., Any], tokens: int, implementation: str):
        """A token's row among few or many others of its expert, wherever it stands among them."""
        experts, hidden, inner = 8, 256, 128
        x, gate_up = numbers(1, tokens, hidden), numbers(2, experts, hidden, 2 * inner)
        weights = (gate_up, numbers(3, experts, inner, hidden)) if operation is expert_mlp else (gate_up,)
        run = jax.jit(lambda x, *rest: operation(x, *rest, implementation=implementation))

        def of(places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
            return run(x[jnp.asarray(places)], *weights, jnp.asarray(sizes, jnp.int32))

        mine, expert = 1, 3
        alone = np.zeros(experts, int)
        alone[expert] = 1
        try:
            expected = of(np.full(tokens, mine), alone)[0]
        except (UnsupportedError, ValueError) as error:
            if implementation == "xla":
                raise
            pytest.skip(str(error))
        for before in (0, 1, tokens // 2, tokens - 1):
            places = np.arange(tokens)
            places[[mine, before]] = places[[before, mine]]
            sizes = np.zeros(experts, int)
            sizes[expert] = tokens - before
            sizes[expert - 1] = before
            _assert_same_bits(of(places, sizes)[before], expected, f"behind {before} rows")
            all_of_one = np.zeros(experts, int)
            all_of_one[expert] = tokens
            _assert_same_bits(of(places, all_of_one)[before], expected, f"behind {before} rows of its expert")

    def test_sampling(self):
        rows = [
            sampling_row(SamplingParams(temperature=0.0), 300),
            sampling_row(SamplingParams(temperature=0.7, top_p=0.8, seed=3), 300),
            sampling_row(SamplingParams(min_p=0.1, repetition_penalty=1.2, top_k=0, seed=3), 300, prompt=np.arange(9)),
        ]
        logits = jnp.asarray(np.random.default_rng(0).normal(scale=3, size=(3, 300)), jnp.float32)
        state: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        run = jax.jit(sample)
        for position in range(20):
            together = run(logits, state, jnp.full(3, position))
            for row in range(3):
                others = jnp.asarray([row if each == row else (row + 1) % 3 for each in range(3)])
                mine = run(
                    logits[others], jax.tree.map(lambda x, others=others: x[others], state), jnp.full(3, position)
                )
                assert mine[row] == together[row]

    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> Runtime:
        model, config = golden_model("a", 2)
        return Runtime(model, config, prefill_chunk=512)

    def test_decode(self, runtime: Runtime):
        """Logits, tokens and counts of a row among others, and with all others idle."""
        texts, starts, steps = [random_ids(160, seed) for seed in range(3)], (150, 30, 97), 4
        params = [SamplingParams(temperature=0), SamplingParams(seed=5), SamplingParams(top_k=0, min_p=0.05, seed=6)]

        def answer(members: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
            """Logits `[steps, b, vocab]` and tokens `[steps, b]` where only these rows are active."""
            pool, tables = runtime.new_cache(3, 170)
            state = runtime.new_state(3, tables.shape[1])
            for row in members:
                _, pool = runtime.prefill([text(texts[row], tables[row], end=starts[row])], pool)
                state = runtime.set_row(
                    state,
                    row,
                    token=int(texts[row][starts[row]]),
                    length=starts[row],
                    position_delta=0,
                    pages=tables[row],
                    sampling=params[row],
                )
            logits, tokens = [], []
            for _ in range(steps):
                found, state, pool = runtime.decode(state, pool)
                state = runtime.draw(found, state)
                logits.append(np.asarray(found))
                tokens.append(np.asarray(state.tokens))
            return np.stack(logits), np.stack(tokens)

        together = answer((0, 1, 2))
        for row in range(3):
            logits, tokens = answer((row,))
            _assert_same_bits(logits[:, row], together[0][:, row], f"row {row}")
            np.testing.assert_array_equal(tokens[:, row], together[1][:, row])

    def test_packed_prefill(self, runtime: Runtime):
        """A chunk's rows of one text, among those of others, and with the others idle: logits and pages."""
        texts, parts = [random_ids(160, seed) for seed in range(3)], ((0, 100), (0, 33), (0, 128))

        def read(members: tuple[int, ...]) -> tuple[dict[int, np.ndarray], list[np.ndarray]]:
            pool, tables = runtime.new_cache(3, 160)
            segments = [text(texts[each], tables[each], *parts[each][:1], end=parts[each][1]) for each in members]
            # A second text of one token makes the chunk a packed one where a text is otherwise alone.
            if len(members) == 1:
                other = (members[0] + 1) % 3
                segments.append(text(texts[other], tables[other], end=1))
            logits, pool = runtime.prefill(segments, pool)
            kept = [
                np.asarray(layer.kv[tables].reshape(3, -1, *layer.kv.shape[2:]), np.float32) for layer in pool.layers
            ]
            return dict(zip(members, np.asarray(logits), strict=False)), kept

        together, pages = read((0, 1, 2))
        for row, (_, end) in enumerate(parts):
            logits, own = read((row,))
            _assert_same_bits(logits[row], together[row], f"text {row}")
            for mine, expected in zip(own, pages, strict=True):
                _assert_same_bits(mine[row, :end], expected[row, :end], f"pages of text {row}")

    def test_prompts_read_together(self, runtime: Runtime):
        """A chunk of one text among chunks of others, in any row, and beside the chunk that it follows."""
        texts, chunk = [random_ids(120, seed) for seed in range(3)], 64
        parts = [(0, 0, 64), (1, 0, 40), (0, 64, 120), (2, 0, 1)]

        def read(*steps: tuple[int, ...]) -> tuple[dict[int, np.ndarray], list[np.ndarray]]:
            """Logits of these of the parts, and the pages of all texts, after steps that read so many together."""
            pool, tables = runtime.new_cache(3, 128)
            found = {}
            for step in steps:
                segments = [
                    text(texts[row], tables[row], start, end=end) for row, start, end in (parts[i] for i in step)
                ]
                logits, pool = runtime.read_chunk(
                    segments, pool, tokens=chunk, sequences=4, table_width=tables.shape[1]
                )
                found |= dict(zip(step, np.asarray(logits), strict=False))
            kept = [
                np.asarray(layer.kv[tables].reshape(3, -1, *layer.kv.shape[2:]), np.float32) for layer in pool.layers
            ]
            return found, kept

        alone, expected = read((0,), (1,), (2,), (3,))
        for steps in (((0, 1, 2, 3),), ((3, 0, 2, 1),), ((1, 3), (0, 2))):
            found, pages = read(*steps)
            for part, logits in found.items():
                _assert_same_bits(logits, alone[part], f"part {part} of {steps}")
            for mine, other in zip(pages, expected, strict=True):
                for row, _, end in parts[1:]:
                    _assert_same_bits(mine[row, :end], other[row, :end], f"pages of text {row} of {steps}")


def _assert_same_bits(got: Any, expected: Any, what: str) -> None:
    got, expected = (
        np.asarray(x, np.float32 if jnp.issubdtype(x.dtype, jnp.floating) else None) for x in (got, expected)
    )
    assert np.array_equal(got, expected, equal_nan=got.dtype.kind == "f"), f"{what}: {np.abs(got - expected).max()}"
