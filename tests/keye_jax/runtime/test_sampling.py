"""Sampling: each row by its own settings, against plain NumPy, in one compiled program."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.errors import UserError
from keye_jax.runtime import sampling as module
from keye_jax.runtime.sampling import (
    SamplingParams,
    SamplingState,
    counted,
    sampling_row,
)

PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
sample, adjusted_logits = jax.jit(module.sample), jax.jit(module.adjusted_logits)
PLAIN = SamplingParams(temperature=1.0, top_p=1.0, top_k=0)


def batch(rows: list[SamplingState]) -> SamplingState:
    """Rows side by side."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def repeated(sampling: SamplingParams, count: int, vocab: int, **kwargs: Any) -> SamplingState:
    """Rows of the same settings, each with a seed of its own."""
    one = sampling_row(sampling, vocab, **kwargs)
    state = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], count, axis=0), one)
    return dataclasses.replace(state, seed=jnp.arange(count, dtype=jnp.uint32))


def frequencies(sampling: SamplingParams, count: int = 4000, **kwargs: Any) -> np.ndarray:
    logits = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None].repeat(count, axis=0)
    state = repeated(sampling, count, 5, **kwargs)
    tokens = np.asarray(sample(logits, state, jnp.zeros(count, jnp.int32)))
    return np.bincount(tokens, minlength=5) / count


def assert_follows(found: np.ndarray, expected: Any, count: int = 4000) -> None:
    """Each frequency is within five standard deviations of its probability, and what is impossible does not occur."""
    expected = np.asarray(expected, np.float64)
    assert not found[expected == 0].any()
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) <= 5 * deviation + 1e-12).all(), (found, expected)


class TestFrequencies:
    def test_plain_sampling_follows_the_probabilities(self):
        found = frequencies(PLAIN)
        assert_follows(found, PROBABILITIES)
        # Chi-square with four degrees of freedom: 18.5 is passed once in a thousand.
        assert 4000 * ((found - PROBABILITIES) ** 2 / PROBABILITIES).sum() < 18.5

    def test_one_seed_draws_anew_at_each_position(self):
        count = 4000
        state = dataclasses.replace(repeated(PLAIN, count, 5), seed=jnp.full(count, 7, jnp.uint32))
        logits = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None].repeat(count, axis=0)
        tokens = np.asarray(sample(logits, state, jnp.arange(count)))
        assert_follows(np.bincount(tokens, minlength=5) / count, PROBABILITIES)

    def test_temperature_sharpens(self):
        sharp = PROBABILITIES**2 / (PROBABILITIES**2).sum()
        assert_follows(frequencies(dataclasses.replace(PLAIN, temperature=0.5)), sharp)

    def test_top_k_keeps_the_best(self):
        assert_follows(frequencies(dataclasses.replace(PLAIN, top_k=2)), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0])

    def test_top_p_keeps_the_fewest_that_reach_it(self):
        assert_follows(frequencies(dataclasses.replace(PLAIN, top_p=0.6)), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0])
        assert frequencies(dataclasses.replace(PLAIN, top_p=0.01), 10)[1] == 1

    def test_top_p_counts_among_what_top_k_leaves(self):
        """Of 0.4 and 0.25 renormalised, 0.6 is reached by the first alone."""
        assert frequencies(dataclasses.replace(PLAIN, top_k=2, top_p=0.6), 100)[1] == 1

    def test_min_p_keeps_what_is_likely_enough(self):
        assert_follows(frequencies(dataclasses.replace(PLAIN, min_p=0.45)), [0, 0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0])

    def test_a_bias_shifts(self):
        shifted = PROBABILITIES * np.exp([2.0, 0, 0, 0, 0])
        assert_follows(frequencies(PLAIN, bias={0: 2.0}), shifted / shifted.sum())


