"""Formats of tool calls: a row each, the grammar that forces calls, and a prompt for templates that know no tools.

    hermes   <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>        Hermes, Qwen 2.5, Qwen 3
    llama3   {"name": ..., "parameters": {...}}, maybe after <|python_tag|>     Llama 3.1 and later
    json     {"name": ..., "arguments": {...}}                                  models that are told to

`runtime/text/tools/parser.py` reads calls. Knows nothing of HTTP.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CALLS = 16
"""Most calls in one forced answer: a model that may always add another one might never end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way to write calls. `opening` and `closing` stand around each call; without them, a message that begins with
    a call consists of calls, and `prefix` may come first."""

    name: str
    arguments_key: str
    opening: str = ""
    closing: str = ""
    prefix: str = ""
    separator: str = "\n"


HERMES = ToolFormat(name="hermes", arguments_key="arguments", opening="<tool_call>", closing="</tool_call>")
LLAMA3 = ToolFormat(name="llama3", arguments_key="parameters", prefix="<|python_tag|>", separator="; ")
GENERIC = ToolFormat(name="json", arguments_key="arguments")
TOOL_FORMATS = {row.name: row for row in (HERMES, LLAMA3, GENERIC)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function the model may call.

    parameters: the JSON schema of its arguments, an object's
    is_strict: whether calls must follow all of it
    compiled: the part of it that a grammar can enforce, as JSON; None: all
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_strict: bool = False
    compiled: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The form that chat templates expect, which is OpenAI's."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def detect_format(template: str | None) -> ToolFormat:
    """The format that a chat template asks for; the generic one if it names none."""
    if template is None:
        return GENERIC
    if HERMES.opening in template:
        return HERMES
    if LLAMA3.prefix in template or ('"parameters"' in template and "tools" in template):
        return LLAMA3
    return GENERIC


def call_head(form: ToolFormat, name: str) -> str:
    """The text of a forced call of this function, up to its arguments."""
    before = f"{form.opening}\n" if form.opening else ""
    return f'{before}{{"name": "{name}", "{form.arguments_key}": '


def calls_grammar(form: ToolFormat, tools: Sequence[Tool], *, is_parallel: bool, start: str = "start") -> str:
    """A grammar in Lark's notation for one call of one of the tools, or for several calls. `start` is the name of its
    first rule."""
    more = f" ({_quoted(form.separator)} call){{0,{MAX_CALLS - 1}}}" if is_parallel else ""
    after = f"\n{form.closing}" if form.closing else ""
    rules = [f"{start}: call{more}", "call: " + " | ".join(f"call{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        schema = dict(tool.parameters) if tool.compiled is None else json.loads(tool.compiled)
        head = call_head(form, tool.name)
        rules.append(f"call{i}: {_quoted(head)} arguments{i} {_quoted('}' + after)}")
        rules.append(f"arguments{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def plain_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], form: ToolFormat
) -> list[dict[str, Any]]:
    """Messages for a chat template without tools: the system message explains the tools, calls become the assistant's
    text, and results become the user's."""
    plain = list(_without_calls(messages, form))
    if tools:
        told = plain.pop(0)["content"] + "\n\n" if plain and plain[0]["role"] == "system" else ""
        plain.insert(0, {"role": "system", "content": told + _explained(tools, form)})
    return plain


def _explained(tools: Sequence[Tool], form: ToolFormat) -> str:
    lines = ["You can call these functions, written as JSON:"]
    lines += [json.dumps(tool.as_json()["function"], ensure_ascii=False) for tool in tools]
    call = _written("NAME", '{"ARGUMENT": VALUE}', form)
    lines.append(f"To call one, answer with nothing but\n{call}\nOtherwise answer in plain text.")
    return "\n".join(lines)


def _without_calls(messages: Sequence[Mapping[str, Any]], form: ToolFormat) -> Iterator[dict[str, Any]]:
    names: dict[str, str] = {}
    for message in messages:
        text = message.get("content") or ""
        if message["role"] == "tool":
            name = names.get(message.get("tool_call_id", ""), message.get("name", "the function"))
            yield {"role": "user", "content": f"Result of {name}: {text}"}
            continue
        written = []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            names[call.get("id", "")] = function["name"]
            arguments = function["arguments"]  # text if the model wrote no JSON
            text_of = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            written.append(_written(function["name"], text_of, form))
        others = {key: value for key, value in message.items() if key != "tool_calls"}
        yield {**others, "content": form.separator.join([*([text] if text else []), *written])}


def _written(name: str, arguments: str, form: ToolFormat) -> str:
    call = f'{{"name": {_quoted(name)}, "{form.arguments_key}": {arguments}}}'
    return f"{form.opening}\n{call}\n{form.closing}" if form.opening else call
