"""Tools of a request: which there are, which must be called, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keye_jax.engine.openai.fields import read_flag, wrong
from keye_jax.engine.openai.grammars import tool_grammar
from keye_jax.errors import UserError, shorten
from keye_jax.processor.messages import check_depth


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """How an answer may use tools.

    Attributes:
      tools: those that the prompt shows, in the shape of chat completions; none if the answer may call none.
      names: of the functions that it may call.
      most: how many calls it may have; None for any number.
      grammar: what the answer has to be; None for any text.
    """

    tools: tuple[Mapping[str, Any], ...]
    names: tuple[str, ...]
    most: int | None
    grammar: str | None


def read_tool_use(fields: Mapping[str, Any], grammar: str | None) -> ToolUse:
    """How an answer may use tools, from `tools`, `tool_choice` and `parallel_tool_calls`.

    `tool_choice` is "auto", "none", "required", or an object that names one function, which is then called once. A
    grammar for the answer applies to what it says in place of calls.

    Args:
      grammar: of the answer's text; None for any text.

    Raises:
      UserError: a value is wrong, or the parameters of a tool that must be called cannot be compiled.
    """
    tools = read_tools(fields.get("tools"))
    parallel = read_flag(fields, "parallel_tool_calls", True)
    choice = fields.get("tool_choice", "auto")
    names = tuple(tool["function"]["name"] for tool in tools)
    if isinstance(choice, Mapping):
        name = _named(choice)
        if name not in names:
            field = "tool_choice.function.name" if "function" in choice else "tool_choice.name"
            raise UserError(f"{field} is {shorten(name)}; it must be the name of a function in tools", field=field)
        return ToolUse(tools, (name,), 1, tool_grammar(tools, several=False, only=name))
    if choice == "none":
        return ToolUse((), (), None, grammar)
    if choice not in ("auto", "required"):
        raise wrong("tool_choice", choice, "'auto', 'none', 'required' or an object that names a function")
    most = None if parallel else 1
    if choice == "required":
        if not tools:
            raise UserError("tool_choice is 'required'; tools must hold a function beside it", field="tool_choice")
        return ToolUse(tools, names, most, tool_grammar(tools, several=parallel))
    if tools and grammar is not None:
        grammar = tool_grammar(tools, several=parallel, answer=grammar)
    return ToolUse(tools, names, most if tools else None, grammar)


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Descriptions of functions, in the shape of chat completions or that of the responses interface.

    Returns:
      Them in the shape of chat completions: the description is in `function`.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise wrong("tools", value, "a list of functions")
    check_depth(value, "tools")
    tools: list[Mapping[str, Any]] = []
    for index, tool in enumerate(value):
        field = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise wrong(field, tool, "an object with function.name")
        if tool.get("type", "function") != "function":
            raise wrong(f"{field}.type", tool["type"], "'function'")
        if "function" in tool:
            function, where = tool["function"], f"{field}.function"
        else:
            function, where = {name: item for name, item in tool.items() if name != "type"}, field
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise wrong(field, tool, "an object with function.name")
        if not isinstance(function.get("parameters"), Mapping | None):
            raise wrong(f"{where}.parameters", function["parameters"], "a JSON schema")
        if any(function["name"] == other["function"]["name"] for other in tools):
            raise UserError(
                f"{where}.name is {shorten(function['name'])}; it must be unlike that of every other", field=field
            )
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _named(choice: Mapping[str, Any]) -> str:
    """The function that `tool_choice` names, in either shape."""
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        raise wrong("tool_choice", choice, "'auto', 'none', 'required' or an object that names a function")
    return name
