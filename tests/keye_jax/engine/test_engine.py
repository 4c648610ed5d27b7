"""Many requests at once: each is answered as if it were alone, or refused for what it is."""

import asyncio
import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from keye_jax.engine.checkpoint import load
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.request import Piece, Request, RequestError
from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.engine.conftest import GREEDY, OPTIONS, ask, words
from tests.keye_jax.golden_models import float8
from tests.keye_jax.processor.conftest import clips  # noqa: F401


def tokens(handle):
    return [choice.token_ids for choice in handle.result(120).choices]


def sampled(seed):
    return SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=seed)


@pytest.mark.parametrize("sampling", [GREEDY, sampled(3)])
def test_the_same_tokens_whatever_runs_beside(engine, make, sampling):
    """Alone, among others, and with a cached prefix."""
    request = ask(words(1, 90), tokens=12, sampling=sampling)
    with make(prefix_cache=False) as alone:
        expected = tokens(alone.submit(request))
    others = [engine.submit(ask(words(seed, 5 + 9 * seed), tokens=20, sampling=sampled(seed))) for seed in range(2, 9)]
    assert tokens(engine.submit(request)) == expected
    for other in others:
        other.result(120)
    again = engine.submit(request)
    assert tokens(again) == expected
    usage = again.result().usage
    assert usage.prompt - 2 * 64 < usage.cached < usage.prompt
    assert engine.stats().compilations == 0


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_prompts_read_together_have_the_same_tokens(files, monkeypatch, prefix_cache):
    """Alone, and in one step with others: texts of one chunk and of two, and a picture."""
    loaded = load(files / "checkpoint", dtype="float32", prefill_chunk=256, media={"max_pixels": 100352})
    together = dataclasses.replace(OPTIONS, prompts_together=4, chunks_between=4, prefix_cache=prefix_cache)
    picture = [{"type": "image", "image": str(files / "picture.png")}, {"type": "text", "text": "What?"}]
    asked = [ask(words(1, 5)), ask(words(2, 8), sampling=sampled(3)), ask(words(1, 20)), ask(picture)]
    reads = []
    with Engine(*loaded, options=together) as engine:
        engine.warmup()
        expected = [tokens(engine.submit(request)) for request in asked]
    with Engine(*loaded, options=together) as engine:
        engine.warmup()
        run = engine._stepper.run
        monkeypatch.setattr(
            engine._stepper, "run", lambda plan, *others: reads.append(plan.reads) or run(plan, *others)
        )
        blocker = engine.submit(ask(words(9, 30), tokens=40))  # the others come while it is read and answered
        next(iter(blocker))
        handles = [engine.submit(request) for request in asked]
        assert [tokens(handle) for handle in handles] == expected
        assert engine.stats().compilations == 0
    assert max(map(len, reads)) > 1


@pytest.mark.slow
def test_a_preempted_request_goes_on_as_if_nothing_had_been(engine, make):
    requests = [ask(words(seed, 60), tokens=150, sampling=sampled(seed)) for seed in range(4)]
    expected = [tokens(engine.submit(request)) for request in requests]
    with make(optimistic=True, cache_tokens=13 * 64, prefix_cache=False) as short:
        handles = [short.submit(request) for request in requests]
        assert [tokens(handle) for handle in handles] == expected
        assert short.stats().scheduler.preemptions > 0


@pytest.mark.slow
def test_a_float8_cache_keeps_the_promise(files):
    """Alone, among others, preempted, and with a cached prefix: scales travel with their pages."""
    options = dataclasses.replace(OPTIONS, media_workers=0)
    cache = AttentionOptions(cache_dtype="float8_e4m3fn")
    loaded = load(files / "checkpoint", dtype="float32", prefill_chunk=128, attention=cache)
    endless = dict.fromkeys(loaded[2].end_tokens, -100.0)
    requests = [ask(words(seed, 60), tokens=150, sampling=sampled(seed), logit_bias=endless) for seed in range(4)]
    with Engine(*loaded, options=options) as engine, float8():
        results = [engine.submit(request).result(120) for request in (*requests, requests[0])]
    *expected, again = [result.choices[0].token_ids for result in results]
    assert again == expected[0]
    assert results[0].usage.cached == 0 < results[-1].usage.cached
    short = dataclasses.replace(options, optimistic=True, cache_tokens=13 * 64, prefix_cache=False)
    with Engine(*loaded, options=short) as engine:
        handles = [engine.submit(request) for request in requests]
        assert [tokens(handle) for handle in handles] == [[each] for each in expected]
        assert engine.stats().scheduler.preemptions > 0