class Reference:
    """One row's sampling in NumPy."""

    def __init__(self, logits: np.ndarray, row: SamplingState):
        self.row = row
        counts, seen = np.asarray(row.counts), np.asarray(row.in_prompt) | (np.asarray(row.counts) > 0)
        logits = logits.astype(np.float64)
        logits[seen] = [
            x / float(row.repetition_penalty) if x > 0 else x * float(row.repetition_penalty) for x in logits[seen]
        ]
        logits -= float(row.frequency_penalty) * counts + float(row.presence_penalty) * (counts > 0)
        logits += np.asarray(row.bias)
        tokens = np.arange(len(logits))
        allowed = (np.asarray(row.allowed)[tokens // 32] >> (tokens % 32).astype(np.uint32)) & 1
        self.logits = np.where(allowed == 1, logits, -np.inf)

    def kept(self) -> np.ndarray:
        """Which tokens may be drawn."""
        scaled = self.logits / float(self.row.temperature)
        order = np.argsort(-scaled, kind="stable")
        order = order[: int(self.row.top_k) or None]
        mass = np.exp(scaled[order] - scaled[order[0]])
        before = (np.cumsum(mass) - mass) / mass.sum()
        order = order[(before < float(self.row.top_p)) & (mass >= float(self.row.min_p)) & (mass > 0)]
        return np.isin(np.arange(len(scaled)), order)

    def token(self, position: int) -> int:
        if self.row.temperature == 0:
            return int(self.logits.argmax())
        key = jax.random.fold_in(jax.random.key(self.row.seed), position)
        noise = np.asarray(jax.random.gumbel(key, self.logits.shape), np.float64)
        return int(np.where(self.kept(), self.logits / float(self.row.temperature) + noise, -np.inf).argmax())


VOCAB = 101


def mask_of(tokens: np.ndarray) -> np.ndarray:
    """Words with these tokens' bits set."""
    words = np.zeros(-(-VOCAB // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return words


def mixed_rows() -> list[SamplingState]:
    """Rows that differ in every setting."""
    rng = np.random.default_rng(1)
    few = mask_of(rng.choice(VOCAB, 30, replace=False))
    history = {"prompt": rng.integers(0, VOCAB, 40), "answer": rng.integers(0, VOCAB, 30)}
    params: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"temperature": 0.0}, {}),
        ({"temperature": 0.0, "top_k": 5, "repetition_penalty": 1.3}, history),
        ({"temperature": 0.0}, {"allowed": few}),
        ({}, {}),
        ({"top_k": 1}, {}),
        ({"top_k": 7}, {}),
        ({"top_k": 1000}, {}),
        ({"top_p": 0.5}, {}),
        ({"top_p": 0.5, "top_k": 20}, {}),
        ({"min_p": 0.2}, {}),
        ({"min_p": 1.0}, {}),
        ({"min_p": 0.05, "top_p": 0.9, "top_k": 12}, {"bias": {3: 2.5, 50: -4.0}}),
        ({"repetition_penalty": 1.5}, history),
        ({"presence_penalty": 1.1, "frequency_penalty": -0.7}, history),
        ({"frequency_penalty": 0.9, "top_k": 9, "repetition_penalty": 0.8}, history),
        ({"top_k": 4, "top_p": 0.9}, {"allowed": few, "bias": {0: 1.0}}),
        ({"temperature": 3.0, "top_p": 0.7}, {"allowed": mask_of(np.asarray([77]))}),
        ({"temperature": 0.2, "min_p": 0.01}, history | {"allowed": few}),
    ]
    return [
        sampling_row(dataclasses.replace(PLAIN, **values, seed=number), VOCAB, **more)
        for number, (values, more) in enumerate(params)
    ]


class TestMixedBatch:
    """All settings in one batch."""

    ROUNDS = 40

    @pytest.fixture
    def rows(self) -> list[SamplingState]:
        return mixed_rows()

    @staticmethod
    def logits(count: int) -> np.ndarray:
        return np.random.default_rng(2).normal(scale=2.5, size=(TestMixedBatch.ROUNDS, count, VOCAB)).astype(np.float32)

    def test_each_row_draws_as_the_reference(self, rows: list[SamplingState]):
        state, logits = batch(rows), self.logits(len(rows))
        for position in range(self.ROUNDS):
            tokens = sample(jnp.asarray(logits[position]), state, jnp.full(len(rows), position))
            expected = [Reference(each, row).token(position) for each, row in zip(logits[position], rows, strict=True)]
            assert np.asarray(tokens).tolist() == expected

    def test_a_token_that_may_not_be_drawn_never_is(self, rows: list[SamplingState]):
        """Many draws of each row stay within its set, and reach most of a small one."""
        logits = self.logits(len(rows))[0]
        for number, row in enumerate(rows):
            if row.temperature == 0:
                continue
            state = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], 200, axis=0), row)
            drawn = np.asarray(sample(jnp.asarray(logits[number])[None].repeat(200, axis=0), state, jnp.arange(200)))
            kept = Reference(logits[number], row).kept()
            assert kept[drawn].all(), f"row {number}"

    def test_greedy_rows_are_the_most_likely_to_the_bit(self, rows: list[SamplingState]):
        state, logits = batch(rows), self.logits(len(rows))
        greedy = np.flatnonzero(np.asarray(state.temperature) == 0)
        for each in logits:
            tokens = np.asarray(sample(jnp.asarray(each), state, jnp.zeros(len(rows), jnp.int32)))
            adjusted = np.asarray(adjusted_logits(jnp.asarray(each), state))
            np.testing.assert_array_equal(tokens[greedy], adjusted[greedy].argmax(axis=-1))
            # The first row has no penalties: nothing is done to its logits.
            np.testing.assert_array_equal(adjusted[0], each[0])

    def test_all_settings_are_one_program(self, rows: list[SamplingState]):
        traced = []

        @jax.jit
        def program(logits: jax.Array, state: SamplingState, positions: jax.Array) -> jax.Array:
            traced.append(logits.shape)
            return module.sample(logits, state, positions)

        logits = jnp.asarray(self.logits(4)[0])
        for first in range(0, len(rows) - 3, 3):
            program(logits, batch(rows[first : first + 4]), jnp.zeros(4, jnp.int32))
        assert traced == [(4, VOCAB)]


