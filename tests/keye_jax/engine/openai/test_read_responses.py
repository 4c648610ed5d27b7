from typing import Any, cast

import pytest

from keye_jax.engine.openai import error_body, read_responses
from keye_jax.engine.request import RequestError
from keye_jax.errors import UserError
from keye_jax.processor.messages import check_messages
from keye_jax.runtime.sampling import SamplingParams

PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"}
ITEMS = [
    {"role": "developer", "content": "be kind"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "what is it?"}, PICTURE]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "I look", "annotations": []}]},
    {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "look", "arguments": '{"at": "it"}'},
    {"type": "function_call", "call_id": "call_2", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": "a ball"},
    {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "nothing"}]},
    {"type": "function_call", "call_id": "call_3", "name": "look", "arguments": "{}"},
]
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True, "description": "d"}


def ask(**fields):
    return read_responses({"input": "hi", **fields}, sampling=SamplingParams(), max_tokens=9)


def conversation(**fields) -> list[dict[str, Any]]:
    return cast(Any, ask(**fields).request.messages)


def test_a_text():
    assert conversation() == [{"role": "user", "content": "hi"}]
    assert conversation(instructions="be short")[0] == {"role": "system", "content": "be short"}
    assert ask().request.max_tokens == 9 and ask(max_output_tokens=5).request.max_tokens == 5


def test_items():
    messages = conversation(input=ITEMS)
    assert [message["role"] for message in messages] == [
        *("developer", "user", "assistant", "tool", "tool", "assistant"),
    ]
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["call_1", "call_2"]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "it"}'}
    assert [message["tool_call_id"] for message in messages[3:5]] == ["call_1", "call_2"]
    checked, media = check_messages(messages)
    assert checked[2]["content"] == "I look" and len(media) == 1 and checked[4]["content"] == "nothing"
    assert "tool_calls" not in ITEMS[3]


def test_tools_and_the_rest():
    got = ask(tools=[TOOL], parallel_tool_calls=False, reasoning={"effort": "none"}, store=True, odd=1)
    request = got.request
    assert request.tool_names == ("look",) and request.max_tool_calls == 1
    assert request.options["tools"][0]["function"] == {name: TOOL[name] for name in TOOL if name != "type"}
    assert request.options["chat_template_kwargs"] == {"enable_thinking": False}
    assert got.ignored == ("odd",) and got.echo["tools"] == [TOOL] and got.echo["reasoning"]["effort"] == "none"
    assert ask(text={"format": {"type": "text"}}).request.grammar is None


def test_what_changes_nothing_is_named():
    asked = ask(
        reasoning={"effort": "high", "summary": "auto"},
        text={"verbosity": "low"},
        truncation="auto",
        include=["reasoning.encrypted_content"],
    )
    assert asked.ignored == ("include", "reasoning.effort", "reasoning.summary", "text.verbosity", "truncation")


def test_log_probabilities():
    assert ask().request.top_logprobs is None
    included = ask(include=["message.output_text.logprobs"])
    assert included.request.top_logprobs == 0 and included.ignored == ()
    assert ask(include=["message.output_text.logprobs"], top_logprobs=3).request.top_logprobs == 3


@pytest.mark.parametrize(
    ("planned", "field"),
    [
        ("messages[0].content", "instructions"),
        ("messages[1].content", "input[0].content"),
        ("messages[2].content[1].image_url", "input[1].content[1].image_url"),
        ("messages[3].tool_calls[0].function.arguments", "input[4].arguments"),
        ("messages[3].tool_calls[1].function.arguments", "input[5].arguments"),
        ("messages[5].content[0].text", "input[7].output[0].text"),
        ("messages[6].tool_calls[0].function.arguments", "input[8].arguments"),
        ("messages[6]", "input[8]"),
        ("max_tokens", "max_output_tokens"),
        ("tools[0]", "tools[0]"),
    ],
)
def test_errors_have_the_names_of_the_body(planned, field):
    asked = ask(instructions="be short", input=ITEMS)
    error = asked.in_its_words(RequestError("invalid", f"{planned} is 7; it must be another"))
    assert (error.kind, str(error)) == ("invalid", f"{field} is 7; it must be another")
    mistake = asked.in_its_words(UserError(f"{planned} is 7", field=planned))
    assert (str(mistake), mistake.field) == (f"{field} is 7", field)


def test_an_error_about_a_text():
    error = ask().in_its_words(UserError("messages[0].content is 'hi'; the chat template leaves it out"))
    assert str(error).startswith("input is 'hi'") and error_body(error)[1]["error"]["param"] == "input"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input", None, "input is None; it must be a text or a list of items, not empty"),
        ("input", [], "input is []"),
        ("input", [7], "input[0] is 7; it must be an object"),
        ("input", [{"type": "web_search_call"}], "input[0].type is 'web_search_call'; it must be one of message"),
        ("input", [{"role": "tool", "content": "x"}], "input[0].role is 'tool'; it must be one of user, assistant"),
        ("input", [{"role": "user"}], "input[0].content is None"),
        ("input", [{"type": "function_call", "name": "f", "arguments": "{}"}], "input[0].call_id is None"),
        ("input", [{"type": "function_call_output", "call_id": "x"}], "input[0].output is None"),
        ("input", [{"type": "reasoning"}], "it must hold a message"),
        ("previous_response_id", "resp_1", "previous_response_id is 'resp_1'; it must be left out; this server keeps"),
        ("background", True, "background is True; it must be false"),
        ("text", [], "text is []; it must be an object"),
        ("text", {"format": 7}, "text.format is 7; it must be an object with type"),
        ("text", {"format": {"type": "xml"}}, "text.format.type is 'xml'; it must be one of"),
        ("tools", [{"type": "web_search"}], "tools[0].type is 'web_search'; it must be 'function'"),
        ("max_output_tokens", 0, "max_output_tokens is 0; it must be an integer from 1"),
        ("temperature", "x", "temperature is 'x'; it must be a number"),
        ("reasoning", {"effort": 7}, "reasoning.effort is 7; it must be a string"),
        ("metadata", 7, "metadata is 7; it must be an object"),
        ("include", ["x", 1], "include is ['x', 1]; it must be a list of strings"),
        ("top_logprobs", 2, "top_logprobs is 2; include must hold 'message.output_text.logprobs' beside it"),
        (
            "tool_choice",
            {"type": "function", "name": "f"},
            "tool_choice.name is 'f'; it must be the name of a function",
        ),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice is {"),
    ],
)
def test_a_wrong_value_is_named(field, value, message):
    with pytest.raises(UserError) as error:
        ask(**{field: value})
    assert message in str(error.value)
    assert (error.value.field or "").startswith(field)
