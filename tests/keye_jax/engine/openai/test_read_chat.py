import math

import pytest

from keye_jax.engine.openai import read_chat
from keye_jax.engine.request import Request
from keye_jax.errors import UserError
from keye_jax.runtime.sampling import SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def ask(batch=False, **fields):
    body = {"messages": MESSAGES, **fields}
    return read_chat(body, sampling=SamplingParams(temperature=0.7, seed=3), max_tokens=9, batch=batch)


def read(**fields) -> Request:
    return ask(**fields).request


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
            **{"mm_processor_kwargs": {"max_pixels": 999}, "tools": [TOOL], "thinking_budget": 50},
            **{"selection_heat": True, "response_format": {"type": "text"}},
        )
        assert got.sampling == SamplingParams(0.0, 0.5, 7, 0.1, 1.1, -1.0, 2.0, 5)
        assert (got.stop, got.logit_bias, got.top_logprobs) == (("a", "b"), {12: -100.0}, 20)
        assert (got.max_tokens, got.n, got.thinking_budget, got.selection_heat) == (7, 3, 50, True)
        assert (got.tool_names, got.max_tool_calls, got.grammar) == (("f",), None, None)
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
        assert read(tool_choice="auto", tools=[]).options == read(tool_choice="none", tools=[TOOL]).options == {}
        assert read(tools=[TOOL], parallel_tool_calls=False).max_tool_calls == 1
        assert read(tools=[{"type": "function", **TOOL["function"]}]) == read(tools=[TOOL])
        off = {"enable_thinking": False}
        assert read(reasoning_effort="none") == read(chat_template_kwargs=off)
        on = {"enable_thinking": True}
        assert read(reasoning_effort="none", chat_template_kwargs=on) == read(chat_template_kwargs=on)

    def test_a_stream_and_its_options(self):
        assert not ask().stream and not ask().include_usage
        got = ask(stream=True, stream_options={"include_usage": True}, model="m")
        assert (got.stream, got.include_usage, got.model) == (True, True, "m")

    def test_fields_that_are_not_known_are_named_and_in_a_batch_refused(self):
        assert ask(zebra=1, best_of=2, extra_body={"apple": 3}).ignored == ("apple", "best_of", "zebra")
        assert ask(user="x", reasoning_effort="low").ignored == ("reasoning_effort",)
        with pytest.raises(UserError, match="apple is not known; a field must be one of chat_template_kwargs, "):
            ask(batch=True, zebra=1, extra_body={"apple": 3})
        with pytest.raises(UserError, match="stream is True; it must be false here"):
            ask(batch=True, stream=True)

    def test_each_request_has_an_id_of_its_own(self):
        assert read().id != read().id

    def test_fields_that_change_nothing(self):
        fields = ("user", "metadata", "store", "service_tier", "prediction", "prompt_cache_key")
        same = {"model": "any", "stream": False, "response_format": {"type": "text"}, "modalities": ["text"]}
        assert read(**dict.fromkeys(fields, "x"), **same) == read()

    @pytest.mark.parametrize("body", [None, [], "text", 7, b"bytes"])
    def test_a_body_is_an_object(self, body):
        with pytest.raises(UserError, match=r"body is .*; it must be an object"):
            read_chat(body, sampling=SamplingParams())

    @pytest.mark.parametrize("messages", [None, [], {}, "hi", 7])
    def test_messages_are_needed(self, messages):
        with pytest.raises(UserError, match=r"messages is .*; it must be a list of at least one message"):
            read_chat({"messages": messages}, sampling=SamplingParams())

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
            ("stream", 0, "stream is 0; it must be true or false"),
            ("stream_options", 1, "stream_options is 1; it must be an object"),
            ("stream_options", {"include_usage": 1}, "stream_options.include_usage is 1; it must be true or false"),
            ("tool_choice", "required", "tool_choice is 'required'; tools must hold a function beside it"),
            ("tool_choice", "some", "tool_choice is 'some'; it must be 'auto', 'none', 'required' or an object"),
            ("tool_choice", {"type": "x", "name": "f"}, "tool_choice is {'type': 'x', 'name': 'f'}; it must be"),
            ("parallel_tool_calls", 1, "parallel_tool_calls is 1; it must be true or false"),
            ("tools", {}, "tools is {}; it must be a list of functions"),
            ("tools", [7], "tools[0] is 7; it must be an object with function.name"),
            ("tools", [{"type": "web_search"}], "tools[0].type is 'web_search'; it must be 'function'"),
            ("tools", [{"function": {"name": ""}}], "tools[0] is {'function': {'name': ''}}; it must be an object"),
            ("tools", [{"function": {"name": "f", "parameters": 1}}], "tools[0].function.parameters is 1; it must be"),
            ("tools", [TOOL, TOOL], "tools[1].function.name is 'f'; it must be unlike that of every other"),
            ("thinking_budget", -1, "thinking_budget is -1; it must be an integer from 0"),
            ("selection_heat", "yes", "selection_heat is 'yes'; it must be true or false"),
            ("reasoning_effort", 1, "reasoning_effort is 1; it must be a string"),
            ("chat_template_kwargs", [], "chat_template_kwargs is []; it must be an object"),
            ("response_format", "json", "response_format is 'json'; it must be an object"),
            ("response_format", {"type": "xml"}, "response_format.type is 'xml'; it must be one of text, json_object"),
            ("modalities", ["audio"], "modalities is ['audio']; it must be ['text']"),
            ("extra_body", [], "extra_body is []; it must be an object"),
        ],
    )
    def test_a_wrong_value_is_named(self, field, value, message):
        with pytest.raises(UserError) as error:
            read(**{field: value})
        assert message in str(error.value)
        path = error.value.field or ""
        assert path.startswith(field) and str(error.value).startswith(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600

    def test_two_limits_that_differ(self):
        with pytest.raises(UserError, match="max_completion_tokens is 5; it must be max_tokens, 4, if both are given"):
            read(max_tokens=4, max_completion_tokens=5)

    def test_a_function_that_is_not_there(self):
        choice = {"type": "function", "function": {"name": "g"}}
        with pytest.raises(UserError, match=r"tool_choice.function.name is 'g'; it must be the name of a function in"):
            read(tools=[TOOL], tool_choice=choice)
