"""Grammars from bodies, tried on a real tokenizer: which answers they allow."""

import builtins

import pytest

from keye_jax.engine.openai import read_chat, read_responses
from keye_jax.errors import UserError
from keye_jax.runtime.sampling import SamplingParams

llguidance = pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": 'say "hi"'}},
]
ANSWER, CALL = '{"x":1,"y":"a"}', '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": "a"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "say \\"hi\\"", "arguments": {}}\n</tool_call>'


def asked(**fields):
    return read_chat({"messages": [{"role": "user", "content": "hi"}], **fields}, sampling=SamplingParams()).request


def schema(value):
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": value}}


@pytest.fixture(scope="module")
def allows(tokenizer_files, processor):
    """Whether a grammar allows a text as a whole answer. Names of control tokens in it are these tokens."""
    end = processor.token_id("<|im_end|>")
    tokenizer = llguidance.LLTokenizer(str(tokenizer_files / "tokenizer.json"), eos_token=end)

    def call(grammar, text):
        assert grammar is not None
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = tokenizer.tokenize_str(text, parse_special=True)
        return matcher.validate_tokens([*tokens, end]) == len(tokens) + 1

    return call


class TestAnswers:
    def test_text_has_no_grammar(self):
        assert asked().grammar is asked(response_format={"type": "text"}).grammar is None

    def test_any_object(self, allows):
        grammar = asked(response_format={"type": "json_object"}).grammar
        assert allows(grammar, "{}") and allows(grammar, '{"a":[1,{"b":null}]}')
        assert not any(allows(grammar, text) for text in ("", "[]", '"a"', "{ }", '{"a": 1}', "{}\n", "{}{}", "hi"))

    @pytest.mark.parametrize("value", [SCHEMA, {**SCHEMA, "x-guidance": {"whitespace_flexible": True}}])
    def test_a_schema(self, allows, value):
        grammar = asked(response_format=schema(value)).grammar
        assert allows(grammar, ANSWER) and allows(grammar, '{"x":-12,"y":"b"}')
        refused = ('{"x":1}', '{"x":1,"y":"c"}', '{"x": 1,"y":"a"}', '{"x":1.5,"y":"a"}', ANSWER[:-1] + ',"z":1}', "{}")
        assert not any(allows(grammar, text) for text in refused)

    def test_the_responses_interface_has_it_elsewhere(self):
        body = {"input": "hi", "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}
        assert (
            read_responses(body, sampling=SamplingParams()).request.grammar
            == asked(response_format=schema(SCHEMA)).grammar
        )

    @pytest.mark.parametrize(
        ("grammar", "text", "other"),
        [
            ('root ::= "yes" | "no"', "yes", "maybe"),
            ('start: "yes" | "no"', "no", "yesno"),
            ({"type": "gbnf", "value": 'root ::= [0-9]+ "!"'}, "42!", "42"),
            ({"type": "lark", "value": 'start: NAME " is " NAME\nNAME: /[a-z]+/'}, "it is so", "it was so"),
            ({"type": "regex", "value": r"\d{2}:\d{2}"}, "12:34", "1:34"),
            ({"type": "json_schema", "value": {"enum": [1, "two"]}}, '"two"', "two"),
            ({"type": "json_schema", "value": True}, "7", "seven"),
            ({"type": "regex", "value": "<tool_call>a*"}, None, "<tool_call>a"),
        ],
    )
    def test_grammars(self, allows, grammar, text, other):
        found = asked(grammar=grammar).grammar
        assert text is None or allows(found, text)
        assert not allows(found, other)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"response_format": schema(None)}, "response_format.json_schema.schema is None; it must be a JSON schema"),
            ({"response_format": {"type": "json_schema", "json_schema": 1}}, "response_format.json_schema is 1; it"),
            (
                {"response_format": schema({"type": "array", "uniqueItems": True})},
                'response_format.json_schema.schema cannot be compiled: Unimplemented keys: ["uniqueItems"]',
            ),
            ({"response_format": schema({"type": "number", "minimum": 2, "maximum": 1})}, "cannot be compiled: Unsat"),
            ({"response_format": schema({"$ref": "https://example.com/a"})}, "cannot be compiled: Resource"),
            ({"response_format": schema({"$ref": "file:///etc/passwd"})}, "cannot be compiled: Resource"),
            ({"response_format": schema({"type": "string", "pattern": "(?=a)"})}, "look-around"),
            ({"grammar": "start: ("}, "grammar cannot be compiled: "),
            ({"grammar": ""}, "grammar is ''; it must be a grammar as text, or an object"),
            ({"grammar": 7}, "grammar is 7; it must be a grammar as text, or an object"),
            ({"grammar": {"type": "bnf", "value": "x"}}, "grammar.type is 'bnf'; it must be one of lark, gbnf, regex"),
            ({"grammar": {"type": "lark", "value": 7}}, "grammar.value is 7; it must be a grammar as text"),
            ({"grammar": {"type": "regex", "value": "(a"}}, "grammar.value cannot be compiled: "),
            ({"grammar": "start: <|im_end|>"}, "grammar names a control token; it must be made of text"),
            ({"grammar": "start: <[3]>"}, "grammar names a control token; it must be made of text"),
            ({"grammar": "start: /a/", "response_format": schema({})}, "grammar is given beside response_format"),
        ],
    )
    def test_what_cannot_be_is_refused_in_one_line(self, fields, message):
        with pytest.raises(UserError) as error:
            asked(**fields)
        assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
        assert error.value.field is not None and str(error.value).startswith(error.value.field)

    def test_a_schema_that_is_too_deep(self):
        value = {}
        for _ in range(5000):
            value = {"items": value}
        with pytest.raises(UserError, match="at most 100 levels deep"):
            asked(response_format=schema(value))

    def test_without_llguidance(self, monkeypatch):
        real = builtins.__import__

        def missing(name, *args, **kwargs):
            if name == "llguidance":
                raise ImportError
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", missing)
        asked(tools=TOOLS)
        with pytest.raises(UserError, match=r"a grammar needs llguidance, .*keye-jax\[serve\]"):
            asked(response_format={"type": "json_object"})


