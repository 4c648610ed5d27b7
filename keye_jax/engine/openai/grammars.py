"""What an answer has to be: grammars from `response_format`, from `grammar`, and from tools that must be called.

A grammar is a string of llguidance (https://github.com/guidance-ai/llguidance), which is imported when one is needed.
JSON has no white space between its tokens, so that an answer cannot fill itself with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from keye_jax.engine.openai.fields import read_object, wrong
from keye_jax.engine.text import END_TOOL_CALL, TOOL_CALL
from keye_jax.errors import UserError
from keye_jax.processor.messages import check_depth

_FORMATS = ("text", "json_object", "json_schema")
_GRAMMARS = ("lark", "gbnf", "regex", "json_schema")
# In JSON of an answer, and in that of a tool call, which chat templates write as Python does.
_COMPACT = {"whitespace_flexible": False}
_SPACED = {**_COMPACT, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT = {"type": "object"}
# A function without `parameters` takes none.
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def read_grammar(fields: Mapping[str, Any]) -> str | None:
    """The grammar that `response_format` or `grammar` asks for; None for any text.

    `response_format` has the type "text", "json_object" (any object) or "json_schema". `grammar` is a text in Lark's
    or in GBNF's syntax, or an object of `type` ("lark", "gbnf", "regex" or "json_schema") and `value`. It cannot name
    control tokens.

    Raises:
      UserError: the value is wrong, a schema or grammar cannot be compiled, both are given, or llguidance is missing.
    """
    format_grammar = read_format(read_object(fields, "response_format"), "response_format")
    if fields.get("grammar") is None:
        return format_grammar
    if format_grammar is not None:
        raise UserError("grammar is given beside response_format; a request must have one of both", field="grammar")
    return _read_own(fields["grammar"])


def read_format(form: Mapping[str, Any], field: str) -> str | None:
    """The grammar of a response format; an empty one is text.

    The schema is in `json_schema`, as in chat completions, or beside the type, as in the responses interface.
    """
    kind = form.get("type", "text")
    if not form or kind == "text":
        return None
    if kind not in _FORMATS:
        raise wrong(f"{field}.type", kind, f"one of {', '.join(_FORMATS)}")
    if kind == "json_object":
        return _from_schema(_ANY_OBJECT, field)
    if "json_schema" in form:
        form, field = form["json_schema"], f"{field}.json_schema"
        if not isinstance(form, Mapping):
            raise wrong(field, form, "an object with schema")
    return _from_schema(form.get("schema"), f"{field}.schema")


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], *, several: bool, only: str | None = None, answer: str | None = None
) -> str:
    """The grammar of calls of tools, as chat templates write them.

    Args:
      tools: descriptions of functions in the shape of chat completions, at least one.
      several: whether there may be more than one call.
      only: the name of the only function that may be called; None for any.
      answer: a grammar of text that may stand in place of the calls.

    Raises:
      UserError: the parameters of a tool cannot be compiled, or llguidance is missing.
    """
    rules = ["start: answer | calls" if answer else "start: calls"]
    rules.append('calls: call ("\\n" call)*' if several else "calls: call")
    functions = [(index, tool["function"]) for index, tool in enumerate(tools)]
    functions = [(index, function) for index, function in functions if only in (None, function["name"])]
    names = " | ".join(f"tool_{index}" for index, _ in functions)
    rules.append(f'call: {TOOL_CALL} "\\n" ({names}) "\\n" {END_TOOL_CALL}')
    for index, function in functions:
        field = f"tools[{index}].function.parameters"
        parameters = _NO_PARAMETERS if function.get("parameters") is None else function["parameters"]
        schema = {**_ANY_OBJECT, **_checked(parameters, field)}
        if schema["type"] != "object":
            raise wrong(f"{field}.type", schema["type"], "'object'")
        _from_schema(schema, field)
        name = json.dumps(function["name"], ensure_ascii=False)
        head = json.dumps(f'{{"name": {name}, "arguments": ', ensure_ascii=False)
        rules.append(f'tool_{index}: {head} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {json.dumps({**schema, 'x-guidance': _SPACED})}")
    if answer is None:
        return _valid(_from_lark("\n".join(rules)), "tools")
    # Each grammar of the list starts at its own rule; `@answer` is the start of the one with that name.
    main = {"name": "main", "lark_grammar": "\n".join([rules[0].replace("answer", "@answer"), *rules[1:]])}
    return _valid(json.dumps({"grammars": [main, {**json.loads(answer)["grammars"][0], "name": "answer"}]}), "tools")


def _read_own(value: Any) -> str:
    """The grammar in the field `grammar`."""
    kind, text, field = "gbnf", value, "grammar"
    if isinstance(value, Mapping):
        kind, text, field = value.get("type"), value.get("value"), "grammar.value"
        if kind not in _GRAMMARS:
            raise wrong("grammar.type", kind, f"one of {', '.join(_GRAMMARS)}")
    if kind == "json_schema":
        return _from_schema(text, field)
    if not isinstance(text, str) or not text:
        raise wrong(field, text, "a grammar as text" + ("" if field == "grammar.value" else ", or an object"))
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
        raise wrong(field, text, "a text that UTF-8 has") from error
    matcher = _llguidance()
    if kind == "regex":
        return _valid(matcher.grammar_from_regex(text), field)
    if kind == "gbnf":
        from llguidance import grammar_from

        try:
            text = grammar_from("gbnf", text)  # it takes Lark's syntax too
        except (ValueError, RecursionError) as error:
            raise UserError(f"{field} cannot be compiled: {_line(str(error))}", field=field) from error
    return _valid(_from_lark(text), field)


def _from_lark(text: str) -> str:
    # As JSON, like the others, so that each can be a part of another.
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _from_schema(schema: Any, field: str) -> str:
    options = {**_checked(schema, field), "x-guidance": _COMPACT}
    return _valid(json.dumps({"grammars": [{"json_schema": options}]}), field)


def _checked(schema: Any, field: str) -> Mapping[str, Any]:
    """A JSON schema that is an object, and not too deep."""
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise wrong(field, schema, "a JSON schema")
    check_depth(schema, field)
    return schema


def _valid(grammar: str, field: str) -> str:
    """A grammar that was checked."""
    failed, messages = _llguidance().validate_grammar_with_warnings(grammar)
    if failed:
        raise UserError(f"{field} cannot be compiled: {_line(messages[0])}", field=field)
    if field.startswith("grammar") and any("no tokenizer" in message for message in messages):
        raise UserError(f"{field} names a control token; it must be made of text", field=field)
    return grammar


def _line(message: str) -> str:
    """What a message of llguidance says, in one line of at most 300 characters."""
    text = " ".join(message.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _llguidance() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise UserError(
            "a grammar needs llguidance, which is not installed; pip install 'keye-jax[serve]' installs it"
        ) from error
    return LLMatcher