def test_videos_and_pictures(engine, files, loaded):
    content = [
        {"type": "video", "video": str(files / "clip.mp4")},
        {"type": "image", "image": str(files / "picture.png")},
        {"type": "text", "text": "What?"},
    ]
    first, second = (engine.submit(ask(content)).result(120) for _ in range(2))
    assert first.choices[0].token_ids == second.choices[0].token_ids
    assert first.usage.video > 0 and first.usage.image > 0
    assert second.usage.cached > first.usage.cached == 0
    assert first.frame_times == second.frame_times and len(first.frame_times[0]) == 4
    _, processor, _ = loaded
    plan = processor.plan([{"role": "user", "content": content}])
    assert plan.num_tokens == first.usage.prompt
    third = engine.submit(Request(plan=plan, max_tokens=8, sampling=GREEDY)).result(120)
    assert third.choices[0].token_ids == first.choices[0].token_ids


def test_a_picture_of_an_extreme_shape_compiles_nothing(engine, tmp_path):
    """It has more pixels than `max_pixels` says, since no side is shorter than a token's."""
    Image.new("RGB", (20_000, 100)).save(tmp_path / "long.png")
    picture, text = {"type": "image", "image": str(tmp_path / "long.png")}, {"type": "text", "text": "What?"}
    before = engine.stats().compilations
    result = engine.submit(ask([picture, text])).result(120)
    assert result.usage.image * 784 > 100_352
    assert engine.stats().compilations == before


def logprobs(runtime, processor, inputs, tokens, answer):
    """Log probabilities that the runtime gives an answer, without an engine.

    Args:
      inputs: the media of the prompt.
      tokens: what the prompt is, as `Processor.expand` returns it.
    """
    embeds = runtime.encode(
        inputs.video_patches, inputs.video_grids, scale=processor.pixel_scale, shift=processor.pixel_shift
    )
    prompt = len(tokens.input_ids)
    ids = np.concatenate([tokens.input_ids, np.asarray(answer[:-1], np.int32)])
    new = np.arange(prompt, len(ids), dtype=np.int32) + tokens.position_delta
    positions = np.concatenate([tokens.positions, np.broadcast_to(new, (3, len(new)))], axis=1)
    pool, tables = runtime.new_cache(1, len(ids))
    parts = runtime.forward_with_intermediates(Segment(ids, positions, tables[0], np.asarray(embeds)), pool)
    logits = np.concatenate([np.asarray(part[0]) for part in parts])[prompt - 1 :]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(answer)), answer]


def test_of_a_damaged_video_the_prompt_states_the_times_that_are_shown(engine, loaded, clips, tmp_path):  # noqa: F811
    runtime, processor, _ = loaded
    path = clips.write_damaged(tmp_path / "a.mp4", 1, 2)
    content = [{"type": "video", "video": str(path)}, {"type": "text", "text": "What?"}]
    plan = processor.plan([{"role": "user", "content": content}])
    inputs = processor.process(plan)
    # The second time embeddings are kept, and the third time the prompt too.
    results = [engine.submit(ask(content, top_logprobs=0)).result(120) for _ in range(3)]
    for result in results:
        assert result.frame_times == (tuple(inputs.frame_times[0].tolist()),) != (tuple(plan.videos[0].times.tolist()),)
        assert result.undecodable_times == (tuple(inputs.undecodable_times[0].tolist()),)
        assert result.warnings == inputs.warnings
        assert result.usage.prompt == len(inputs.input_ids)
        assert result.choices[0].token_ids == results[0].choices[0].token_ids
    (choice,) = results[0].choices
    found = [each.logprob for each in choice.logprobs]
    np.testing.assert_allclose(found, logprobs(runtime, processor, inputs, inputs, choice.token_ids), atol=1e-3)
    planned = logprobs(runtime, processor, inputs, processor.expand(plan), choice.token_ids)
    assert np.abs(found - planned).max() > 1e-2, "the times make a difference"


