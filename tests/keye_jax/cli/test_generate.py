import dataclasses
import io
import json
from typing import Any, cast

import numpy as np
import pytest
import typer

from keye_jax.cli import app
from keye_jax.config import KeyeConfig
from keye_jax.processor import Processor
from tests.keye_jax.golden_models import text, traced
from tests.near_ties import assert_leads, selection_leads, token_leads


@pytest.fixture
def ask(keye, inputs):
    def call(*arguments, checkpoint="orbax", tokens=8):
        return keye("generate", "--checkpoint", inputs / checkpoint, "--max-new-tokens", tokens, *arguments)

    return call


@pytest.fixture
def ask_json(ask):
    def call(*arguments, **kwargs):
        code, out, err = ask("--json", *arguments, **kwargs)
        assert code == 0, err
        return json.loads(out)

    return call


def test_a_question_about_a_video_and_a_picture(ask_json, inputs, golden):
    got = ask_json("--video", inputs / "clip.mp4", "--image", inputs / "picture.png", "--prompt", "What?", "--greedy")
    assert got["tokens"]["prompt"] > KeyeConfig.from_file(golden / "a").sa_config.topk
    assert got["tokens"]["completion"] == 8
    assert got["finish_reason"] == "length"
    assert got["frame_times"] == [[0.0, 0.667, 1.25, 1.917]]
    assert got["tokens"]["image"] > 0
    assert got["reasoning"] and not got["answer"]  # the template opens a think block, which 8 random tokens do not end
    assert got["seconds"]["first_token"] > 0
    assert got["peak_memory_bytes"] > 0


def test_greedy_is_deterministic_and_the_same_from_either_kind(ask_json, inputs):
    arguments = ("--video", inputs / "clip.mp4", "--prompt", "What?", "--greedy")
    first = ask_json(*arguments)
    assert ask_json(*arguments, "--seed", 5)["reasoning"] == first["reasoning"]
    assert ask_json(*arguments, checkpoint="hf")["reasoning"] == first["reasoning"]


QUESTION = "What happens when the red ball rolls over the table, and how often does the blue square turn near the door?"
"""Of the tiny model, all choices on it and its answer are safe."""


@pytest.mark.parametrize("chunk", [pytest.param(50, marks=pytest.mark.slow), 16])
def test_chunks_of_the_prompt_change_neither_selections_nor_the_answer(inputs, chunk):
    """In float32, where all choices are ahead by more than the rounding."""
    whole, parts = (_Asked(inputs / "hf", QUESTION, prefill_chunk=size) for size in (None, chunk))
    trace, in_parts = whole.trace(whole.ids), parts.trace(whole.ids)
    top_k, prompt = whole.runtime.config.sa_config.topk, len(whole.inputs.input_ids)
    assert prompt > 2 * chunk or prompt > 2 * top_k
    assert_leads(selection_leads(trace.scores, top_k), 10 * ATOL)
    assert_leads(token_leads(trace.logits[prompt - 1 :]), 10 * ATOL)
    np.testing.assert_array_equal(in_parts.selected, trace.selected)
    np.testing.assert_allclose(in_parts.logits, trace.logits, atol=ATOL)
    assert parts.ids == whole.ids == trace.logits[prompt - 1 :].argmax(axis=-1).tolist()


def test_sampling_follows_the_seed(ask_json):
    arguments = ("--prompt", "What?", "--temperature", 1.5, "--top-k", 0, "--top-p", 1)
    answers = {seed: ask_json(*arguments, "--seed", seed)["reasoning"] for seed in (0, 1)}
    assert ask_json(*arguments, "--seed", 0)["reasoning"] == answers[0]
    assert answers[0] != answers[1]


def test_media_keep_their_order(ask_json, inputs):
    """The answer of a random model depends on everything, the order included."""
    video, image = ("--video", inputs / "clip.mp4"), ("--image", inputs / "picture.png")
    arguments = ("--prompt", "What?", "--greedy")
    assert ask_json(*video, *image, *arguments)["reasoning"] != ask_json(*image, *video, *arguments)["reasoning"]


def test_frame_options_reach_the_processor(ask_json, inputs):
    got = ask_json("--video", inputs / "clip.mp4", "--prompt", "What?", "--max-frames", 3, "--fps", 4)
    assert len(got["frame_times"][0]) == 3


def test_a_conversation_from_a_file(ask_json, inputs, tmp_path):
    file = tmp_path / "messages.json"
    content = [{"type": "image_url", "image_url": {"url": str(inputs / "picture.png")}}, {"type": "text", "text": "?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A triangle."},
        {"role": "user", "content": "And now?"},
    ]
    file.write_text(json.dumps({"messages": messages}))
    assert ask_json("--messages", file)["tokens"]["image"] > 0