class TestManyTokens:
    """A vocabulary larger than `MOST_TOP_K`, so that a nucleus may be too."""

    VOCAB = 3 * module.MOST_TOP_K + 5
    SETTINGS = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.3, top_p=1.0, top_k=2048),
        SamplingParams(temperature=0.5, top_p=0.8, top_k=1000),
        SamplingParams(temperature=0.2, top_p=0.5, top_k=0),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=0),
        SamplingParams(temperature=2.0, top_p=0.99, top_k=0, min_p=0.2),
        SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.3),
        SamplingParams(temperature=1.0, top_p=0.999999, top_k=0),
        PLAIN,
    )

    def test_those_that_stay_are_the_references(self):
        logits = np.random.default_rng(3).normal(size=(len(self.SETTINGS), self.VOCAB)).astype(np.float32)
        rows = [sampling_row(sampling, self.VOCAB) for sampling in self.SETTINGS]
        temperature = np.asarray([sampling.temperature or 1.0 for sampling in self.SETTINGS], np.float32)
        kept = np.asarray(jax.jit(module.kept_tokens)(logits / temperature[:, None], batch(rows)))
        sizes = []
        for row, found, x, sampling in zip(rows, kept, logits, self.SETTINGS, strict=True):
            if not sampling.temperature:
                continue
            expected = Reference(x, row).kept()
            sizes.append(int(expected.sum()))
            assert found[expected].mean() > 0.9999  # float32 sums end a nucleus a token sooner or later
            extra = x[found & ~expected]
            lowest = x[expected].min()
            # The last token of a large nucleus is found to within 2^-12 of its logit.
            assert (extra >= lowest - abs(lowest) * 2**-11 - 1e-4).all()
        assert min(sizes) < module.MOST_TOP_K < max(sizes[4:])


class TestTies:
    def test_logits_are_computed_before_they_are_compared(self):
        """A kernel of a GPU that computes a logit again may round it in another way, and then leave out the best."""
        state = batch([sampling_row(PLAIN, 4)])
        text = jax.jit(module.sample).lower(jnp.zeros((1, 4)), state, jnp.zeros(1, jnp.int32)).as_text()
        assert text.index("stablehlo.divide") < text.index("stablehlo.optimization_barrier") < text.index("top_k")

    def test_greedy_takes_the_lower_of_equal_tokens(self):
        state = batch([sampling_row(SamplingParams(temperature=0.0), 4)])
        assert sample(jnp.asarray([[0.0, 3.0, 3.0, 1.0]]), state, jnp.zeros(1, jnp.int32))[0] == 1

    @pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}])
    def test_tokens_as_likely_as_the_last_one_stay(self, sampling: dict[str, Any]):
        state = repeated(dataclasses.replace(PLAIN, **sampling), 400, 4)
        tokens = np.asarray(sample(jnp.asarray([[0.0, 3.0, 3.0, 1.0]]).repeat(400, axis=0), state, jnp.zeros(400, int)))
        assert set(tokens) == {1, 2}


