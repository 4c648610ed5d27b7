"""The official client asks, whole and streamed."""

import base64
import concurrent.futures
import json

import httpx
import openai
import pytest

MESSAGES = [{"role": "user", "content": "What is a ball?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}
NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}


def whole_and_streamed(client, **fields):
    """The message, finish reason and usage of an answer, asked for in both ways."""
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 5, **fields}
    whole = client.chat.completions.create(**fields)
    text = {"content": "", "reasoning": ""}
    calls, finish, usage = {}, None, None
    for chunk in client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            for name in text:
                text[name] += getattr(choice.delta, name, None) or ""
            for call in choice.delta.tool_calls or ():
                known = calls.setdefault(call.index, {"name": "", "arguments": ""})
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""
    message = whole.choices[0].message
    whole_calls = [
        {"name": each.function.name, "arguments": each.function.arguments} for each in message.tool_calls or ()
    ]
    assert text == {"content": message.content or "", "reasoning": message.reasoning or ""}
    assert list(calls.values()) == whole_calls
    assert finish == whole.choices[0].finish_reason
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    return whole


class TestChat:
    def test_streamed_is_whole(self, client):
        whole = whole_and_streamed(client, temperature=0.8)
        assert whole.model == "tiny" and whole.usage.completion_tokens > 0

    def test_media_in_every_form(self, client, files):
        picture = base64.b64encode((files / "picture.png").read_bytes()).decode()
        clip = base64.b64encode((files / "clip.mp4").read_bytes()).decode()
        uploaded = client.files.create(file=files / "clip.mp4", purpose="vision")
        asked = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}", "detail": "auto"}},
            {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}},
            {"type": "video_url", "video_url": {"url": f"file-id:{uploaded.id}"}},
            {"type": "file", "file": {"file_id": uploaded.id}},
        ]
        details = []
        for part in asked:
            content = [part, {"type": "text", "text": "What is it?"}]
            answer = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=4
            )
            details.append(answer.usage.prompt_tokens_details)
        assert details[0].image_tokens > 0
        assert details[1].video_tokens == details[2].video_tokens == details[3].video_tokens > 0
        assert details[3].cached_tokens > 0  # the same video, by its content

    def test_a_tool_that_must_be_called(self, client):
        named = {"type": "function", "function": {"name": "weather"}}
        whole = whole_and_streamed(
            client, tools=[TOOL], tool_choice=named, max_tokens=200, extra_body={**NO_THOUGHTS, "thinking_budget": 0}
        )
        assert whole.choices[0].finish_reason == "tool_calls"
        (call,) = whole.choices[0].message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")

    def test_json_by_a_schema(self, client):
        form = {"type": "json_schema", "json_schema": {"name": "count", "schema": SCHEMA, "strict": True}}
        whole = whole_and_streamed(
            client, response_format=form, max_tokens=200, extra_body={**NO_THOUGHTS, "thinking_budget": 0}
        )
        assert 0 <= json.loads(whole.choices[0].message.content)["count"] <= 99

    def test_several_at_once(self, client):
        def ask(seed):
            return whole_and_streamed(client, seed=seed, temperature=1.0).choices[0].message.content

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, range(8)))
        assert together == [ask(seed) for seed in range(8)]

    def test_logprobs_and_choices(self, client):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=3, n=2, logprobs=True, top_logprobs=2
        )
        assert [len(choice.logprobs.content[0].top_logprobs) for choice in answer.choices] == [2, 2]

    def test_ignored_fields_are_named(self, client):
        raw = client.chat.completions.with_raw_response.create(
            model="tiny", messages=MESSAGES, max_tokens=1, extra_body={"frobnicate": 1, "zap\n": 2}
        )
        assert raw.headers["x-keye-jax-ignored-fields"] == "frobnicate, zap%5Cn"
        assert raw.headers["x-request-id"].startswith("req_")

    def test_text_never_becomes_a_control_token(self, server, client):
        text = "<|im_end|><|image_pad|><think>"
        asked = {"messages": [{"role": "user", "content": text}], "return_token_strs": True}
        found = httpx.post(f"{server.url}/tokenize", json=asked).json()
        assert found["token_strs"].count("<|im_end|>") == 1  # that of the template
        assert "<|image_pad|>" not in found["token_strs"]
        media = [
            {"type": "image", "image": "data:image/png;base64,AAAA", "text": "x"},
            {"text": "a part without a type"},
        ]
        for part, status in zip(media, (400, 200), strict=True):
            asked = {"messages": [{"role": "user", "content": [part]}]}
            assert httpx.post(f"{server.url}/tokenize", json=asked).status_code == status
        raw = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()
        assert httpx.post(f"{server.url}/detokenize", json={"tokens": raw["tokens"]}).json() == {"prompt": text}
        assert raw["count"] == len(raw["tokens"]) > 10


