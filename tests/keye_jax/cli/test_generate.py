import dataclasses
import json

import pytest

from keye_jax.config import KeyeConfig


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
    assert got["tokens"]["image"] == 3 * 2 + 2 or got["tokens"]["image"] > 0
    assert got["reasoning"] and not got["answer"]  # the template opens a think block, which 8 random tokens do not end
    assert got["seconds"]["first_token"] > 0
    assert got["peak_memory_bytes"] > 0


def test_greedy_is_deterministic_and_the_same_from_either_kind(ask_json, inputs):
    arguments = ("--video", inputs / "clip.mp4", "--prompt", "What?", "--greedy")
    first = ask_json(*arguments)
    assert ask_json(*arguments, "--seed", 5)["reasoning"] == first["reasoning"]
    assert ask_json(*arguments, checkpoint="hf")["reasoning"] == first["reasoning"]
    assert ask_json(*arguments, "--prefill-chunk", 50)["reasoning"] == first["reasoning"]


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
    ids = _greedy_ids(keye, copy_of)
    (copy_of / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[3]]}))
    code, out, _ = keye(
        *("generate", "--checkpoint", copy_of, "--prompt", "What?", "--greedy", "--json", "--max-new-tokens", 8)
    )
    assert code == 0
    got = json.loads(out)
    assert got["finish_reason"] == "stop"
    assert got["tokens"]["completion"] == ids.index(ids[3])


def _greedy_ids(keye, checkpoint):
    """Ids of the greedy answer, through the library."""
    from convert import load_params
    from keye_jax.engine.generate import Generator
    from keye_jax.model.keye import Keye
    from keye_jax.processor import Processor
    from keye_jax.runtime.runtime import Runner
    from keye_jax.runtime.sampling import Sampling

    config = KeyeConfig.from_file(checkpoint)
    processor = Processor.from_checkpoint(checkpoint, config)
    runner = Runner(Keye.from_params(config, load_params(checkpoint, config)), config)
    inputs = processor.process(processor.plan([{"role": "user", "content": [{"type": "text", "text": "What?"}]}]))
    generator = Generator(runner, processor, frozenset())
    return list(generator.generate(inputs, sampling=Sampling(temperature=0.0), max_new_tokens=8).token_ids)


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

    config = KeyeConfig.from_file(golden.parents[1] / "configs" / "model" / "keye_vl_2_30b_a3b.json")
    with pytest.raises(ValueError, match=r"57.90 GiB of weights and 25.50 GiB of cache for 262,144 tokens; .* 80.00"):
        new_token_limit(config, 262_000, 144, dtype="bfloat16", memory_limit=80 * 2**30)
    assert new_token_limit(config, 262_000, 144, dtype="bfloat16", memory_limit=140 * 2**30) == 144
    assert new_token_limit(config, 262_000, None, dtype="bfloat16", memory_limit=140 * 2**30) == 144
    assert new_token_limit(config, 100, None, dtype="bfloat16", memory_limit=140 * 2**30) == 4096


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
        from keye_jax.engine.generate import Hooks, Timings, _Writer

        tokens = self.Tokens()
        writer = _Writer(tokens, opened, Hooks())
        for word in words.split():
            writer.write(tokens.token_id(word))
        answer = writer.answer("stop", Timings(0, 0, 0, 0, 0))
        assert (answer.reasoning, answer.text, answer.reasoning_tokens) == (reasoning, text, count)
