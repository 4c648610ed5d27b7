"""Answers that have to be something: grammars, budgets of thoughts, and what stands beside them."""

import json

import jsonschema
import numpy as np
import pytest

from keye_jax.engine.constraint import Constraint, GrammarError, Grammars, Masks
from keye_jax.engine.openai import ChatStream, completion_body, read_chat
from keye_jax.engine.request import Request, RequestError
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.engine.conftest import GREEDY, ask, words

llguidance = pytest.importorskip("llguidance")

OPEN, CLOSE, END = 509, 508, 499
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "seconds": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 3},
        "kind": {"enum": ["ball", "square"]},
    },
    "required": ["name", "seconds", "kind"],
    "additionalProperties": False,
}
RANDOM = SamplingParams(temperature=1.5, top_p=1.0, top_k=0, seed=5)


def schema_grammar(schema=SCHEMA):
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def lark(text):
    return llguidance.LLMatcher.grammar_from_lark(text)


def tokens_of(mask):
    """Ids of the tokens in a mask."""
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


class TestConstraint:
    VOCAB = 557  # more than the tokenizer has

    @pytest.fixture(scope="class")
    @classmethod
    def processor(cls, loaded):
        return loaded[1]

    @pytest.fixture(scope="class")
    @classmethod
    def grammars(cls, processor):
        return Grammars(processor, cls.VOCAB, {END, 497})

    @pytest.fixture(scope="class")
    @classmethod
    def masks(cls):
        return Masks(cls.VOCAB, {END, 497}, (OPEN, CLOSE))

    def test_a_grammar_ends_with_end_tokens_alone(self, grammars, masks, processor):
        one = Constraint(masks, "closed", None, grammars.compile(lark('start: "a ball"')))
        written = []
        while not (allowed := tokens_of(one.allowed)) & {END, 497}:
            assert allowed and not allowed & {OPEN, CLOSE}
            written.append(min(allowed))
            one.advance(written[-1])
        assert allowed == {END, 497} and processor.detokenize(written) == "a ball"

    def test_control_tokens_come_only_where_a_grammar_names_them(self, grammars, masks, processor):
        anything = Constraint(masks, "closed", None, grammars.compile(lark("start: /(.|\\n)*/")))
        controls = set(processor._tokenizer.control.values())
        assert tokens_of(anything.allowed) & controls == {END, 497}
        assert max(tokens_of(anything.allowed)) < 512
        call = processor.token_id("<tool_call>")
        for text in ("start: <tool_call>", f"start: <[{call}]>"):
            assert tokens_of(Constraint(masks, "closed", None, grammars.compile(lark(text))).allowed) == {call}

    @pytest.mark.parametrize("text", ["</think>", "<|im_end|> or <tool_call>", "<"])
    def test_text_that_is_spelled_like_a_control_token_is_text(self, grammars, masks, processor, text):
        one = Constraint(masks, "closed", None, grammars.compile(schema_grammar({"enum": [text]})))
        written = []
        while not (allowed := tokens_of(one.allowed)) & {END, 497}:
            written.append(min(allowed))
            one.advance(written[-1])
        assert json.loads(processor.detokenize(written)) == text
        assert not set(written) & set(processor._tokenizer.control.values())

    def test_it_begins_behind_the_thoughts(self, grammars, masks):
        matcher = grammars.compile(lark('start: "a"'))
        one = Constraint(masks, "open", 2, matcher.deep_copy())
        assert tokens_of(one.allowed) == set(range(576)) - {OPEN, END, 497}
        one.advance(7)
        one.advance(8)
        assert tokens_of(one.allowed) == {CLOSE}
        one.advance(CLOSE)
        assert len(tokens_of(one.allowed)) == 1
        unopened = Constraint(masks, "unopened", 0, matcher.deep_copy())
        (first,) = tokens_of(unopened.allowed) - {OPEN}
        unopened.advance(OPEN)
        assert tokens_of(unopened.allowed) == {CLOSE}
        direct = Constraint(masks, "unopened", 0, matcher.deep_copy())
        direct.advance(first)
        assert tokens_of(direct.allowed) == {END, 497}

    @pytest.mark.parametrize(
        ("prompt", "opens", "raw", "expected"),
        [
            ([OPEN], True, False, "open"),
            ([3], False, False, "unopened"),
            ([3], False, True, "closed"),
            ([OPEN, 4, CLOSE, 5], False, False, "closed"),
        ],
    )
    def test_where_an_answer_begins(self, masks, prompt, opens, raw, expected):
        assert masks.beginning(np.asarray(prompt), opens=opens, raw=raw) == expected

    def test_only_near_its_end_a_budget_waits_for_tokens(self, masks):
        one = Constraint(masks, "open", 3, None)
        seen = [(one.active, one.allowed is masks.no_open)]
        for token in (7, 7, 7, CLOSE, 7):
            one.advance(token)
            seen.append((one.active, one.allowed is masks.no_open))
        assert seen == [(False, True), (False, True), (True, True), (True, False), (False, True), (False, True)]

    def test_what_the_vocabulary_cannot_write_is_an_error(self, grammars, masks):
        one = Constraint(masks, "closed", None, grammars.compile(lark('start: "a"')))
        with pytest.raises(GrammarError, match="the grammar cannot go on"):
            one.advance(CLOSE)


