"""The engine's promise on eight virtual devices: a request has the same tokens whatever runs beside it.

Under `expert` a sequence has a home, and under `combined` its pages are on all devices.
"""

import dataclasses

import numpy as np
import pytest

from keye_jax.config import KeyeConfig
from keye_jax.engine.checkpoint import load
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.engine.conftest import GREEDY, ask, words
from tests.keye_jax.golden_models import preset

ROWS, TOKENS, WATCHED_TOKENS = 16, 104, 32
# Two sequences share a home under `expert`. Their prompts have 6 pages and a part of a seventh: longer than top_k, and
# than a large chunk of 256 tokens.
OPTIONS = EngineOptions(rows=ROWS, cache_tokens=16384, max_context=1024, small_chunk=64, media_workers=1)
# With `optimistic` each of 16 sequences begins with 8 pages, and grows to 9: the second of a shard finds none.
SHORT = 8 * 17 * 64
WATCHED = (0, ROWS - 1)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_to_compile")]


@pytest.fixture(scope="module", params=["expert", "combined"])
def make(request, files):
    """Makes an engine of one model on eight devices."""
    rules = preset(request.param, KeyeConfig.from_file(files / "checkpoint"))
    assert rules.devices == 8
    loaded = load(files / "checkpoint", dtype="float32", prefill_chunk=32, rules=rules)

    def call(**options):
        return Engine(*loaded, options=dataclasses.replace(OPTIONS, **options))

    return call


def request(number, count=TOKENS):
    """Each has a prompt of its own. One in two is greedy."""
    sampling = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=number) if number % 2 else GREEDY
    return ask(words(number, 94 + number % 3), tokens=count, sampling=sampling)


def tokens(handle):
    (choice,) = handle.result(600).choices
    return choice.token_ids


def shares(heat):
    """Of a picture, the text and the answer."""
    return [*heat.images, heat.text, heat.answer]


def test_the_same_tokens_whatever_runs_beside(make):
    """Alone, among others, with a cached prefix, and preempted."""
    with make(prefix_cache=False) as engine:
        alone = {number: tokens(engine.submit(request(number, WATCHED_TOKENS))) for number in WATCHED}
    with make() as engine:
        handles = [engine.submit(request(number)) for number in range(ROWS)]
        everyone = [tokens(handle) for handle in handles]
        assert all(384 < handle.result().usage.prompt <= 448 for handle in handles)
        for number in WATCHED:
            assert everyone[number][:WATCHED_TOKENS] == alone[number]
            again = engine.submit(request(number, WATCHED_TOKENS))
            assert tokens(again) == alone[number]
            assert again.result().usage.cached == 384
    with make(optimistic=True, prefix_cache=False, cache_tokens=SHORT) as short:
        handles = [short.submit(request(number)) for number in range(ROWS)]
        assert [tokens(handle) for handle in handles] == everyone
        assert short.stats().scheduler.preemptions > 0


def test_grammars_budgets_and_heat(make, loaded, files):
    """Under a grammar that allows one answer, it looks at what it looks at on one device; others stay as they are."""
    matcher = pytest.importorskip("llguidance").LLMatcher
    forced = tuple(range(100, 140))
    grammar = matcher.grammar_from_lark("start: " + " ".join(f"<[{token}]>" for token in forced))
    content = [{"type": "image", "image": str(files / "picture.png")}, {"type": "text", "text": words(3, 88)}]
    looks = ask(content, tokens=64, thinking_budget=0, grammar=grammar, selection_heat=True)
    digits = matcher.grammar_from_regex("[0-9]{8,12}")
    sampling = SamplingParams(temperature=1.5, seed=7)
    bound = ask(words(4, 88), tokens=64, thinking_budget=3, grammar=digits, sampling=sampling)
    with Engine(*loaded, options=dataclasses.replace(OPTIONS, selection_heat=True)) as engine:
        expected = engine.submit(looks).result(600).choices[0].selection_heat
    with make(selection_heat=True) as engine:
        alone = tokens(engine.submit(bound))
        asked = [engine.submit(each) for each in (*map(request, range(4)), looks, bound, looks)]
        *_, first, second, third = (handle.result(600).choices[0] for handle in asked)
    assert second.token_ids == alone and second.text.isdecimal() and 8 <= len(second.text) <= 12
    assert second.reasoning_tokens <= 4  # with the closing mark
    for choice in (first, third):
        assert [token for token in choice.token_ids if token in forced] == list(forced)
        assert choice.finish_reason == "stop"
        found = shares(choice.selection_heat)
        assert all(found)
        # Selections at the edge may differ by rounding.
        np.testing.assert_allclose(found, shares(expected), atol=5e-3)
