"""Chunked prefill and decoding from the pages give what one prefill gives, beyond top_k."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.kv_cache import PagePool
from keye_jax.model.attention import AttentionOptions
from keye_jax.runtime import lowering
from keye_jax.runtime.decode import DecodeState
from keye_jax.runtime.prefill import round_up
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.golden_models import Trace, float8, golden_model, random_ids, text, traced
from tests.near_ties import assert_leads, assert_tokens_follow, selection_leads, token_leads

TOKENS = 96
SEED = 2
"""Of a text whose selections are all `LEAD` ahead."""
LEAD = 4e-4
ATOL = 2e-4
GREEDY = SamplingParams(temperature=0.0)

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return random_ids(TOKENS, SEED)


def runtime_of(layers: int | None = None, **kwargs) -> Runtime:
    model, config = golden_model("a", layers)
    assert 3 * config.sa_config.topk < TOKENS
    return Runtime(model, config, **kwargs)


def whole(runtime: Runtime, ids: np.ndarray) -> Trace:
    """What one prefill computes."""
    pool, tables = runtime.new_cache(1, len(ids))
    return traced(runtime, text(ids, tables[0]), pool)[0]


def row_of(
    runtime: Runtime, ids: np.ndarray, length: int, pages: np.ndarray, sampling: SamplingParams = GREEDY
) -> DecodeState:
    """A batch of one: the text's token at `length` is to be read."""
    return runtime.set_row(
        runtime.new_state(1, len(pages)),
        0,
        token=int(ids[length]),
        length=length,
        position_delta=0,
        pages=pages,
        sampling=sampling,
    )


def decoded(runtime: Runtime, ids: np.ndarray, first: int) -> tuple[np.ndarray, PagePool]:
    """Logits of tokens `first - 1` and on, `[t, vocab]`: of a prefill of the first ones, then token by token."""
    pool, tables = runtime.new_cache(1, len(ids))
    logits, pool = runtime.prefill([text(ids, tables[0], end=first)], pool)
    rows, state = [np.asarray(logits[0])], row_of(runtime, ids, first, tables[0])
    for index in range(first, len(ids)):
        state = dataclasses.replace(state, tokens=jnp.asarray(ids[index : index + 1]))
        logits, state, pool = runtime.decode(state, pool)
        rows.append(np.asarray(logits[0]))
        state = runtime.draw(logits, state)
        assert int(state.lengths[0]) == index + 1
    return np.stack(rows), pool


@pytest.fixture(scope="module")
def reference(ids) -> Trace:
    runtime = runtime_of()
    trace = whole(runtime, ids)
    assert_leads(selection_leads(trace.scores, runtime.config.sa_config.topk), LEAD)
    return trace


@pytest.mark.parametrize("chunk", [1, 13, 32, 95, 96])
def test_any_prefill_chunk_gives_the_same(ids, reference: Trace, chunk: int):
    got = whole(runtime_of(prefill_chunk=chunk), ids)
    np.testing.assert_allclose(got.logits, reference.logits, atol=ATOL)
    np.testing.assert_array_equal(got.selected, reference.selected)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_decoding_token_by_token_equals_one_prefill(ids, reference: Trace, attention: Literal["sparse", "dense"]):
    runtime = runtime_of(options=AttentionOptions(attention))
    expected = reference.logits if attention == "sparse" else all_logits(ids)
    np.testing.assert_allclose(decoded(runtime, ids, 10)[0], expected[9:], atol=ATOL)


DENSE = AttentionOptions("dense")


def all_logits(ids: np.ndarray, options: AttentionOptions = DENSE, **kwargs: Any) -> np.ndarray:
    """`[t, vocab]` of one prefill."""
    runtime = runtime_of(options=options, **kwargs)
    pool, tables = runtime.new_cache(1, len(ids))
    chunks = runtime.forward_with_intermediates(text(ids, tables[0]), pool)
    return np.concatenate([np.asarray(logits) for logits, _, _, _ in chunks])


def test_a_float8_indexer_selects_much_the_same_from_any_chunk_and_token_by_token(ids, reference: Trace):
    """A rounding that falls the other way may change a selection: a token now and then, not all that follow."""
    options = AttentionOptions(indexer_dtype="float8_e4m3fn")
    runtime = runtime_of(options=options)
    with float8():
        one = whole(runtime, ids).logits
    topk = runtime.config.sa_config.topk
    np.testing.assert_allclose(one[:topk], reference.logits[:topk], atol=ATOL)
    assert np.abs(one - reference.logits).max() > 0.5
    runtime = runtime_of(options=options, prefill_chunk=13)
    chunked = whole(runtime, ids).logits
    by_token, pool = decoded(runtime, ids, 60)
    assert pool.layers[0].index_keys.dtype == jnp.float8_e4m3fn
    for got, expected in ((chunked, one), (by_token, one[59:])):
        assert np.mean(np.abs(got - expected).max(axis=-1) < ATOL) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_a_float8_cache_is_the_same_whichever_step_wrote_it(ids, attention: Literal["sparse", "dense"]):
    """From any chunk and token by token. A rounding that falls the other way may change a token now and then."""
    options = AttentionOptions(attention, cache_dtype="float8_e4m3fn")
    with float8():
        one = all_logits(ids, options, layers=1)
    exact = all_logits(ids, AttentionOptions(attention), layers=1)
    assert 0.01 < np.linalg.norm(one - exact) / np.linalg.norm(exact) < 0.1
    by_token, pool = decoded(runtime_of(1, options=options), ids, 60)
    assert pool.layers[0].kv.dtype == jnp.float8_e4m3fn and pool.layers[0].index_keys.dtype == jnp.float32
    for got, expected in ((all_logits(ids, options, layers=1, prefill_chunk=13), one), (by_token, one[59:])):
        assert np.mean(np.abs(got - expected).max(axis=-1) < 10 * ATOL) > 0.9