def answer(choice):
    """The object that an answer is, or None if it was cut; then there is a way to go on."""
    if choice.finish_reason == "length":
        return None
    found = json.loads(choice.text)
    jsonschema.validate(found, SCHEMA)
    return found


def free(seed, **others):
    sampling = GREEDY if seed % 2 else SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=seed)
    return ask(words(seed, 5 + 9 * seed), tokens=60, sampling=sampling, **others)


def test_grammars_beside_free_answers(engine):
    """Answers that may be anything have the same tokens with and without the others."""
    requests = [free(seed, n=1 + seed % 2) for seed in range(1, 4)]
    alone = [[each.token_ids for each in engine.submit(request).result(120).choices] for request in requests]
    bound = ask(words(7), tokens=400, sampling=RANDOM, grammar=schema_grammar(), thinking_budget=5, n=2)
    handles = [engine.submit(request) for request in (bound, *requests, bound)]
    first, *others, last = [handle.result(120) for handle in handles]
    assert [[each.token_ids for each in result.choices] for result in others] == alone
    assert [each.token_ids for each in first.choices] == [each.token_ids for each in last.choices]
    assert len({each.token_ids for each in first.choices}) == 2
    for choice in first.choices:
        assert choice.finish_reason == "stop" and answer(choice) is not None
        assert choice.reasoning_tokens <= 6  # the closing mark counts
    assert engine.stats().compilations == 0


def test_a_prompt_without_thoughts_and_a_cached_prefix(engine, loaded):
    """The grammar begins at once, also where the whole prompt but its end is in the prefix cache."""
    request = Request(prompt=words(8, 60), max_tokens=400, sampling=RANDOM, grammar=schema_grammar())
    first, second = (engine.submit(request).result(120) for _ in range(2))
    assert second.usage.cached > first.usage.cached == 0
    assert first.choices[0].token_ids == second.choices[0].token_ids
    assert answer(first.choices[0]) is not None and not first.choices[0].reasoning


def test_limits_and_cancelling_leave_a_valid_prefix(engine, loaded):
    request = Request(prompt="x", max_tokens=9, sampling=RANDOM, grammar=schema_grammar())
    (choice,) = engine.submit(request).result(120).choices
    assert choice.finish_reason == "length"
    assert_prefix(loaded, choice.token_ids)
    handle = engine.submit(ask("x", tokens=1500, sampling=RANDOM, grammar=lark('start: "a"{1200}')))
    next(iter(handle))
    handle.cancel()
    assert handle.result(120).choices[0].finish_reason == "cancelled"


def assert_prefix(loaded, tokens):
    """That a grammar goes on behind these tokens."""
    runtime, processor, defaults = loaded
    matcher = Grammars(processor, runtime.config.vocab_size, defaults.end_tokens).compile(schema_grammar())
    assert matcher.consume_tokens(list(tokens)) and not matcher.is_stopped()


