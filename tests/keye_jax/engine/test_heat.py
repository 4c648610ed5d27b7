"""What answers looked at, against a count of the selections that the model makes of the same tokens."""

import dataclasses

import numpy as np
import pytest

from keye_jax.engine.engine import Engine
from keye_jax.engine.heat import selection_heat
from keye_jax.engine.media.work import describe
from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.runtime import Runtime
from tests.keye_jax.engine.conftest import OPTIONS, ask, words

TOKENS = 40
# Selections at the edge may differ by rounding: each is one of thousands.
ATOL = 2e-3


@pytest.fixture(scope="module")
def warm(make):
    with make(selection_heat=True) as engine:
        engine.warmup()
        yield engine


def content(files):
    """A video, a picture and enough text that most positions are not selected."""
    video, picture = {"type": "video", "video": str(files / "clip.mp4")}, str(files / "picture.png")
    return [video, {"type": "image", "image": picture}, {"type": "text", "text": words(1, 80)}]


def counted(loaded, messages, answer):
    """The heat of an answer, by reading the whole conversation with all intermediates."""
    runtime, processor, _ = loaded
    plan = processor.plan(messages)
    inputs, prompt = processor.process(plan), describe(processor, plan, None)
    normal = {"scale": processor.pixel_scale, "shift": processor.pixel_shift}
    pads = np.isin(inputs.input_ids, (processor.image_token_id, processor.video_token_id))
    media = ((inputs.image_patches, inputs.image_grids), (inputs.video_patches, inputs.video_grids))
    embeds = np.concatenate([runtime.encode(*each, **normal) for each in media])
    ids = np.concatenate([inputs.input_ids, np.asarray(answer[:-1], np.int32)])
    new = np.arange(len(pads), len(ids), dtype=np.int32) + inputs.position_delta
    positions = np.concatenate([inputs.positions, np.broadcast_to(new, (3, len(new)))], axis=1)
    pool, tables = runtime.new_cache(1, len(ids))
    parts = list(runtime.forward_with_intermediates(Segment(ids, positions, tables[0], embeds), pool))
    counts = np.zeros(len(ids), int)
    for layer in range(runtime.config.num_hidden_layers):
        selected = np.concatenate([np.asarray(part[2][layer].attention.selected) for part in parts])[len(pads) :]
        counts += np.bincount(selected[selected >= 0], minlength=len(ids))
    return selection_heat(counts, prompt, pads), counts


def assert_heat(found, expected):
    assert [len(video) for video in found.videos] == [len(video) for video in expected.videos]
    for name in ("videos", "images", "text", "answer"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=ATOL)
    assert sum(map(sum, found.videos)) + sum(found.images) + found.text == pytest.approx(1)


def test_heat_is_the_count_of_what_was_selected(warm, files, loaded):
    request = ask(content(files), tokens=TOKENS, n=2, selection_heat=True)
    request = dataclasses.replace(request, sampling=None)
    handles = [warm.submit(each) for each in (request, ask(words(2, 70), tokens=90), request)]
    first, other, again = [handle.result(120) for handle in handles]
    assert other.choices[0].selection_heat is None
    for choice, same in zip(first.choices, again.choices, strict=True):
        assert choice.finish_reason == "length" and choice.selection_heat == same.selection_heat
        expected, counts = counted(loaded, request.messages, choice.token_ids)
        assert_heat(choice.selection_heat, expected)
        config = loaded[0].config
        assert counts.sum() == (TOKENS - 1) * config.num_hidden_layers * config.sa_config.topk
        # Not what it would be if everything were selected.
        assert np.ptp(choice.selection_heat.videos[0]) > 10 * ATOL
    assert warm.stats().compilations == 0


def test_heat_of_answers_that_end_early(warm):
    """At a stop text, with the first token, cancelled, and before they begin."""
    whole = warm.submit(ask(words(3), tokens=30)).result(120).choices[0]
    stop = (whole.reasoning[5:9],)
    handle = warm.submit(ask(words(3), tokens=30, stop=stop, selection_heat=True, thinking_budget=4))
    assert handle.result(120).choices[0].selection_heat.text == pytest.approx(1)
    (one,) = warm.submit(ask("x", tokens=1, selection_heat=True)).result(120).choices
    assert (one.selection_heat.text, one.selection_heat.answer) == (0, 0)
    cancelled = warm.submit(ask(words(4), tokens=1500, selection_heat=True))
    next(iter(cancelled))
    cancelled.cancel()
    (choice,) = cancelled.result(120).choices
    assert choice.finish_reason == "cancelled" and 0 < choice.selection_heat.answer < 1


@pytest.mark.slow
def test_heat_of_a_preempted_answer(warm, make):
    requests = [ask(words(seed, 60), tokens=150, selection_heat=True) for seed in range(4)]
    expected = [warm.submit(request).result(120).choices[0].selection_heat for request in requests]
    with make(selection_heat=True, optimistic=True, cache_tokens=13 * 64, prefix_cache=False) as short:
        handles = [short.submit(request) for request in requests]
        assert [handle.result(120).choices[0].selection_heat for handle in handles] == expected
        assert short.stats().scheduler.preemptions > 0


def test_dense_attention_selects_nothing(loaded):
    runtime, processor, defaults = loaded
    model = runtime.model_def.merge(runtime.params)
    dense = Runtime(model, runtime.config, options=AttentionOptions("dense"))
    with pytest.raises(UserError, match="selection_heat is True; it must be False with dense attention"):
        Engine(dense, processor, defaults, dataclasses.replace(OPTIONS, selection_heat=True))
