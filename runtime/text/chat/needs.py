"""Finds how a chat template needs messages to differ from OpenAI's form, and adapts them.

The needs are found by rendering a short conversation when the template is loaded.

    arguments of calls    an object, or JSON text, which templates like DeepSeek's join to other text
    content beside calls  text, or none: some templates write the calls only of a message without content
    ids of calls          any, or nine letters and digits: Mistral's templates refuse others
    roles                 some templates take no system message, or only roles that alternate

Knows nothing of Jinja or tokens.
"""

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from runtime.errors import InvalidRequest

SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_LETTERS = string.ascii_letters + string.digits
_LONG_ID, _PROBE_ID = "call_0123456789abcdef01234567", "probe0123"
_NAME, _KEY, _VALUE, _SAID = "probe_function", "probe_key", "probe_value", "probe_content"
_ARGUMENTS = {_KEY: _VALUE}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], str]
"""Messages and tools to text; raises InvalidRequest where the template does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateNeeds:
    """How a template needs messages with tool calls.

    text_arguments: arguments as JSON text instead of an object
    no_call_content: None instead of empty content
    apart: a message with content and calls as two messages
    short_ids: ids of nine letters and digits
    """

    text_arguments: bool = False
    no_call_content: bool = False
    apart: bool = False
    short_ids: bool = False


NO_NEEDS = TemplateNeeds()


def probed(render: Render) -> TemplateNeeds:
    """The needs of a template; NO_NEEDS if it writes calls in no form."""
    for short_ids, text_arguments, no_call_content in product((False, True), repeat=3):
        needs = TemplateNeeds(text_arguments=text_arguments, no_call_content=no_call_content, short_ids=short_ids)
        if _writes_call(render, needs):
            if no_call_content and not _writes_call(render, needs, content=_SAID):
                return TemplateNeeds(
                    text_arguments=text_arguments, no_call_content=True, apart=True, short_ids=short_ids
                )
            return needs
    return NO_NEEDS


def _writes_call(render: Render, needs: TemplateNeeds, *, content: str = "") -> bool:
    """Whether the prompt contains a call of an earlier turn as the model would have written it."""
    function = {"name": _NAME, "arguments": _ARGUMENTS}
    call_id = _PROBE_ID if needs.short_ids else _LONG_ID
    calls = [{"id": call_id, "type": "function", "function": function}]
    conversation: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        {"role": "tool", "name": _NAME, "tool_call_id": call_id, "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    try:
        # The prompt describes the tools too, so the call must add another mention of the name.
        without = render([conversation[0]], [_TOOL])
        text = render(adapted(conversation, needs), [_TOOL])
    except InvalidRequest:
        return False
    is_python = f"'{_KEY}'" in text
    is_quoted_twice = f'\\"{_KEY}' in text
    is_whole = text.count(_VALUE) > 0 and text.count(_NAME) > without.count(_NAME) and content in text
    return is_whole and not is_python and not is_quoted_twice


def adapted(messages: Sequence[Message], needs: TemplateNeeds) -> list[dict[str, Any]]:
    """Messages as the template needs them."""
    return [changed for message in messages for changed in _adapted(message, needs)]


def _adapted(message: Message, needs: TemplateNeeds) -> Iterator[dict[str, Any]]:
    changed = dict(message)
    if needs.short_ids and isinstance(changed.get("tool_call_id"), str):
        changed["tool_call_id"] = short_id(changed["tool_call_id"])
    if calls := changed.get("tool_calls"):
        if needs.apart and changed.get("content"):
            yield {key: value for key, value in changed.items() if key != "tool_calls"}
            changed["content"] = None
        changed["tool_calls"] = [_adapted_call(call, needs) for call in calls]
        if needs.no_call_content and not changed.get("content"):
            changed["content"] = None
    yield changed


def _adapted_call(call: Message, needs: TemplateNeeds) -> dict[str, Any]:
    changed = dict(call)
    if needs.short_ids and isinstance(changed.get("id"), str):
        changed["id"] = short_id(changed["id"])
    arguments = changed["function"].get("arguments")
    if needs.text_arguments and not isinstance(arguments, str):
        text = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
        changed["function"] = {**changed["function"], "arguments": text}
    return changed


def short_id(call_id: str) -> str:
    """An id of nine letters and digits: the id itself if it is one, else its hash."""
    if SHORT_ID.fullmatch(call_id):
        return call_id
    number = int.from_bytes(hashlib.blake2b(call_id.encode(errors="surrogatepass"), digest_size=16).digest())
    return "".join(_LETTERS[number // len(_LETTERS) ** place % len(_LETTERS)] for place in range(9))


def milder_forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The conversation for a template that refuses it: first with neighbours of the same role joined, then also with
    system messages moved into the user's. No text is left out."""
    yield _joined(messages)
    yield _joined(_without_system(messages))


def _joined(messages: Sequence[Message]) -> list[dict[str, Any]]:
    joined: list[dict[str, Any]] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is not None and last["role"] == message["role"] and _is_plain(last) and _is_plain(message):
            last["content"] = f"{last['content']}\n\n{message['content']}"
        else:
            joined.append(dict(message))
    return joined


def _is_plain(message: Message) -> bool:
    return message["role"] != "tool" and isinstance(message.get("content"), str) and not message.get("tool_calls")


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """System messages as the user's: each at the beginning of the next user message, or one of its own at the end."""
    return [{**message, "role": "user"} if message["role"] == "system" else message for message in messages]