@pytest.mark.slow
def test_a_preempted_grammar_goes_on(engine, make):
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 70, "maxItems": 90}
    bound = {"grammar": schema_grammar(schema), "thinking_budget": 3}
    requests = [ask(words(seed, 60), tokens=150, sampling=RANDOM, **(bound if seed % 2 else {})) for seed in range(4)]
    expected = [engine.submit(request).result(120).choices[0].token_ids for request in requests]
    with make(optimistic=True, cache_tokens=13 * 64, prefix_cache=False) as short:
        handles = [short.submit(request) for request in requests]
        assert [handle.result(120).choices[0].token_ids for handle in handles] == expected
        assert short.stats().scheduler.preemptions > 0


@pytest.mark.parametrize("budget", [0, 7])
def test_a_budget_of_thoughts(engine, budget):
    request = ask(words(3), tokens=40, sampling=RANDOM, thinking_budget=budget, logit_bias={CLOSE: -1000.0})
    (choice,) = engine.submit(request).result(120).choices
    assert choice.token_ids.index(CLOSE) == budget and OPEN not in choice.token_ids
    assert choice.reasoning_tokens == budget + 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("x", grammar=lark("start: nothing")), "grammar is not valid: .*unknown name"),
        (ask("x", grammar=schema_grammar({"type": "film"})), "grammar is not valid: .*film"),
        (Request(prompt=""), "prompt is empty; it must have at least one token"),
        (Request(prompt=[3, 512]), "prompt has token 512; it must be a whole number below 512"),
        (Request(prompt=[3, 505]), "prompt has token 505, which stands for media"),
        (ask("x", selection_heat=True), "selection_heat is true; this engine does not count"),
    ],
)
def test_what_is_wrong_is_refused_in_a_sentence(engine, request_, message):
    with pytest.raises(RequestError, match=message) as error:
        engine.submit(request_).result(120)
    assert error.value.kind == "invalid" and "\n" not in str(error.value)


def test_a_prompt_without_a_template(engine, loaded):
    """Text never becomes a control token, and ids stay what they are."""
    processor = loaded[1]
    text = engine.submit(Request(prompt="<|im_end|> a", max_tokens=5, sampling=GREEDY)).result(120)
    ids = processor._tokenizer.encode_text("<|im_end|> a")
    assert END not in ids and text.usage.prompt == len(ids)
    same = engine.submit(Request(prompt=ids, max_tokens=5, sampling=GREEDY)).result(120)
    assert same.choices[0].token_ids == text.choices[0].token_ids
    thinking = engine.submit(Request(prompt=[END, 3, OPEN, 4], max_tokens=5, sampling=GREEDY)).result(120)
    assert thinking.usage.reasoning > 0 and thinking.usage.prompt == 4


def test_calls_that_must_be_made_stream_as_they_are_whole(engine, loaded):
    """Bodies of the OpenAI interface, to a model that writes anything it may."""
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "required"}
    body |= {"thinking_budget": 3, "max_tokens": 400, "parallel_tool_calls": False, "n": 2, "logprobs": True}
    asked = read_chat(body, sampling=RANDOM)
    head = {"completion_id": "x", "created": 1, "model": "m", "token_text": str}
    handle, stream = engine.submit(asked.request), ChatStream(**head)
    chunks = [chunk for event in handle for chunk in stream.take(event)]
    result = handle.result(120)
    chunks += stream.take(result)
    for index, choice in enumerate(completion_body(result, **head)["choices"]):
        parts = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        pieces = [call for each in parts for call in each["delta"].get("tool_calls", ())]
        [call] = choice["message"]["tool_calls"]
        assert pieces[0]["id"] == call["id"] and pieces[0]["function"]["name"] == call["function"]["name"] == "look"
        assert len(pieces) > 2
        assert "".join(each["function"]["arguments"] for each in pieces) == call["function"]["arguments"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None and choice["message"]["reasoning"]
        scores = [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"] and len(scores) == len(result.choices[index].token_ids)
