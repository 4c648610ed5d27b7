import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.runtime.sampling import GenerationDefaults, Sampling, sample

PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.2, 0.1])


def rows(count):
    """A seed and a position for each row: one seed, as in one answer."""
    return jnp.zeros(count, jnp.uint32), jnp.arange(count)


def draw(sampling, count=4000):
    logits = jnp.log(jnp.asarray(PROBABILITIES))[None].repeat(count, axis=0)
    tokens = np.asarray(sample(logits, *rows(count), sampling))
    return np.bincount(tokens, minlength=5) / count


def test_greedy_takes_the_most_likely():
    assert draw(Sampling(temperature=0.0), 3)[1] == 1


def test_a_row_does_not_depend_on_the_others():
    logits, (seeds, positions) = jax.random.normal(jax.random.key(1), (64, 100)), rows(64)
    together = sample(logits, seeds, positions, Sampling(1.0))
    assert together[5] == sample(logits[5:6], seeds[5:6], positions[5:6], Sampling(1.0))[0]
    same = logits[:1].repeat(64, axis=0)
    assert len(np.unique(np.asarray(sample(same, seeds, positions, Sampling(1.0))))) > 1
    assert len(np.unique(np.asarray(sample(same, positions.astype(jnp.uint32), positions, Sampling(1.0))))) > 1


def test_plain_sampling_follows_the_probabilities():
    np.testing.assert_allclose(draw(Sampling(1.0, 1.0, 0)), PROBABILITIES, atol=0.03)


def test_temperature_sharpens():
    sharp = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    np.testing.assert_allclose(draw(Sampling(0.5, 1.0, 0)), sharp, atol=0.03)


def test_top_k_keeps_the_best():
    np.testing.assert_allclose(draw(Sampling(1.0, 1.0, 2)), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0], atol=0.03)


def test_top_p_keeps_the_fewest_that_reach_it():
    np.testing.assert_allclose(draw(Sampling(1.0, 0.6, 0)), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0], atol=0.03)
    assert draw(Sampling(1.0, 0.01, 0), 10)[1] == 1


@pytest.mark.parametrize(
    ("values", "field"), [({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_k": -1}, "top_k")]
)
def test_impossible_values_are_named(values, field):
    with pytest.raises(ValueError, match=field):
        Sampling(**values)


def test_defaults_come_from_the_checkpoint(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.3, "top_k": 5, "eos_token_id": [7, 8], "transformers_version": "5"}))
    defaults = GenerationDefaults.from_checkpoint(tmp_path)
    assert defaults.sampling == Sampling(temperature=0.3, top_p=0.95, top_k=5)
    assert defaults.end_tokens == {7, 8}
    file.write_text(json.dumps({"do_sample": False}))
    defaults = GenerationDefaults.from_checkpoint(tmp_path, fallback_end=9)
    assert defaults.sampling.temperature == 0
    assert defaults.end_tokens == {9}
    file.unlink()
    assert GenerationDefaults.from_checkpoint(str(tmp_path)).sampling == Sampling(0.6, 0.95, 20)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        GenerationDefaults.from_checkpoint(tmp_path)