def test_pieces_are_the_answer(engine):
    handle = engine.submit(ask(words(5), tokens=40, sampling=sampled(1), n=3))
    pieces = list(handle)
    result = handle.result()
    for number, choice in enumerate(result.choices):
        for reasoning, whole in ((False, choice.text), (True, choice.reasoning)):
            mine = [each.text for each in pieces if (each.choice, each.reasoning) == (number, reasoning)]
            assert "".join(mine) == whole
        assert all(isinstance(piece, Piece) for piece in pieces)
    assert len({choice.token_ids for choice in result.choices}) == 3
    assert result.usage.completion == sum(len(choice.token_ids) for choice in result.choices)
    single = engine.submit(ask(words(5), tokens=40, sampling=sampled(2)))
    assert single.result(120).choices[0].token_ids == result.choices[1].token_ids


def test_scores_of_tokens(engine):
    result = engine.submit(ask(words(7), tokens=6, top_logprobs=3)).result(120)
    (choice,) = result.choices
    assert choice.logprobs is not None and len(choice.logprobs) == 6
    for token, scores in zip(choice.token_ids, choice.logprobs, strict=True):
        assert scores.token == token
        assert scores.top[0] == (token, pytest.approx(scores.logprob, abs=1e-5))
        values = [value for _, value in scores.top]
        assert values == sorted(values, reverse=True) and len(values) == 3
    biased = engine.submit(ask(words(7), tokens=3, logit_bias={11: 1000.0}, top_logprobs=0)).result(120)
    assert biased.choices[0].token_ids == (11, 11, 11)
    assert biased.choices[0].logprobs[0].logprob < -1  # before the bias
    assert biased.choices[0].logprobs[0].top == ()


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (
            ask(words(1), tokens=5000),
            "too_large",
            "max_tokens is 5000; a prompt and its answer together must be",
        ),
        (ask(words(1, 900), tokens=900), "too_large", "max_tokens is 900 and the prompt has"),
        (ask([{"type": "image", "image": "/nowhere.png"}]), "media", "there is no such file"),
        (ask([{"type": "video", "video": "data:video/mp4;base64,AAAA"}]), "media", "not a video"),
        (ask("hello", logit_bias={10**7: 1.0}), "invalid", "logit_bias has token 10000000"),
        (ask("hello", tokens=1), None, None),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_else(engine, request_, kind, message):
    neighbour = engine.submit(ask(words(3), tokens=10))
    handle = engine.submit(request_)
    if kind is None:
        assert len(handle.result(120).choices[0].token_ids) == 1
    else:
        with pytest.raises(RequestError, match=message) as error:
            handle.result(120)
        assert error.value.kind == kind
    assert len(neighbour.result(120).choices[0].token_ids) == 10


def test_what_can_never_run_takes_no_memory(engine, files, monkeypatch):
    zeros = np.zeros

    def limited(shape, *arguments, **others):
        if np.prod(shape) > engine.scheduler_config.most_tokens * engine.runtime.config.hidden_size:
            raise MemoryError
        return zeros(shape, *arguments, **others)

    monkeypatch.setattr(np, "zeros", limited)
    picture = {"type": "image", "image": str(files / "picture.png"), "min_pixels": 150528}
    with pytest.raises(RequestError, match="together they must be at most") as error:
        engine.submit(ask([picture] * 20)).result(120)
    assert error.value.kind == "too_large"
    assert len(engine.submit(ask("hello", tokens=1)).result(120).choices[0].token_ids) == 1


