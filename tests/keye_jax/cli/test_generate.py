import dataclasses
import json
from typing import Any, cast

import numpy as np
import pytest

from keye_jax.config import KeyeConfig
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


@pytest.mark.parametrize("chunk", [50, 16])
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
        *("generate", "--checkpoint", copy_of, "--prompt", "What?", "--greedy", "--json", "--max-new-tokens", 8)
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
        from convert import load_params
        from keye_jax.engine.generate import Generator
        from keye_jax.model.keye import Keye
        from keye_jax.processor import Processor
        from keye_jax.runtime.runtime import Runtime
        from keye_jax.runtime.sampling import SamplingParams

        config = KeyeConfig.from_file(checkpoint)
        processor = Processor.from_checkpoint(checkpoint, config)
        params = load_params(checkpoint, config, dtype="float32")
        self.runtime = Runtime(Keye.from_params(config, params), config, prefill_chunk=prefill_chunk)
        messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        self.inputs = processor.process(processor.plan(messages))
        generator = Generator(self.runtime, processor, frozenset())
        answer = generator.generate(self.inputs, sampling=SamplingParams(temperature=0.0), max_new_tokens=8)
        self.ids = list(answer.token_ids)

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
    from keye_jax.engine.generate import new_token_limit
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


class TestThinking:
    """Reasoning is told from the answer by the think marks, which are tokens, not text."""

    @dataclasses.dataclass
    class Tokens:
        """A processor whose tokens are words."""

        words: tuple = ("<think>", "</think>", "a", "b", "c")

        def token_id(self, text):
            return self.words.index(text)

        def stream(self):
            return self

        def step(self, token):
            return self.words[token]

        def flush(self):
            return ""

    @pytest.mark.parametrize(
        ("opened", "words", "reasoning", "text", "count"),
        [
            (True, "a b </think> c", "ab", "c", 3),
            (False, "<think> a </think> b c", "a", "bc", 2),
            (False, "a b", "", "ab", 0),
            (False, "a </think> b", "a", "b", 2),
            (True, "a b", "ab", "", 2),
        ],
    )
    def test_split(self, opened, words, reasoning, text, count):
        from keye_jax.engine.text import AnswerWriter

        tokens, pieces = self.Tokens(), []
        writer = AnswerWriter(cast(Any, tokens), opened, lambda piece, thinking: pieces.append((piece, thinking)))
        for word in words.split():
            writer.write(tokens.token_id(word))
        assert writer.finish() == (text, reasoning)
        assert writer.reasoning_tokens == count
        assert "".join(piece for piece, _ in pieces) == "".join(word for word in words.split() if len(word) == 1)
