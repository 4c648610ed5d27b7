import json
import math

import pytest

from keye_jax.engine.openai import completion_body, read_body
from keye_jax.engine.request import Choice, Request, Result, Timings, TokenLogprob, Usage
from keye_jax.errors import UserError
from keye_jax.runtime.sampling import SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


def read(**fields) -> Request:
    return read_body({"messages": MESSAGES, **fields}, sampling=SamplingParams(temperature=0.7, seed=3), max_tokens=9)


class TestReading:
    def test_what_is_not_said_is_the_default(self):
        sampling = SamplingParams(temperature=0.7, seed=3)
        assert read() == Request(messages=MESSAGES, sampling=sampling, max_tokens=9)
        nulls = dict.fromkeys(("temperature", "stop", "logit_bias", "n", "tools", "seed", "max_tokens", "extra_body"))
        assert read(**nulls) == read()

    def test_all_of_it(self):
        got = read(
            **{"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5},
            **{"presence_penalty": -1, "frequency_penalty": 2, "stop": ["a", "b"], "logit_bias": {"12": -100}},
            **{"logprobs": True, "top_logprobs": 20, "max_completion_tokens": 7, "n": 3},
            **{"chat_template_kwargs": {"enable_thinking": False}, "media_io_kwargs": {"video": {"fps": 1}}},
            **{"mm_processor_kwargs": {"max_pixels": 999}, "tools": [{"type": "function", "function": {"name": "f"}}]},
        )
        assert got.sampling == SamplingParams(0.0, 0.5, 7, 0.1, 1.1, -1.0, 2.0, 5)
        assert (got.stop, got.logit_bias, got.top_logprobs) == (("a", "b"), {12: -100.0}, 20)
        assert (got.max_tokens, got.n) == (7, 3)
        names = {"chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "tools"}
        assert got.options.keys() == names

    def test_other_ways_to_say_it(self):
        assert read(stop="end").stop == ("end",)
        assert read(stop=[]).stop == ()
        assert read(top_k=-1).sampling == SamplingParams(temperature=0.7, top_k=0, seed=3)
        assert read(max_tokens=4).max_tokens == read(max_tokens=4, max_completion_tokens=4).max_tokens == 4
        assert read(n=2.0).n == 2
        assert read(extra_body={"top_k": 5}) == read(top_k=5)
        assert read(logprobs=True).top_logprobs == 0
        assert read(logprobs=False, top_logprobs=0).top_logprobs is None
        assert read(tool_choice="auto", tools=[]).options == {"tools": []}
        assert read(tool_choice="none", tools=[]).options == {}

    def test_fields_that_change_nothing(self):
        fields = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction", "prompt_cache_key")
        same = {"model": "any", "stream": False, "response_format": {"type": "text"}, "modalities": ["text"]}
        assert read(**dict.fromkeys(fields, "x"), **same) == read()

    @pytest.mark.parametrize("body", [None, [], "text", 7, b"bytes"])
    def test_a_body_is_an_object(self, body):
        with pytest.raises(UserError, match=r"body is .*; it must be an object"):
            read_body(body, sampling=SamplingParams())

    @pytest.mark.parametrize("messages", [None, [], {}, "hi", 7])
    def test_messages_are_needed(self, messages):
        with pytest.raises(UserError, match=r"messages is .*; it must be a list of at least one message"):
            read_body({"messages": messages}, sampling=SamplingParams())

    @pytest.mark.parametrize(
        "field, value, message",
        [
            ("temperature", "hot", "temperature is 'hot'; it must be a number"),
            ("temperature", True, "temperature is True; it must be a number"),
            ("temperature", -1, "temperature is -1.0; it must be 0 (greedy) or more"),
            ("temperature", math.nan, "temperature is nan; it must be a number"),
            ("temperature", math.inf, "temperature is inf; it must be a number"),
            ("temperature", 10**4000, "it must be a number"),
            ("top_p", 0, "top_p is 0.0; it must be above 0 and at most 1"),
            ("top_p", [], "top_p is []; it must be a number"),
            ("top_k", 1.5, "top_k is 1.5; it must be an integer"),
            ("top_k", -2, "top_k is -2; it must be an integer from -1"),
            ("top_k", 10**6, "top_k is 1000000; it must be from 0 (all tokens) to 2048"),
            ("min_p", 2, "min_p is 2.0; it must be from 0 to 1"),
            ("repetition_penalty", 0, "repetition_penalty is 0.0; it must be above 0"),
            ("presence_penalty", 3, "presence_penalty is 3.0; it must be from -2 to 2"),
            ("frequency_penalty", {}, "frequency_penalty is {}; it must be a number"),
            ("seed", "1", "seed is '1'; it must be an integer"),
            ("seed", 10**400, "it must be an integer"),
            ("seed", math.nan, "seed is nan; it must be an integer"),
            ("n", 0, "n is 0; it must be an integer from 1 to 128"),
            ("n", 129, "n is 129; it must be an integer from 1 to 128"),
            ("max_tokens", 0, "max_tokens is 0; it must be an integer from 1"),
            ("max_completion_tokens", "x", "max_completion_tokens is 'x'"),
            ("stop", 7, "stop is 7; it must be a string, or at most 16"),
            ("stop", "", "stop is ''"),
            ("stop", ["a", 1], "stop is ['a', 1]"),
            ("stop", ["a"] * 17, "at most 16"),
            ("logit_bias", [], "logit_bias is []; it must be an object with token ids as keys"),
            ("logit_bias", {"a": 1}, "logit_bias has the key 'a'; a key must be a token id"),
            ("logit_bias", {"-1": 1}, "logit_bias has the key '-1'"),
            ("logit_bias", {"٣": 1}, "a key must be a token id"),
            ("logit_bias", {"9" * 500: 1}, "a key must be a token id"),
            ("logit_bias", {"3": "x"}, "logit_bias.3 is 'x'; it must be a number"),
            ("logit_bias", {"3": 101}, "logit_bias.3 is 101; it must be from -100 to 100"),
            ("logprobs", 5, "logprobs is 5; it must be true or false"),
            ("top_logprobs", 5, "top_logprobs is 5; logprobs must be true beside it"),
            ("top_logprobs", 21, "top_logprobs is 21; it must be an integer from 0 to 20"),
            ("model", 7, "model is 7; it must be a string"),
            ("stream", True, "stream is True; it must be false here"),
            ("stream", 0, "stream is 0; it must be false here"),
            ("tool_choice", "required", "tool_choice is 'required'; it must be 'auto' or 'none'"),
            ("response_format", {"type": "json_object"}, "response_format is {'type': 'json_object'}; it must be"),
            ("modalities", ["audio"], "modalities is ['audio']; it must be ['text']"),
            ("extra_body", [], "extra_body is []; it must be an object"),
            ("extra_body", {"best_of": 2}, "best_of is not known; a field must be one of messages, model"),
            ("best_of", 2, "best_of is not known; a field must be one of messages, model, tools"),
            ("a\nb", 2, "a\\nb is not known"),
        ],
    )
    def test_a_wrong_value_is_named(self, field, value, message):
        with pytest.raises(UserError) as error:
            read(**{field: value})
        assert message in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600

    def test_two_limits_that_differ(self):
        with pytest.raises(UserError, match="max_completion_tokens is 5; it must be max_tokens, 4, if both are given"):
            read(max_tokens=4, max_completion_tokens=5)


class TestWriting:
    def body(self, **changes):
        choice = Choice("an answer", "thoughts", "length", (5, 6), 1)
        values = {"choices": (choice, choice), "usage": Usage(100, 20, 30, 64, 7, 2), "timings": Timings(0, 0, 0, 0, 0)}
        return completion_body(
            Result(**values | changes),
            completion_id="chatcmpl-1",
            created=17,
            model="keye",
            token_text=lambda token: {1: "a", 2: "\ufffd", 3: "é"}[token],
        )

    def test_all_of_it(self):
        got = self.body(warnings=("one",))
        assert (got["id"], got["object"], got["created"], got["model"]) == ("chatcmpl-1", "chat.completion", 17, "keye")
        assert [choice["index"] for choice in got["choices"]] == [0, 1]
        assert got["choices"][0] | {"index": 1} == got["choices"][1]
        assert got["choices"][0] == {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "an answer",
                "reasoning_content": "thoughts",
                "reasoning": "thoughts",
            },
            "logprobs": None,
            "finish_reason": "length",
        }
        assert got["usage"] == {
            "prompt_tokens": 100,
            "completion_tokens": 7,
            "total_tokens": 107,
            "prompt_tokens_details": {"cached_tokens": 64, "image_tokens": 20, "video_tokens": 30, "text_tokens": 50},
            "completion_tokens_details": {"reasoning_tokens": 2},
        }
        assert got["warnings"] == ["one"]
        assert "warnings" not in self.body()

    def test_log_probabilities(self):
        logprobs = (TokenLogprob(1, -0.5, ((1, -0.5), (3, -1.0))), TokenLogprob(2, float("-inf")))
        [choice] = self.body(choices=(Choice("aé", "", "stop", (1, 2), 0, logprobs),))["choices"]
        first, second = choice["logprobs"]["content"]
        assert first["token"] == "a" and first["bytes"] == [97] and first["logprob"] == -0.5
        assert first["top_logprobs"][1] == {"token": "é", "logprob": -1.0, "bytes": [195, 169]}
        assert second == {"token": "\ufffd", "logprob": -9999.0, "bytes": None, "top_logprobs": []}
        assert choice["message"]["reasoning"] is None
        json.dumps(choice, allow_nan=False)
