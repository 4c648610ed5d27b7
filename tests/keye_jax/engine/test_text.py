"""Text as it comes: reasoning, stop texts and tool calls apart, and that the events are the whole."""

import itertools
import random
from typing import Any, cast

import pytest

from keye_jax.engine.request import FinishReason, Piece, Request, TextPart, TokenLogprob, ToolCall, ToolCallPiece
from keye_jax.engine.text import AnswerWriter

MARKS = {"<think>": "(", "</think>": ")", "<tool_call>": "«", "</tool_call>": "»"}
TOOLS = ("f", "look up")


class Letters:
    """A processor whose tokens are the characters of a text, and some of them control tokens."""

    def token_id(self, text):
        return ord(MARKS[text])

    def stream(self):
        return self

    def step(self, token):
        return chr(token)

    def flush(self) -> str:
        return ""


def write(text, *, thinking=False, reason: FinishReason = "stop", **given):
    """The events and the whole of an answer; checks that they agree."""
    fields: Any = {"messages": [{}]} | given
    request, events = Request(**fields), []
    writer = AnswerWriter(cast(Any, Letters()), request, 0, thinking, events.append)
    for character in text:
        writer.write(ord(character), TokenLogprob(ord(character), -1.0))
        if writer.stopped:
            break
    choice = writer.finish(reason)
    check(events, choice)
    return choice, events, writer


def check(events, choice):
    """The events put together are the whole."""
    pieces = [event for event in events if isinstance(event, Piece)]
    for reasoning, whole in ((False, choice.text), (True, choice.reasoning)):
        assert "".join(piece.text for piece in pieces if piece.reasoning == reasoning) == whole
    calls: list[list[str]] = []
    parts: list[Any] = []
    for event in events:
        if isinstance(event, ToolCallPiece):
            if event.name is not None:
                assert event.index == len(calls) and not event.arguments
                calls.append([event.id, event.name, ""])
                parts.append(event.index)
            assert event.index == len(calls) - 1 and event.id == calls[-1][0]
            calls[-1][2] += event.arguments
            continue
        in_text = tuple(each for each in event.logprobs if each.in_text)
        before = parts[-1] if parts else None
        if isinstance(before, TextPart) and before.reasoning == event.reasoning:
            parts[-1] = TextPart(before.text + event.text, event.reasoning, before.logprobs + in_text)
        else:
            parts.append(TextPart(event.text, event.reasoning, in_text))
    assert choice.tool_calls == tuple(ToolCall(*call) for call in calls)
    assert choice.parts == tuple(choice.tool_calls[part] if isinstance(part, int) else part for part in parts)
    told = tuple(itertools.chain.from_iterable(event.logprobs for event in events))
    assert told == (choice.logprobs or ())[: len(told)]


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "reasoning", "count"),
    [
        ("hello", False, "hello", "", 0),
        ("  hello  world \n", False, "hello  world", "", 0),
        ("hm\n)\n\nyes", True, "yes", "hm", 4),
        ("( hm )yes", False, "yes", "hm", 5),
        ("hm", True, "", "hm", 2),
        (" \n ", False, "", "", 0),
        ("a)b", False, "ab", "", 0),
        ("(a)b(c)d", False, "bd", "ac", 4),
    ],
)
def test_reasoning_and_answer(text, thinking, answer, reasoning, count):
    choice, _, _ = write(text, thinking=thinking)
    assert (choice.text, choice.reasoning, choice.reasoning_tokens) == (answer, reasoning, count)
    assert choice.finish_reason == "stop"


class Halves(Letters):
    """Each character is half of one: two of them are one in upper case."""

    def __init__(self):
        self.half = ""

    def step(self, token):
        self.half += chr(token)
        return self.flush().upper() if len(self.half) == 2 else ""

    def flush(self):
        half, self.half = self.half, ""
        return half


def test_half_a_character_belongs_to_the_part_before_a_mark():
    writer = AnswerWriter(cast(Any, Halves()), Request(messages=[{}]), 0, True, lambda piece: None)
    for character in "hmm)ok":
        writer.write(ord(character))
    choice = writer.finish("stop")
    assert (choice.text, choice.reasoning) == ("OK", "HMm")


@pytest.mark.parametrize(
    ("text", "stop", "answer"),
    [
        ("one STOP two", ("STOP",), "one"),
        ("one ST two", ("STOP",), "one ST two"),
        ("one STO", ("STOP",), "one STO"),
        ("aabaabaac", ("aabaac",), "aab"),
        ("a\n\nb", ("\n\n",), "a"),
        ("ab", ("b", "ab"), ""),
        ("x.y", (".",), "x"),
        ("(STOP)on STOP", ("STOP",), "on"),
    ],
)
def test_stop_texts(text, stop, answer):
    choice, _, writer = write(text, stop=stop)
    assert choice.text == answer
    assert writer.stopped == any(each in text.split(")")[-1] for each in stop)


def test_the_answer_to_a_raw_prompt_is_all_text():
    text = ' \n(a) «{"name": "f", "arguments": {}}» '
    assert write(text, messages=None, prompt="x")[0].text == text
    assert write("\n\nx", messages=None, prompt=[1], stop=("\n\n",))[0].text == ""


