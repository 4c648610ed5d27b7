import pytest

from keye_jax.engine.openai import read_completion
from keye_jax.errors import UserError
from keye_jax.runtime.sampling import SamplingParams


def ask(**fields):
    return read_completion({"prompt": "hi", **fields}, sampling=SamplingParams(temperature=0.7))


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("hi", ["hi"]),
        ([1, 2], [(1, 2)]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        (["a", [7]], ["a", (7,)]),
    ],
)
def test_prompts(prompt, read):
    requests = ask(prompt=prompt).requests
    assert [request.prompt for request in requests] == read
    assert len({request.id for request in requests}) == len(read)


def test_what_is_not_said_is_the_default():
    request = ask().request
    assert (request.max_tokens, request.n, request.top_logprobs, request.tool_names) == (16, 1, None, ())
    assert request.sampling == SamplingParams(temperature=0.7)


def test_all_of_it():
    got = ask(max_tokens=5, n=2, best_of=2, stop="x", logprobs=3, seed=4, echo=False, suffix="", user="me", other=1)
    request = got.request
    assert (request.max_tokens, request.n, request.stop, request.top_logprobs) == (5, 2, ("x",), 3)
    assert got.ignored == ("other",)
    assert ask(logprobs=0).request.top_logprobs == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", None, "prompt is None; it must be a text, a list of token ids, or a list of at most 128 of either"),
        ("prompt", "", "prompt is ''; it must be a text or token ids, not empty"),
        ("prompt", [], "prompt is []"),
        ("prompt", ["a", ""], "prompt[1] is ''"),
        ("prompt", [1, "a"], "prompt[0] is 1"),
        ("prompt", [-1], "prompt is -1"),
        ("prompt", [True], "prompt is True"),
        ("prompt", ["a"] * 129, "at most 128 of either"),
        ("echo", True, "echo is True; it must be false"),
        ("suffix", "x", "suffix is 'x'; it must be left out"),
        ("best_of", 3, "best_of is 3; it must be n, 1, or left out"),
        ("logprobs", True, "logprobs is True; it must be an integer from 0 to 20"),
        ("stream", 1, "stream is 1; it must be true or false"),
    ],
)
def test_a_wrong_value_is_named(field, value, message):
    with pytest.raises(UserError) as error:
        ask(**{field: value})
    assert message in str(error.value)
    assert (error.value.field or "").partition("[")[0] == field
