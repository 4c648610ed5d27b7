"""Text as it comes: reasoning, stop texts, and that pieces are the whole."""

from typing import Any, cast

import pytest

from keye_jax.engine.text import AnswerWriter


class Letters:
    """A processor whose tokens are the characters of a text; `(` and `)` are the marks of the think block."""

    def token_id(self, text):
        return {"<think>": ord("("), "</think>": ord(")")}[text]

    def stream(self):
        return self

    def step(self, token):
        return chr(token)

    def flush(self):
        return ""


def write(text, *, thinking=False, stop=()):
    pieces = {False: "", True: ""}

    def emit(piece, reasoning):
        assert piece
        pieces[reasoning] += piece

    writer = AnswerWriter(cast(Any, Letters()), thinking, emit, stop)
    for character in text:
        writer.write(ord(character))
        if writer.stopped:
            break
    answer, reasoning = writer.finish()
    assert pieces == {False: answer, True: reasoning}
    return answer, reasoning, writer


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "reasoning"),
    [
        ("hello", False, "hello", ""),
        ("  hello  world \n", False, "hello  world", ""),
        ("hm\n)\n\nyes", True, "yes", "hm"),
        ("( hm )yes", False, "yes", "hm"),
        ("hm", True, "", "hm"),
        (" \n ", False, "", ""),
    ],
)
def test_reasoning_and_answer(text, thinking, answer, reasoning):
    assert write(text, thinking=thinking)[:2] == (answer, reasoning)


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
    writer = AnswerWriter(cast(Any, Halves()), True, lambda piece, reasoning: None)
    for character in "hmm)ok":
        writer.write(ord(character))
    assert writer.finish() == ("OK", "HMm")


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
    found, _, writer = write(text, stop=stop)
    assert found == answer
    assert writer.stopped == any(each in text.split(")")[-1] for each in stop)