class TestToolCalls:
    def calls(self, text, **fields):
        choice, _, _ = write(text, tool_names=TOOLS, **fields)
        return [(call.name, call.arguments) for call in choice.tool_calls], choice.text, choice.finish_reason

    @pytest.mark.parametrize(
        ("body", "arguments"),
        [
            ('{"name": "f", "arguments": {"x": 1}}', '{"x": 1}'),
            ('\n {\n"name" :"f",\t"arguments":  { "x" : [1, {"y": "}]\\"{"}] } , "more": 1}\n', None),
            ('{"name": "f", "arguments": {}}', "{}"),
            ('{"name": "\\u0066", "arguments": {}}', "{}"),
            ('{"arguments": {"x": "é"}, "name": "f"}', '{"x": "\\u00e9"}'),
            ('{"name": "f"}', "{}"),
            ('{"name": "f", "arguments": "{\\"x\\": 1}"}', '{"x": 1}'),
            ('{"name": "f", "arguments": {"x": tru', '{"x": tru'),
            ('{"name": "f", "arguments": {} and more', "{}"),
        ],
    )
    def test_forms(self, body, arguments):
        arguments = arguments or '{ "x" : [1, {"y": "}]\\"{"}] }'
        assert self.calls(f"see «{body}»") == ([("f", arguments)], "see", "tool_calls")

    @pytest.mark.parametrize(
        "body",
        [
            *("", "no JSON", "{}", "[]", "7", '{"name": "g", "arguments": {}}', '{"name": 7, "arguments": {}}'),
            *('{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": null}'),
            *('{"name": "f", "name": "g"}', '{"name": "f", "arguments" {}}'),
            *('{"arguments": {"x": NaN}, "name": "f"}', "[" * 5000, '{"name": "' + "f" * 5000, " " * 5000),
        ],
    )
    def test_what_is_none_stays_text(self, body):
        assert self.calls(f"a «{body}» b") == ([], f"a «{body}» b", "stop")

    def test_a_call_that_is_cut(self):
        text = 'a «{"name": "f", "arguments": {"x": 1}}'
        sure = text.index('{"x"')
        for length in range(len(text) + 1):
            calls, answer, reason = self.calls(text[:length], reason="length")
            if length <= sure:
                assert (calls, answer) == ([], text[:length].rstrip())
            else:
                assert (calls, answer) == ([("f", text[sure : min(length, len(text) - 1)])], "a")
            assert reason == "length"

    def test_several_with_text_between(self):
        one, two = '{"name": "f", "arguments": {"x": 1}}', '{"name": "look up", "arguments": {"y": "2"}}'
        choice, _, _ = write(f"(hm) A «{one}» B «{one}»«{two}»", tool_names=TOOLS)
        assert (choice.text, choice.reasoning) == ("A  B", "hm")
        assert [(call.name, call.arguments) for call in choice.tool_calls] == [
            *[("f", '{"x": 1}')] * 2,
            ("look up", '{"y": "2"}'),
        ]
        assert [part if isinstance(part, TextPart) else part.name for part in choice.parts or ()] == [
            *(TextPart("hm", True), TextPart("A"), "f", TextPart("  B"), "f", "look up"),
        ]

    def test_other_marks_end_a_call(self):
        one = '{"name": "f", "arguments": {"x": '
        choice, _, _ = write(f"«{one}(hm)«{one}1}}}}»«x«{one}2}}}}»»", tool_names=TOOLS)
        assert [call.arguments for call in choice.tool_calls] == ['{"x": ', '{"x": 1}', '{"x": 2}']
        assert (choice.text, choice.reasoning) == ("«x»", "hm")

    def test_only_outside_of_the_reasoning_and_with_tools(self):
        one = '«{"name": "f", "arguments": {}}»'
        assert self.calls(one, thinking=True) == ([], "", "stop")
        assert write(one)[0].text == one

    def test_ids_follow_from_the_request(self):
        one = '«{"name": "f", "arguments": {}}»'
        first, again = (write(one * 2, tool_names=TOOLS, id="a")[0].tool_calls for _ in range(2))
        other = write(one, tool_names=TOOLS, id="b")[0].tool_calls
        assert first == again
        ids = [call.id for call in (*first, *other)]
        assert len(set(ids)) == 3 and all(len(each) == 29 and each.startswith("call_") for each in ids)

    def test_the_name_comes_first_then_the_arguments_as_they_are_written(self):
        _, events, _ = write('«{"name": "f", "arguments": {"x": 1}}»', tool_names=TOOLS)
        assert [(event.name, event.arguments) for event in events] == [("f", ""), *((None, x) for x in '{"x": 1}')]

    def test_the_most_calls(self):
        one = '«{"name": "f", "arguments": {}}»'
        choice, _, writer = write(f"«x» {one} and {one}", tool_names=TOOLS, max_tool_calls=1)
        assert writer.stopped and len(choice.tool_calls) == 1 and choice.text == "«x»"

    def test_stop_texts_are_looked_for_in_text_alone(self):
        one = '{"name": "f", "arguments": {"x": "STOP"}}'
        assert self.calls(f"a «{one}» b STOP c", stop=("STOP",)) == ([("f", '{"x": "STOP"}')], "a  b", "tool_calls")
        assert self.calls("a «STOP» b", stop=("STOP",)) == ([], "a «", "stop")


def test_events_are_the_whole_of_any_tokens():
    chosen = random.Random(0)
    words = [
        *"()«»«» \n",
        "STOP",
        "ST",
        '{"name": "f", "arguments": {',
        '"x": "y"',
        "}}",
        "word ",
        '{"name": "g"',
        "}",
        '«{"name": "f", "arguments": {',
    ]
    called = 0
    for _ in range(500):
        text = "".join(chosen.choices(words, k=chosen.randint(0, 30)))
        fields = {"stop": chosen.choice([(), ("STOP",)]), "top_logprobs": chosen.choice([None, 0])}
        choice, _, writer = write(text, thinking=chosen.random() < 0.3, tool_names=TOOLS, **fields)
        assert not fields["stop"] or "STOP" not in choice.text
        assert choice.text == choice.text.strip() and choice.reasoning == choice.reasoning.strip()
        assert len(choice.token_ids) == len(text) or writer.stopped
        called += len(choice.tool_calls)
    assert called > 100