def test_sparse_and_dense_differ(ids, reference: Trace):
    dense, topk = all_logits(ids), golden_model("a")[1].sa_config.topk
    np.testing.assert_allclose(dense[:topk], reference.logits[:topk], atol=ATOL)
    assert np.abs(dense - reference.logits).max() > 0.5


class TestDenseBelow:
    """Prompt tokens at positions below it attend densely; generated tokens always select."""

    LIMIT = 48

    def last_logits(self, runtime: Runtime, ids: np.ndarray, room: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
        """Of the whole prompt, and of a generated token behind it."""
        pool, tables = runtime.new_cache(1, room)
        logits, pool = runtime.prefill([text(ids, tables[0], end=TOKENS - 1)], pool)
        written, *_ = runtime.decode(row_of(runtime, ids, TOKENS - 1, tables[0]), pool)
        return np.asarray(logits[0]), np.asarray(written[0])

    def by_hand(self, ids: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first tokens read by a dense runtime, the others and the generated one by a sparse one."""
        sparse, dense = runtime_of(), runtime_of(options=AttentionOptions("dense"))
        pool, tables = sparse.new_cache(1, TOKENS)
        logits, pool = dense.prefill([text(ids, tables[0], end=limit)], pool)
        if limit < TOKENS - 1:
            logits, pool = sparse.prefill([text(ids, tables[0], limit, end=TOKENS - 1)], pool)
        written, *_ = sparse.decode(row_of(sparse, ids, TOKENS - 1, tables[0]), pool)
        return np.asarray(logits[0]), np.asarray(written[0])

    @pytest.mark.parametrize("limit", [LIMIT, TOKENS - 1])
    def test_where_it_ends_tokens_select(self, ids, reference: Trace, limit: int):
        got, expected = self.last_logits(runtime_of(dense_below=limit), ids), self.by_hand(ids, limit)
        np.testing.assert_allclose(got, expected, atol=ATOL)
        assert np.abs(got[0] - reference.logits[TOKENS - 2]).max() > 0.1
        assert np.abs(got[1] - all_logits(ids)[-1]).max() > 0.1

    def test_the_room_for_a_sequence_does_not_matter(self, ids, reference: Trace):
        for room in (TOKENS, 8 * TOKENS):
            np.testing.assert_allclose(
                self.last_logits(runtime_of(), ids, room), reference.logits[-2:], atol=ATOL, err_msg=f"{room} tokens"
            )

    def test_nothing_is_dense_unless_asked_for(self):
        assert runtime_of().dense_below == 0


def test_decode_and_sample_is_decode_and_draw(ids):
    """Greedy, and by a seed; the draws are safe."""
    runtime, start = runtime_of(), 50
    for sampling in (GREEDY, SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=3)):
        pools, states = [], []
        for _ in range(2):
            pool, tables = runtime.new_cache(1, TOKENS)
            pools.append(runtime.prefill([text(ids, tables[0], end=start)], pool)[1])
            states.append(row_of(runtime, ids, start, tables[0], sampling))
        for index in range(5):
            logits, states[0], pools[0] = runtime.decode(states[0], pools[0])
            scores = np.asarray(logits)
            if sampling.temperature:
                key = jax.random.fold_in(jax.random.key(sampling.seed), start + index + 1)
                scores = scores + np.asarray(jax.random.gumbel(key, logits.shape[1:]))
            assert_leads(token_leads(scores), ATOL)
            states[0] = runtime.draw(logits, states[0])
            states[1], pools[1] = runtime.decode_and_sample(states[1], pools[1])
            assert states[0].tokens[0] == states[1].tokens[0] == scores[0].argmax()
            assert states[0].lengths[0] == states[1].lengths[0] == start + index + 1
            np.testing.assert_array_equal(states[0].sampling.counts, states[1].sampling.counts)


def test_a_mask_may_come_between_decode_and_draw(ids):
    runtime, start = runtime_of(), 50
    pool, tables = runtime.new_cache(1, TOKENS)
    _, pool = runtime.prefill([text(ids, tables[0], end=start)], pool)
    state = row_of(runtime, ids, start, tables[0])
    logits, state, pool = runtime.decode(state, pool)
    allowed = np.arange(runtime.config.vocab_size) % 7 == 3
    words = np.packbits(np.pad(allowed, (0, -len(allowed) % 32)).reshape(1, -1), axis=1, bitorder="little")
    state = runtime.draw(logits, runtime.set_allowed(state, {0: words.view(np.uint32)[0]}))
    assert int(state.tokens[0]) == np.where(allowed, np.asarray(logits[0]), -np.inf).argmax()
    assert int(state.tokens[0]) != np.asarray(logits[0]).argmax()


def test_the_first_token_of_an_answer_is_drawn_from_the_prompt(ids, reference: Trace):
    """Row 0 stands at the prompt's last token, whose logits prefill gave; idle rows stay as they are."""
    runtime = runtime_of()
    pool, tables = runtime.new_cache(1, TOKENS)
    logits, pool = runtime.prefill([text(ids, tables[0])], pool)
    state = runtime.set_row(
        runtime.new_state(2, len(tables[0])),
        0,
        token=int(ids[-1]),
        length=TOKENS - 1,
        position_delta=0,
        pages=tables[0],
        sampling=GREEDY,
    )
    state = runtime.draw(jnp.broadcast_to(logits, (2, logits.shape[1])), state)
    assert_tokens_follow([int(state.tokens[0])], reference.logits[-1:], ATOL)
    assert np.asarray(state.lengths).tolist() == [TOKENS, 0]
    assert np.asarray(state.sampling.counts).sum(axis=1).tolist() == [1, 0]


def test_images_are_encoded_in_bounded_chunks(golden, monkeypatch):
    arrays = np.load(golden / "a" / "golden.npz")
    runtime = runtime_of()
    at_once = runtime.encode(arrays["pixels"], arrays["grids"])
    monkeypatch.setattr("keye_jax.runtime.encode.ENCODE_PATCHES", 1)
    one_by_one = runtime.encode(arrays["pixels"], arrays["grids"])
    np.testing.assert_allclose(np.asarray(one_by_one), np.asarray(at_once), atol=1e-5)
    np.testing.assert_allclose(np.asarray(at_once), arrays["vision_embeds"], atol=5e-4)


def test_uint8_patches_are_normalised_on_the_device():
    runtime = runtime_of()
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (24, 3, 14, 14)).astype(np.uint8)
    grids = np.array([[1, 4, 6]])
    scale, shift = (np.asarray(x, np.float32) for x in ([1 / 127.5, 1 / 100, 1 / 50], [-1, -0.5, 0.25]))
    normalised = patches * scale[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(
        np.asarray(runtime.encode(patches, grids, scale=scale, shift=shift)),
        np.asarray(runtime.encode(normalised.astype(np.float32), grids)),
        atol=1e-4,
    )


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 4097, 131_072, 200_001])
def test_sizes_are_rounded_up_a_little(size: int):
    rounded = round_up(size)
    assert size <= rounded <= size + max(64, size / 8)


