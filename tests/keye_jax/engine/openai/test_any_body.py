"""Bodies of any shape are read, or refused in one sentence."""

import copy
import json
import random

import pytest

from keye_jax.engine.openai import error_body, read_chat, read_completion, read_responses
from keye_jax.errors import UserError
from keye_jax.runtime.sampling import SamplingParams

pytest.importorskip("llguidance")

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
FORM = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
COMMON = {
    **{"model": "m", "temperature": 1, "top_p": 0.5, "top_k": 3, "seed": 7, "stop": ["a"], "stream": True},
    **{"stream_options": {"include_usage": True}, "n": 2, "logit_bias": {"5": 1}, "extra_body": {"min_p": 0.1}},
}
BODIES = [
    (
        read_chat,
        {
            **COMMON,
            **{"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": FUNCTION}]},
            **{"tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": True},
            **{"response_format": {"type": "json_schema", "json_schema": FORM}, "logprobs": True, "top_logprobs": 2},
            **{"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": 5, "reasoning_effort": "low"},
        },
    ),
    (read_completion, {**COMMON, "prompt": ["a", [1, 2]], "logprobs": 3, "grammar": {"type": "regex", "value": "a+"}}),
    (
        read_responses,
        {
            **{"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], "text": {"format": FORM}},
            **{"instructions": "i", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"},
            **{"reasoning": {"effort": "none"}, "metadata": {"a": "b"}, "max_output_tokens": 4, "truncation": "auto"},
        },
    ),
]
ODD = [
    *(None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**400, "", "x", "none", "\ud800", "a\nb", "é" * 500),
    *([], [[]], [None], {}, {"type": []}, {"": {}}, {"type": "json_schema"}, {"name": {}}, ["x"] * 200, {"$ref": "#"}),
]


def places(value, path=()):
    """The path of each value in a body."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize(("read", "body"), BODIES, ids=["chat", "completion", "responses"])
def test_any_body(read, body):
    chosen, outcomes = random.Random(0), [0, 0]
    read(copy.deepcopy(body), sampling=SamplingParams())
    paths = list(places(body))
    for _ in range(400):
        changed = copy.deepcopy(body)
        for path in chosen.sample(paths, chosen.choice((1, 1, 2))):
            within = changed
            try:
                for key in path[:-1]:
                    within = within[key]
                within[path[-1]] = chosen.choice(ODD)
            except (KeyError, IndexError, TypeError, AttributeError):
                continue  # the other change has put something else there
        try:
            asked = read(changed, sampling=SamplingParams())
        except UserError as error:
            outcomes[0] += 1
            assert "\n" not in str(error) and len(str(error)) < 700
            status, found = error_body(error)
            assert status == 400 and json.dumps(found)
        else:
            outcomes[1] += 1
            json.dumps(asked.echo)
    assert min(outcomes) > 20, outcomes
