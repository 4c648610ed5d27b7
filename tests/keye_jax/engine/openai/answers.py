"""Answers of any tokens, without a model: the events of a request and its result."""

from __future__ import annotations

import random

from keye_jax.engine.request import FinishReason, Request, Result, SelectionHeat, Timings, TokenLogprob, Usage
from keye_jax.engine.text import AnswerWriter

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "look")]
HEAT = SelectionHeat(((0.5, 0.25),), (), 0.25, 0.1)

# What a model might write, and what it should not.
_TEXTS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_start|>", "<|image_pad|>"),
    *('<tool_call>\n{"name": "f", "arguments": {"x": [1, "}"]}}\n</tool_call>', '{"name": "f", "arguments": {"x": "'),
    *(
        '{"name": "look", "arguments": {}}',
        '{"name": "other", "arguments": {}}',
        '"}}',
        "STOP",
        "ST",
        "é漢🎈",
        " \n",
        "}",
    ),
    *("The ball moves. ", "hello", '<tool_call>{"arguments": {}, "name": "look"}</tool_call>'),
)


def tokens(processor, chosen: random.Random) -> list[int]:
    """A random answer. Characters of several bytes may be broken."""
    tokenizer = processor._tokenizer
    drawn: list[int] = []
    for _ in range(chosen.randint(0, 12)):
        if chosen.random() < 0.2:
            drawn += [chosen.randrange(500) for _ in range(3)]
        else:
            drawn += tokenizer.encode_template(chosen.choice(_TEXTS))
    return drawn


def answer(processor, request: Request, chosen: random.Random, *, heat: bool = False) -> tuple[list, Result]:
    """Events of a request whose choices are written side by side, and its result."""
    events: list = []
    thinking = request.prompt is None and chosen.random() < 0.5
    writers = [AnswerWriter(processor, request, index, thinking, events.append) for index in range(request.n)]
    drawn = [tokens(processor, chosen) for _ in writers]
    reasons: list[FinishReason] = [chosen.choice(("stop", "length", "cancelled")) for _ in writers]
    running = list(range(request.n))
    while running:
        index = chosen.choice(running)
        if not drawn[index] or writers[index].stopped:
            running.remove(index)
            continue
        token = drawn[index].pop(0)
        writers[index].write(token, TokenLogprob(token, -0.5, ((token, -0.5), (3, float("-inf")))))
    known = {"selection_heat": HEAT if heat else None}
    ends = [
        writer.finish("stop" if writer.stopped else reason, **known)
        for writer, reason in zip(writers, reasons, strict=True)
    ]
    usage = Usage(100, 20, 30, 64, sum(len(end.token_ids) for end in ends), sum(end.reasoning_tokens for end in ends))
    warnings = ("a warning",) if chosen.random() < 0.3 else ()
    return events, Result(tuple(ends), usage, Timings(0, 0, 0, 0, 0), warnings=warnings)
