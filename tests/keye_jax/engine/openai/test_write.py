"""Whole bodies, field by field."""

import json

import pytest

from keye_jax.engine.openai import completion_body, error_body, read_responses, response_body, text_completion_body
from keye_jax.engine.request import Choice, RequestError, Result, Timings, TokenLogprob, ToolCall, Usage
from keye_jax.errors import MediaError, UnreachableError, UserError
from keye_jax.runtime.sampling import SamplingParams

TEXTS = {1: "a", 2: "\ufffd", 3: "é"}
CHOICE = Choice("an answer", "thoughts", "length", (5, 6), 1)
CALLING = Choice("", "", "tool_calls", (5, 6), 0, tool_calls=(ToolCall("call_1", "f", '{"x": 1}'),))
HEAD = {"created": 17, "model": "keye", "token_text": lambda token: TEXTS[token]}


def result(*choices, **changes):
    values = {"usage": Usage(100, 20, 30, 64, 7, 2), "timings": Timings(0, 0, 0, 0, 0)}
    return Result(choices=choices, **values | changes)


class TestChat:
    def body(self, *, choices=(CHOICE, CHOICE), **changes):
        return completion_body(result(*choices, **changes), completion_id="chatcmpl-1", **HEAD)

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

    def test_tool_calls(self):
        [choice] = self.body(choices=(CALLING,))["choices"]
        assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert call == {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_a_text_completion_of_two_prompts():
    scores = (TokenLogprob(1, -0.5, ((1, -0.5), (3, -1.0))), TokenLogprob(3, float("-inf")))
    one, two = result(CHOICE, CHOICE), result(Choice("aé", "", "stop", (1, 3), 0, scores), CHOICE)
    got = text_completion_body([one, two], completion_id="cmpl-1", **HEAD)
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2, 3] and got["object"] == "text_completion"
    assert got["choices"][2] == {
        "index": 2,
        "text": "aé",
        "finish_reason": "stop",
        "logprobs": {
            "tokens": ["a", "é"],
            "token_logprobs": [-0.5, -9999.0],
            "top_logprobs": [{"a": -0.5, "é": -1.0}, {}],
            "text_offset": [0, 1],
        },
    }
    assert (got["usage"]["prompt_tokens"], got["usage"]["completion_tokens"]) == (200, 14)


def test_a_response():
    body = {"input": "hi", "instructions": "be short", "temperature": 0, "metadata": {"a": "b"}, "max_output_tokens": 9}
    asked = read_responses(body, sampling=SamplingParams())
    got = response_body(result(CHOICE, warnings=("one",)), asked, created=17, model="keye", token_text=str)
    assert (got["id"], got["status"], got["created_at"]) == (f"resp_{asked.request.id}", "incomplete", 17)
    assert got["incomplete_details"] == {"reason": "max_output_tokens"} and got["warnings"] == ["one"]
    assert got["usage"] == {
        "input_tokens": 100,
        "input_tokens_details": {
            **{"cached_tokens": 64, "cache_write_tokens": 0, "image_tokens": 20, "video_tokens": 30},
            **{"text_tokens": 50},
        },
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 107,
    }
    expected = {"instructions": "be short", "temperature": 0.0, "metadata": {"a": "b"}, "max_output_tokens": 9}
    assert expected.items() <= got.items() and got["store"] is False
    reasoning, message = got["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "thoughts"}] and reasoning["type"] == "reasoning"
    assert message["content"][0]["text"] == "an answer" and message["status"] == "incomplete"
    [call] = response_body(result(CALLING), asked, created=17, model="keye", token_text=str)["output"]
    assert call | {"id": None} == {
        **{"id": None, "type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"x": 1}'},
        "status": "completed",
    }


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (UserError("stop is 7; it must be a string", field="stop"), 400, "stop", "invalid_value"),
        (UserError("body is 7; it must be an object"), 400, None, "invalid_value"),
        (MediaError("messages[0].content[1].video_url.url is 'x'; it must be"), 400, True, "invalid_media"),
        (UnreachableError("it cannot be fetched"), 400, None, "unreachable_media"),
        (RequestError("invalid", "messages[2].role is 'x'; it must be"), 400, "messages[2].role", "invalid_value"),
        (RequestError("invalid", "messages is []; it must be"), 400, "messages", "invalid_value"),
        (RequestError("media", "messages[0].content[0].url: it is broken"), 400, True, "invalid_media"),
        (RequestError("unreachable", "x"), 400, None, "unreachable_media"),
        (RequestError("too_large", "the context does not fit"), 400, None, "context_length_exceeded"),
        (RequestError("timeout", "x"), 504, None, "timeout"),
        (RequestError("cancelled", "x"), 503, None, "cancelled"),
        (RequestError("closed", "x"), 503, None, "unavailable"),
        (RequestError("internal", "x"), 500, None, "internal_error"),
        (ZeroDivisionError("a secret"), 500, None, "internal_error"),
    ],
)
def test_failures(error, status, param, code):
    found, body = error_body(error)
    assert found == status and body["error"]["code"] == code
    if param is True:
        assert str(error).startswith(body["error"]["param"]) and body["error"]["param"].endswith("url")
    else:
        assert body["error"]["param"] == param
    assert body["error"]["type"] == ("invalid_request_error" if status == 400 else "server_error")
    assert "secret" not in body["error"]["message"]
