"""A stream put together is the whole, for any tokens, and both have the types of the official client."""

import json
import random
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from keye_jax.engine.openai import (
    ChatStream,
    CompletionStream,
    ResponseStream,
    completion_body,
    read_chat,
    read_completion,
    read_responses,
    response_body,
    text_completion_body,
)
from keye_jax.engine.request import RequestError
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.engine.openai.answers import TOOLS, answer

ROUNDS = 60
MESSAGES = [{"role": "user", "content": "hi"}]
SAMPLING = SamplingParams()


@pytest.fixture
def head(processor):
    """What both a whole body and a stream are told."""

    def token_text(token):
        return processor.detokenize([token], skip_special_tokens=False)

    return {"completion_id": "id-1", "created": 17, "model": "keye", "token_text": token_text}


def sent(objects):
    """Objects as they arrive at the client."""
    return json.loads(json.dumps(objects, allow_nan=False))


def put_together(chunks):
    """The body that the chunks of a chat or text completion make up."""
    body: dict[str, Any] = {"choices": {}}
    for chunk in chunks:
        body |= {name: value for name, value in chunk.items() if name not in ("choices", "object")}
        for part in chunk["choices"]:
            delta = part.pop("delta", None)
            choice = body["choices"].setdefault(part["index"], {"finish_reason": None, "logprobs": None})
            assert choice["finish_reason"] is None, "nothing comes behind the end of a choice"
            if delta is None:
                choice["text"] = choice.get("text", "") + part.pop("text")
            else:
                assert ("role" in delta) == ("message" not in choice), "the role comes first, and once"
                add_delta(choice.setdefault("message", {"tool_calls": []}), delta)
            logprobs = part.pop("logprobs")
            if logprobs is not None:
                choice["logprobs"] = {
                    name: [*(choice["logprobs"] or {}).get(name, []), *values] for name, values in logprobs.items()
                }
            choice |= part
    return body


def add_delta(message, delta):
    for name in ("content", "reasoning", "reasoning_content"):
        if delta.get(name) is not None:
            message[name] = message.get(name, "") + delta[name]
    message["role"] = delta.get("role", message.get("role"))
    for call in delta.get("tool_calls", ()):
        if call["index"] == len(message["tool_calls"]):
            message["tool_calls"].append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
        else:
            assert call.keys() == {"index", "function"} and call["index"] == len(message["tool_calls"]) - 1
            message["tool_calls"][-1]["function"]["arguments"] += call["function"]["arguments"]


def without_empty(choice):
    """A choice in which nothing and no list of it are the same."""
    message = {name: value for name, value in choice.get("message", {}).items() if value not in (None, [])}
    logprobs = choice["logprobs"] if choice["logprobs"] and any(choice["logprobs"].values()) else None
    return {**choice, "message": message, "logprobs": logprobs}


def test_chat(processor, head):
    chosen, seen = random.Random(1), {"calls": 0, "reasoning": 0}
    for number in range(ROUNDS):
        fields = {"stop": chosen.choice([[], ["STOP"]]), "logprobs": chosen.random() < 0.5, "n": chosen.randint(1, 3)}
        tools = {"tools": TOOLS, "parallel_tool_calls": chosen.random() < 0.7} if chosen.random() < 0.7 else {}
        asked = read_chat({"messages": MESSAGES, **fields, **tools}, sampling=SAMPLING)
        events, result = answer(processor, asked.request, chosen, heat=chosen.random() < 0.5)
        usage = chosen.random() < 0.5
        stream = ChatStream(**head, include_usage=usage)
        chunks = sent([chunk for event in (*events, result) for chunk in stream.take(event)])
        whole = sent(completion_body(result, **head))
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk)
        ChatCompletion.model_validate(whole)
        if usage:
            assert chunks[-1]["choices"] == [] and all(chunk["usage"] is None for chunk in chunks[:-1])
        if number < 20:
            state = ChatCompletionStreamState()
            for chunk in chunks:
                state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
            final: Any = state.current_completion_snapshot.to_dict()
            for one, other in zip(final["choices"], whole["choices"], strict=True):
                assert one["message"].get("content") == other["message"]["content"]
                calls = [call["function"] for call in one["message"].get("tool_calls") or ()]
                for call in calls:
                    call.pop("parsed_arguments", None)
                assert calls == [call["function"] for call in other["message"].get("tool_calls", ())]
        body = put_together(chunks)
        choices = [without_empty(body["choices"][index]) for index in range(fields["n"])]
        assert choices == [without_empty(choice) for choice in whole["choices"]]
        expected = {name: value for name, value in whole.items() if name != "object"}
        assert {**expected, "choices": None} == {
            **({} if usage else {"usage": whole["usage"]}),
            **body,
            "choices": None,
        }
        seen["calls"] += sum(len(choice["message"].get("tool_calls", ())) for choice in whole["choices"])
        seen["reasoning"] += sum(bool(choice["message"]["reasoning"]) for choice in whole["choices"])
    assert min(seen.values()) > ROUNDS / 4, "the answers have what is to be compared"