def test_cancelling_leaves_what_was_written(engine):
    handle = engine.submit(ask(words(9), tokens=1500, sampling=sampled(4)))
    next(iter(handle))
    handle.cancel()
    (choice,) = handle.result(120).choices
    assert choice.finish_reason == "cancelled" and 0 < len(choice.token_ids) < 1500
    waiting = engine.submit(ask(words(9)))
    waiting.cancel()
    waiting.cancel()
    with contextlib.suppress(RequestError):  # it may have been planned already
        assert waiting.result(120).choices[0].finish_reason == "cancelled"
    engine.submit(ask("hello")).result(120)
    stats = engine.stats().scheduler
    assert stats.running + stats.reading + stats.waiting <= 1  # the last step of the last request may be under way


def test_progress_is_told(make, files):
    content = [{"type": "video", "video": str(files / "clip.mp4")}, {"type": "text", "text": "What?"}]
    with make(media_workers=0) as engine:
        told = []
        result = engine.submit(ask(content), lambda *step: told.append(step)).result(120)
    steps = {name: [(done, total) for step, done, total in told if step == name] for name, _, _ in told}
    assert steps.keys() == {"decoding frames", "encoding frames", "reading the prompt"}
    for name, rows in steps.items():
        total = result.usage.prompt if name == "reading the prompt" else len(result.frame_times[0])
        assert rows == sorted(rows) and rows[-1] == (total, total)
    timings = result.timings
    # That all is decoded may be told before the last frames are encoded, or after it.
    assert timings.planned < min(timings.media, timings.encoded)
    assert max(timings.media, timings.encoded) < timings.first_token


def test_awaiting(engine):
    async def main():
        one, two = engine.submit(ask(words(11))), engine.submit(ask(words(12)))
        pieces = [piece.text async for piece in one]
        return pieces, await one, await two

    pieces, one, two = asyncio.run(main())
    assert "".join(pieces) == one.choices[0].reasoning + one.choices[0].text
    assert len(two.choices[0].token_ids) == 8


def test_closing_ends_requests_and_frees_the_devices(make):
    before = sum(array.nbytes for array in jax.live_arrays())
    engine = make()
    pool = sum(array.nbytes for array in jax.live_arrays()) - before
    handle = engine.submit(ask(words(1), tokens=1500))
    engine.close()
    engine.close()  # does nothing
    with pytest.raises(RequestError, match="closed"):
        handle.result(120)
    with pytest.raises(RequestError, match="takes no more requests"):
        engine.submit(ask("hello"))
    assert sum(array.nbytes for array in jax.live_arrays()) - before < pool / 100


def test_draining_answers_what_there_is(make):
    with make() as engine:
        handles = [engine.submit(ask(words(seed))) for seed in range(6)]
        assert engine.drain()
        assert all(handle.done for handle in handles)


def test_draining_for_a_time(make):
    with make() as engine:
        assert not engine.progress.busy
        handle = engine.submit(ask(words(1), tokens=1500))
        for _, _ in zip(range(3), handle, strict=False):
            pass
        before, counts = engine.progress, engine.stats()
        assert before.busy and before.steps > 0
        assert (counts.requests, counts.waiting, counts.scheduler.running) == (1, 0, 1)
        assert counts.generated_tokens >= 3 and counts.scheduler.free_pages < counts.scheduler.pages
        assert not engine.drain(timeout=0.01)
        engine.cancel_all()
        assert engine.drain()
        assert handle.result(0).choices[0].finish_reason == "cancelled"
        after = engine.progress
        assert after.steps >= before.steps and after.at >= before.at and engine.stats().requests == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"media_workers": -1}, "media_workers is -1; it must be at least 0"),
        ({"media_bytes": 0}, "media_bytes is 0; it must be at least 1"),
        ({"media_timeout": float("nan")}, "media_timeout is nan; it must be above 0"),
    ],
)
def test_wrong_options_are_named(option, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        EngineOptions(**option)