def test_compiled_steps_are_those_that_run(ids, caplog):
    runtime = runtime_of(prefill_chunk=40)
    prefill, decode = lowering.prefill_programs(runtime, TOKENS), lowering.decode_program(runtime, 1, TOKENS)
    lowering.workspace_bytes([*prefill, decode])
    with jax.log_compiles():
        pool, tables = runtime.new_cache(1, TOKENS)
        _, pool = runtime.prefill([text(ids, tables[0], end=TOKENS - 1)], pool)
        runtime.decode_and_sample(row_of(runtime, ids, TOKENS - 1, tables[0]), pool)
    compiled = [str(record.args[0]) for record in caplog.records if record.msg.startswith("Compiling")]  # type: ignore[index]
    assert any("chunk_inputs" in name for name in compiled)
    assert not any("prefill" in name or "decode" in name for name in compiled)


def test_all_settings_of_sampling_are_one_program(ids, caplog):
    """What a row is asked for changes no program: neither that of a step, nor that of a draw."""
    runtime = runtime_of()
    pool, tables = runtime.new_cache(1, TOKENS)
    _, pool = runtime.prefill([text(ids, tables[0], end=50)], pool)
    settings = [
        GREEDY,
        SamplingParams(),
        SamplingParams(0.3, 1.0, 0, 0.1, seed=4),
        SamplingParams(1.0, 0.5, 7, 0.0, 1.2),
    ]

    def step(sampling: SamplingParams, pool: PagePool) -> PagePool:
        state, pool = runtime.decode_and_sample(row_of(runtime, ids, 50, tables[0], sampling), pool)
        logits, state, pool = runtime.decode(state, pool)
        runtime.draw(logits, state)
        return pool

    pool = step(settings[0], pool)
    with jax.log_compiles():
        for sampling in settings[1:]:
            pool = step(sampling, pool)
    assert not [record for record in caplog.records if record.msg.startswith("Compiling")]