def test_text_completions(processor, head):
    chosen = random.Random(2)
    for _ in range(ROUNDS):
        fields = {"stop": chosen.choice([[], ["STOP"]]), "n": chosen.randint(1, 3)}
        if chosen.random() < 0.5:
            fields["logprobs"] = 2
        asked = read_completion({"prompt": ["a", "b"][: chosen.randint(1, 2)], **fields}, sampling=SAMPLING)
        answers = [answer(processor, request, chosen) for request in asked.requests]
        results = [result for _, result in answers]
        stream = CompletionStream(prompts=len(answers), n=fields["n"], **head, include_usage=True)
        chunks = [
            chunk
            for prompt, (events, result) in enumerate(answers)
            for event in (*events, result)
            for chunk in stream.take(event, prompt)
        ]
        chunks, whole = sent(chunks), sent(text_completion_body(results, **head))
        Completion.model_validate(whole)
        for chunk in chunks[:-1]:
            # The client has one type for both, in which no end is missing. It reads chunks without checking them.
            [choice] = chunk["choices"]
            assert choice["finish_reason"] in (None, "stop", "length")
            Completion.model_validate({**chunk, "choices": [{**choice, "finish_reason": "stop"}]})
        body = put_together(chunks)
        choices = [without_empty(body["choices"][index]) for index in range(len(whole["choices"]))]
        assert choices == [without_empty(choice) for choice in whole["choices"]]
        assert {**body, "choices": None, "object": None} == {**whole, "choices": None, "object": None}


def replay(events):
    """The output that the events of a response make up, read as a client does: each in its place."""
    output: list[Any] = []
    done = set()
    for number, event in enumerate(events):
        assert event["sequence_number"] == number
        kind, place = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert place == len(output) and len(done) == place, "one item after the other"
            output.append(dict(event["item"]))
            assert event["item"]["status"] == "in_progress"
        elif kind == "response.content_part.added":
            output[place]["content"].append(dict(event["part"]))
        elif kind in ("response.output_text.delta", "response.reasoning_text.delta"):
            part = output[place]["content"][event["content_index"]]
            part["text"] += event["delta"]
            if "logprobs" in part:
                part["logprobs"] += event["logprobs"]
        elif kind == "response.function_call_arguments.delta":
            output[place]["arguments"] += event["delta"]
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            part = output[place]["content"][event["content_index"]]
            assert part["text"] == event["text"] and part.get("logprobs") == event.get("logprobs")
        elif kind == "response.function_call_arguments.done":
            assert output[place]["arguments"] == event["arguments"]
        elif kind == "response.output_item.done":
            output[place]["status"] = event["item"]["status"]
            assert output[place] == event["item"] and place not in done
            done.add(place)
        if "item_id" in event:
            assert event["item_id"] == output[place]["id"] and place not in done
    assert done == set(range(len(output)))
    return output


def test_responses(processor, head):
    chosen, kinds, logprobs = random.Random(3), set(), 0
    named = {name: head[name] for name in ("created", "model", "token_text")}
    parse = TypeAdapter(ResponseStreamEvent).validate_python
    for _ in range(ROUNDS):
        tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
        fields = {"instructions": "be short", "tools": tools, "metadata": {"a": "b"}} if chosen.random() < 0.7 else {}
        if wanted := chosen.random() < 0.5:
            fields |= {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
        asked = read_responses({"input": "hi", "reasoning": {"effort": "low"}, **fields}, sampling=SAMPLING)
        events, result = answer(processor, asked.request, chosen, heat=chosen.random() < 0.5)
        stream = ResponseStream(asked, **named)
        got = sent([*stream.start(), *(each for event in (*events, result) for each in stream.take(event))])
        whole = sent(response_body(result, asked, **named))
        for event in got:
            parse(event)
        Response.model_validate(whole)
        assert [event["type"] for event in got[:2]] == ["response.created", "response.in_progress"]
        assert got[-1]["type"] == f"response.{whole['status']}" and got[-1]["response"] == whole
        assert replay(got) == whole["output"]
        texts = [item["content"][0]["text"] for item in whole["output"] if item["type"] == "message"]
        assert Response.model_validate(whole).output_text == "".join(texts) == result.choices[0].text
        shown = [item["content"][0] for item in whole["output"] if item["type"] == "message"]
        assert all(bool(part["logprobs"]) <= wanted for part in shown)
        for entry in (entry for part in shown for entry in part["logprobs"]):
            assert entry["token"] not in ("<think>", "</think>") and len(entry["top_logprobs"]) == 2
            logprobs += 1
        kinds |= {event["type"] for event in got}
    assert len(kinds) == 14, kinds
    assert logprobs > ROUNDS


def test_a_failure_ends_a_stream(head):
    error = RequestError("closed", "the engine was closed")
    [chunk] = ChatStream(**head).take(error)
    assert chunk == CompletionStream(prompts=1, n=1, **head).take(error)[0]
    assert chunk["error"]["code"] == "unavailable"
    asked = read_responses({"input": "hi"}, sampling=SAMPLING)
    named = {name: head[name] for name in ("created", "model", "token_text")}
    stream = ResponseStream(asked, **named)
    [*_, failed] = [*stream.start(), *stream.take(error)]
    TypeAdapter(ResponseStreamEvent).validate_python(failed)
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the engine was closed"}