class TestOtherInterfaces:
    def test_completions(self, client):
        fields = {"model": "tiny", "prompt": ["The ball", "The square"], "max_tokens": 8, "seed": 3}
        whole = client.completions.create(**fields)
        streamed = ["", ""]
        for chunk in client.completions.create(**fields, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
        assert streamed == [choice.text for choice in whole.choices]

    def test_log_probabilities_of_responses(self, client):
        form = {"type": "json_schema", "name": "n", "schema": {"enum": ["a ball"]}}
        fields = {"model": "x", "input": "hello", "max_output_tokens": 99, "text": {"format": form}, "top_logprobs": 2}
        fields |= {"include": ["message.output_text.logprobs"], "extra_body": {"thinking_budget": 0}}
        whole = client.responses.create(**fields)
        *_, last = client.responses.create(**fields, stream=True)
        [shown], [streamed] = whole.output[-1].content, last.response.output[-1].content
        assert shown.text == streamed.text == '"a ball"' and whole.top_logprobs == 2
        for part in (shown, streamed):
            assert "".join(each.token for each in part.logprobs) == shown.text
            assert all(len(each.top_logprobs) == 2 for each in part.logprobs)

    def test_errors_of_responses_have_their_names(self, client):
        part = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
        text = {"type": "input_text", "text": "What?"}
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="x", input=[{"role": "user", "content": [text, part]}], instructions="Look.")
        assert (caught.value.param or "").startswith("input[0].content[1]") and "messages" not in str(caught.value)

    def test_responses(self, client):
        fields = {"model": "tiny", "input": "What is a ball?", "max_output_tokens": 16}
        whole = client.responses.create(**fields)
        events = list(client.responses.create(**fields, stream=True))
        assert events[0].type == "response.created"
        assert events[-1].response.output_text == whole.output_text
        assert events[-1].response.usage.output_tokens == whole.usage.output_tokens

    def test_embeddings_are_refused(self, client):
        with pytest.raises(openai.BadRequestError, match="no embeddings"):
            client.embeddings.create(model="tiny", input="hello")

    def test_models(self, client):
        assert [each.id for each in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "keye-jax"
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
            client.models.retrieve("other")


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"temperature": "hot"}, "temperature"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"max_tokens": 10**6}, None),  # it can never run here
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "/etc/passwd"}]}]}, None),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,xx"}]}]}, None),
            ({"messages": [{"role": "user", "content": [{"type": "video", "video": "file-id:file-0"}]}]}, None),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_wrong_value_is_400_with_its_field(self, client, fields, param, stream):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                **{"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **fields}, stream=stream
            )
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.type == "invalid_request_error"
        assert param is None or caught.value.param == param

    def test_what_is_not_there(self, server):
        assert httpx.get(f"{server.url}/v2/nothing").json()["error"]["type"] == "not_found_error"
        assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
        for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"messages": ' + b"1" * 10_000 + b"}"):
            answer = httpx.post(f"{server.url}/v1/chat/completions", content=content)
            assert answer.status_code == 400, content[:20]
            assert answer.json()["error"]["message"].count("\n") == 0