def test_a_row_does_not_depend_on_the_others():
    logits = jax.random.normal(jax.random.key(1), (64, 100))
    state, positions = repeated(PLAIN, 64, 100), jnp.arange(64)
    together = sample(logits, state, positions)
    assert together[5] == sample(logits[5:6], jax.tree.map(lambda x: x[5:6], state), positions[5:6])[0]
    same, one_seed = logits[:1].repeat(64, axis=0), dataclasses.replace(state, seed=jnp.zeros(64, jnp.uint32))
    assert len(np.unique(np.asarray(sample(same, one_seed, positions)))) > 1
    assert len(np.unique(np.asarray(sample(same, state, jnp.zeros(64, jnp.int32))))) > 1
    assert len(np.unique(np.asarray(sample(same, one_seed, jnp.zeros(64, jnp.int32))))) == 1


def test_rows_that_draw_do_not_see_which_others_do():
    rows = mixed_rows()
    state, logits = batch(rows), jnp.asarray(TestMixedBatch.logits(len(rows))[0])
    positions, scores = jnp.arange(len(rows)), jax.jit(module.token_scores)
    wanted = sample(logits, state, positions)
    for active in (np.arange(len(rows)) % 3 == 1, np.arange(len(rows)) == 7):
        tokens = sample(logits, state, positions, active=jnp.asarray(active))
        np.testing.assert_array_equal(tokens[active], wanted[active])
        found = scores(logits, tokens, active=jnp.asarray(active))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(scores(logits, wanted)), strict=True):
            np.testing.assert_array_equal(one[active], other[active])


def test_drawn_tokens_are_counted_in_active_rows():
    state = repeated(PLAIN, 3, 5, answer=np.asarray([2, 2]))
    after = counted(state, jnp.asarray([2, 4, 1]), jnp.asarray([True, False, True]))
    assert np.asarray(after.counts).tolist() == [[0, 0, 3, 0, 0], [0, 0, 2, 0, 0], [0, 1, 2, 0, 0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0; it must be above 0"),
        ({"top_k": -1}, "top_k is -1; it must be from 0"),
        ({"top_k": 2049}, "top_k is 2049; it must be from 0 .all tokens. to 2048"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3; it must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; it must be from -2 to 2"),
    ],
)
def test_impossible_values_are_named(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        SamplingParams(**values)


def test_a_bias_of_no_token_is_named():
    with pytest.raises(UserError, match="logit_bias has token 5; it must be from 0 to 4"):
        sampling_row(PLAIN, 5, bias={5: 1.0})


def test_defaults_come_from_the_checkpoint(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.3, "top_k": 5, "eos_token_id": [7, 8], "transformers_version": "5"}))
    defaults = GenerationDefaults.from_checkpoint(tmp_path)
    assert defaults.sampling == SamplingParams(temperature=0.3, top_p=0.95, top_k=5)
    assert defaults.end_tokens == {7, 8}
    file.write_text(json.dumps({"do_sample": False}))
    defaults = GenerationDefaults.from_checkpoint(tmp_path, fallback_end=9)
    assert defaults.sampling.temperature == 0
    assert defaults.end_tokens == {9}
    file.unlink()
    assert GenerationDefaults.from_checkpoint(str(tmp_path)).sampling == SamplingParams(0.6, 0.95, 20)
    for content, message in (
        ("{", "is not JSON"),
        ('{"temperature": "hot"}', "generation_config.json: temperature is 'hot'; it must be a number"),
        ('{"top_k": 2.5}', "top_k is 2.5; it must be an integer"),
        ('{"top_p": 1e400}', "the number 1e400 is not finite"),
        ('{"eos_token_id": ["</s>"]}', "eos_token_id is .* it must be a token id or a list of them"),
        ('{"num_beams": 4}', "num_beams is 4; it must be 1 or left out"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            GenerationDefaults.from_checkpoint(tmp_path)