@pytest.fixture
def give(monkeypatch):
    """Puts bytes into stdin."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input(ask, ask_json, inputs, give):
    picture, clip = (inputs / name for name in ("picture.png", "clip.mp4"))
    for option, file in (("--image", picture), ("--video", clip)):
        give(file.read_bytes())
        got = ask_json(option, "-", "--prompt", "What?", "--greedy", tokens=1)
        assert got["tokens"] == ask_json(option, file, "--prompt", "What?", "--greedy", tokens=1)["tokens"]
    give(json.dumps([{"role": "user", "content": [{"image": str(picture)}, "What?"]}]).encode("utf-16"))
    assert ask_json("--messages", "-", tokens=1)["tokens"]["image"] > 0
    give(b"")
    assert refused(ask("--image", "-", "--prompt", "What?"), "--image is '-'; standard input must not be empty")


@pytest.mark.parametrize("prompt", ["--image=foo what is this?", "--video", "-", "--image=a.png"])
def test_a_prompt_that_looks_like_an_option(ask_json, inputs, prompt):
    arguments = ("--image", inputs / "picture.png", "--prompt", prompt, "--greedy")
    assert ask_json(*arguments, tokens=1)["tokens"]["image"] > 0


def test_values_behind_an_equals_sign_keep_their_order(inputs):
    command = cast(Any, typer.main.get_command(app)).commands["generate"]
    arguments = ["--checkpoint=x", "--video=a", "--prompt=--image=b", "--image", "--video", "--video", "c"]
    context = command.make_context("generate", arguments)
    assert context.meta["media"] == ["video", "image", "video"]
    assert (context.params["image"], context.params["video"]) == (["--video"], ["a", "c"])
    assert context.params["prompt"] == "--image=b"


def test_a_request_body_from_a_file(ask_json, inputs, tmp_path):
    file = tmp_path / "body.json"
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": [{"type": "video", "path": str(inputs / "clip.mp4")}, "What?"]}],
        "media_io_kwargs": {"video": {"fps": 1}},
    }
    file.write_text(json.dumps(body))
    assert len(ask_json("--messages", file, tokens=1)["frame_times"][0]) == 2


def test_files_that_hold_no_messages(keye, inputs, tmp_path):
    file = tmp_path / "messages.json"
    for content in (b"", b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b"[" + b"1" * 5001 + b"]", b"\xff", b"{}"):
        file.write_bytes(content)
        assert refused(keye("generate", "--checkpoint", inputs / "hf", "--messages", file), "--messages is")


def test_warnings_are_told(ask, ask_json, monkeypatch):
    plan = Processor.plan
    monkeypatch.setattr(
        Processor, "plan", lambda *args, **kwargs: dataclasses.replace(plan(*args, **kwargs), warnings=("early",))
    )
    assert ask_json("--prompt", "What?", tokens=1)["warnings"] == ["early"]
    code, _, err = ask("--prompt", "What?", tokens=1)
    assert code == 0
    assert f"\n{err}".count("\nwarning: early\n") == 1


def test_text_is_streamed_and_summed_up(ask, inputs):
    code, out, err = ask("--prompt", "What?", "--greedy")
    assert code == 0
    assert out.strip() == ""
    for word in ("prompt", "first token", "tokens/s", "peak memory"):
        assert word in err
    code, out, err = ask("--prompt", "What?", "--greedy", "--no-stream")
    assert code == 0


def test_generation_stops_at_the_checkpoints_end_tokens(ask_json, copy_of, keye):
    ids = _Asked(copy_of, "What?").ids
    (copy_of / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[3]]}))
    code, out, _ = keye(
        *("generate", "--checkpoint", copy_of, "--prompt", "What?", "--greedy", "--json", "--max-new-tokens", 8),
        *("--dtype", "float32"),
    )
    assert code == 0
    got = json.loads(out)
    assert got["finish_reason"] == "stop"
    assert got["tokens"]["completion"] == ids.index(ids[3])


ATOL = 2e-4
"""Logits of the tiny model are up to 4, its scores up to some tens."""


class _Asked:
    """A greedy answer through the library.

    Attributes:
      ids: its tokens.
    """

    def __init__(self, checkpoint, question, prefill_chunk=None):
        from keye_jax.engine.checkpoint import load
        from keye_jax.engine.engine import Engine
        from keye_jax.engine.generation_config import GenerationDefaults
        from keye_jax.engine.options import options_for_one
        from keye_jax.engine.request import Request
        from keye_jax.runtime.sampling import SamplingParams

        self.runtime, processor, _ = load(checkpoint, dtype="float32", prefill_chunk=prefill_chunk)
        messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        self.inputs = processor.process(processor.plan(messages))
        greedy = GenerationDefaults(SamplingParams(temperature=0.0), frozenset())
        options = options_for_one(self.runtime.rules, len(self.inputs.input_ids) + 8)
        with Engine(self.runtime, processor, greedy, options) as engine:
            (choice,) = engine.submit(Request(messages=messages, max_tokens=8)).result(300).choices
        self.ids = list(choice.token_ids)

    def trace(self, ids):
        """What is computed of the prompt and of all tokens of an answer but the last."""
        tokens = np.concatenate([self.inputs.input_ids, np.asarray(ids[:-1], np.int32)])
        pool, tables = self.runtime.new_cache(1, len(tokens))
        return traced(self.runtime, text(tokens, tables[0]), pool)[0]


def refused(result, *words):
    """One line on stderr with these words, exit code 2, nothing on stdout."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err
    return True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["either --prompt or --messages"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature is -1.0"]),
        (["--prompt", "x", "--top-p", "2"], ["top_p is 2.0"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens is 0"]),
        (["--prompt", "x", "--prefill-chunk", "0"], ["--prefill-chunk is 0"]),
        (["--prompt", "x", "--attention", "full"], ["--attention is 'full'"]),
        (["--prompt", "x", "--implementation", "cuda"], ["--implementation is 'cuda'", "xla"]),
        (["--prompt", "x", "--dtype", "int8"], ["--dtype is 'int8'"]),
        (["--prompt", "x", "--image", "missing.png"], ["missing.png"]),
        (["--prompt", "x", "--video", "http://localhost/x.mp4"], ["--allow-remote"]),
        (["--prompt", "x", "--fps", "0"], ["fps"]),
        (["--messages", "missing.json"], ["missing.json"]),
        (["--prompt", "x", "--bogus"], ["--bogus"]),
        (["--prompt", "x", "--video", "v", "--start", "1:75"], ["start is '1:75'", "1:30"]),
        (["--prompt", "x", "--start", "0:09", "--end", "5"], ["end is 5 s", "after start 9 s"]),
        (["--prompt", "x", "--num-frames", "0"], ["num_frames is 0"]),
        (["--prompt", "x", "--num-frames", "3", "--fps", "1"], ["num_frames", "fps"]),
        (["--prompt", "x", "--max-frames", "9" * 401], ["max_frames is 999", "at most 1000000000"]),
        (["--prompt", "x", "--max-frames", "9" * 5001], ["--max-frames"]),
        (["--prompt", "x", "--fps", "1e-308"], ["fps is 1e-308", "at least 0.000001"]),
        (["--prompt", "x", "--fps", "nan"], ["fps is nan"]),
        (["--prompt", "x", "--image", "-", "--video", "-"], ["--image and --video are '-'", "only one"]),
        (["--messages", "-", "--subtitles", "-"], ["--messages and --subtitles are '-'"]),
        (["--prompt", "x", "--image", "a" * 5000], ["must be the path of a file"]),
        (["--messages", "a" * 5000], ["--messages is", "must be a file that can be read"]),
        (["--messages", "."], ["--messages is '.'", "must be a file that can be read"]),
        (["--messages", "x", "--image", "y"], ["--image and --video go with --prompt"]),
    ],
)
def test_mistakes_are_told_in_one_line(keye, inputs, arguments, words):
    assert refused(keye("generate", "--checkpoint", inputs / "hf", *arguments), *words)


def test_a_context_that_does_not_fit_is_refused_with_the_numbers(keye, inputs):
    result = keye("generate", "--checkpoint", inputs / "hf", "--prompt", "x " * 5000, "--max-new-tokens", 10)
    assert refused(result, "does not fit", "10 new ones", "at most 4,096")
    result = keye("generate", "--checkpoint", inputs / "hf", "--prompt", "x", "--max-new-tokens", 4096)
    assert refused(result, "does not fit", "4,096 new ones")


def test_a_context_larger_than_the_memory_is_refused_with_the_numbers(golden):
    from keye_jax.engine.limits import new_token_limit
    from keye_jax.sharding import MeshRules

    config = KeyeConfig.from_file(golden.parents[1] / "configs" / "model" / "keye_vl_2_30b_a3b.json")
    job: Any = {"dtype": "bfloat16", "rules": MeshRules.single_device()}
    with pytest.raises(ValueError, match=r"57.90 GiB of weights and 25.50 GiB of cache for 262,144 tokens; .* 80.00"):
        new_token_limit(config, 262_000, 144, **job, memory_limit=80 * 2**30)
    assert new_token_limit(config, 262_000, 144, **job, memory_limit=140 * 2**30) == 144
    assert new_token_limit(config, 262_000, None, **job, memory_limit=140 * 2**30) == 144
    assert new_token_limit(config, 100, None, **job, memory_limit=140 * 2**30) == 4096


def test_what_is_no_checkpoint_is_refused(keye, tmp_path):
    assert refused(keye("generate", "--checkpoint", tmp_path / "nothing", "--prompt", "x"), "nothing")
    assert refused(keye("generate", "--checkpoint", tmp_path, "--prompt", "x"), str(tmp_path))


def test_a_checkpoint_without_tokenizer_is_refused(keye, copy_of):
    (copy_of / "tokenizer.json").unlink()
    assert refused(keye("generate", "--checkpoint", copy_of, "--prompt", "x"), "tokenizer.json")