class TestTools:
    def test_a_call_that_must_be(self, allows):
        got = asked(tools=TOOLS, tool_choice="required")
        assert got.tool_names == ("f", 'say "hi"') and got.max_tool_calls is None
        assert all(allows(got.grammar, text) for text in (CALL, OTHER, f"{CALL}\n{OTHER}"))
        refused = (
            "",
            "hi",
            CALL + OTHER,
            CALL.replace("1", '"1"'),
            CALL.replace('"f"', '"g"'),
            "hi " + CALL,
            CALL[:-5],
        )
        assert not any(allows(got.grammar, text) for text in refused)

    def test_one_call(self, allows):
        got = asked(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        assert allows(got.grammar, OTHER) and not allows(got.grammar, f"{OTHER}\n{OTHER}") and got.max_tool_calls == 1

    def test_a_function_by_name(self, allows):
        choice = {"type": "function", "function": {"name": "f"}}
        got = asked(tools=TOOLS, tool_choice=choice, response_format=schema({"type": "integer"}))
        assert allows(got.grammar, CALL) and not any(
            allows(got.grammar, text) for text in (OTHER, f"{CALL}\n{CALL}", "7")
        )
        assert (got.tool_names, got.max_tool_calls, len(got.options["tools"])) == (("f",), 1, 2)
        flat = {"input": "hi", "tools": [{"type": "function", **TOOLS[0]["function"]}]}
        flat["tool_choice"] = {"type": "function", "name": "f"}
        assert read_responses(flat, sampling=SamplingParams()).request.tool_names == ("f",)

    def test_calls_in_place_of_an_answer_with_a_format(self, allows):
        got = asked(tools=TOOLS, response_format=schema(SCHEMA))
        assert all(allows(got.grammar, text) for text in (ANSWER, CALL, f"{CALL}\n{OTHER}"))
        assert not any(allows(got.grammar, text) for text in ("hi", ANSWER + CALL, ""))
        got = asked(tools=TOOLS, grammar='root ::= "answer"')
        assert allows(got.grammar, "answer") and allows(got.grammar, CALL)
        got = asked(tools=TOOLS, grammar='root ::= "answer"', tool_choice="none")
        assert allows(got.grammar, "answer") and not allows(got.grammar, CALL) and not got.tool_names

    def test_parameters_are_an_object(self, allows):
        tool = {"type": "function", "function": {"name": "é", "parameters": {"properties": {"x": {"type": "null"}}}}}
        grammar = asked(tools=[tool], tool_choice="required").grammar
        head = '<tool_call>\n{"name": "é", "arguments": '
        assert allows(grammar, head + '{"x": null}}\n</tool_call>') and not allows(grammar, head + "7}\n</tool_call>")
        tool["function"]["parameters"]["type"] = "array"
        with pytest.raises(UserError, match=r"tools\[0\].function.parameters.type is 'array'; it must be 'object'"):
            asked(tools=[tool], tool_choice="required")

    def test_parameters_that_cannot_be_compiled(self):
        bad = [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": {"if": {}}}}]
        assert asked(tools=bad).grammar is None
        with pytest.raises(UserError, match=r"tools\[1\].function.parameters cannot be compiled: Unimplemented keys"):
            asked(tools=bad, tool_choice="required")
