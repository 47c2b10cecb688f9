"""The messages of a chat: roles, content and its parts, and the turns that clients send back.

A turn comes back as another server wrote it, or as the client's library keeps it, so more shapes are taken than any
server sends: assistant turns without content, calls without ids, function results by their name. Knows nothing of HTTP
or of chat templates.
"""

from collections.abc import Mapping
from typing import Any

from runtime.errors import InvalidRequest, UnsupportedField
from serve.fields.classes import MESSAGE, PART, table
from serve.fields.tables import (
    Field,
    MismatchError,
    check_value,
    described,
    note_ignored,
    one_of,
    read_fields,
    shown,
    string,
    table_schema,
)
from serve.fields.tools import any_call, any_calls, read_calls

MAX_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
RESULT_ROLES = ("tool", "function")
"""The second is OpenAI's older word."""
MAY_BE_EMPTY = ("assistant", *RESULT_ROLES)
"""Roles whose turns need no content."""
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the field that holds it."""
REASONING_NAMES = ("reasoning_content", "reasoning")
"""What clients call the reasoning of an earlier turn; it goes to the chat template."""
THOUGHT_PARTS = ("thinking", "redacted_thinking", "reasoning")
"""Types of an assistant's parts that are taken without effect: what it thought is no part of what it said."""

CONTENT_PART_FIELDS = table(PART, Field("type", string), Field("text", string), Field("refusal", string))


@described(
    anyOf=[
        {"type": "string"},
        {"type": "array", "items": {"anyOf": [{"type": "string"}, table_schema(CONTENT_PART_FIELDS)]}},
    ]
)
def _any_content(value: Any) -> Any:
    """Checked later, where the index of the message is known."""
    return value


@described(description="What an assistant thought in an earlier turn, as text; other values are without effect.")
def _reasoning(value: Any) -> Any:
    """Checked later, where the role of the message is known."""
    return value


MESSAGE_FIELDS = table(
    MESSAGE,
    Field("role", one_of(*ROLES), is_required=True),
    Field("content", _any_content),
    Field("name", string),
    Field("tool_calls", any_calls),
    Field("tool_call_id", string),
    Field("function_call", any_call),
    *(Field(name, _reasoning) for name in REASONING_NAMES),
)


@described(type="array", items=table_schema(MESSAGE_FIELDS), minItems=1, maxItems=MAX_MESSAGES)
def read_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """Messages as chat templates take them: role, content as text, and name, tool_calls or tool_call_id where they are.

    `developer` is the newer word for `system`, `function` and `function_call` are the older ones for tools.
    """
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise MismatchError(f"a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    pending: dict[str, str] = {}
    for idx, item in enumerate(value):
        path = f"messages[{idx}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{path} must be an object, got {shown(item)}", param=path)
        found = read_fields(item, MESSAGE_FIELDS, f"{path}.")
        message = _message(found, f"{path}.", idx)
        if found["role"] in RESULT_ROLES:
            message["tool_call_id"] = _answered(found, pending, f"{path}.", idx)
        elif calls := message.get("tool_calls"):
            pending = {call["id"]: call["function"]["name"] for call in calls}
        messages.append(message)
    return tuple(messages)


def _message(found: dict[str, Any], path: str, idx: int) -> dict[str, Any]:
    role = found["role"]
    message: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    calls = _calls(found, path, idx)
    if calls and role != "assistant":
        raise InvalidRequest(f"{path}tool_calls belong to the role assistant, not {role}", param=f"{path}tool_calls")
    if "content" not in found and role not in MAY_BE_EMPTY:
        raise InvalidRequest(f"{path}content is required", param=f"{path}content")
    message["content"] = _content(found["content"], f"{path}content", role) if "content" in found else ""
    if "name" in found:
        message["name"] = found["name"]
    if calls:
        message["tool_calls"] = calls
    for name in found.keys() & set(REASONING_NAMES):
        if role == "assistant" and isinstance(found[name], str):
            message[name] = check_value(found[name], string, path + name)
        else:
            note_ignored(path + name)
    return message


def _calls(found: Mapping[str, Any], path: str, idx: int) -> list[dict[str, Any]]:
    """The calls of a turn; a `function_call` is one call without an id."""
    if "function_call" in found and not found.get("tool_calls"):
        return read_calls([{"function": found["function_call"]}], f"{path}function_call", f"call_{idx}")
    return read_calls(found.get("tool_calls", []), f"{path}tool_calls", f"call_{idx}")


def _answered(found: Mapping[str, Any], pending: dict[str, str], path: str, idx: int) -> str:
    """The id of the call that a result belongs to: its own, or that of the first open call, by name if it has one.

    `pending` are the names of the calls that have no result yet, by id; the one found is taken out.
    """
    call_id = found.get("tool_call_id")
    if call_id is None:
        name = found.get("name")
        call_id = next((key for key, called in pending.items() if name in (None, called)), None)
    if call_id is None and found["role"] == "function":
        call_id = f"call_{idx}"
    if call_id is None:
        where = f"{path}tool_call_id"
        raise InvalidRequest(f"{where} is required: no call before this result is open", param=where)
    pending.pop(call_id, None)
    return str(call_id)


def _content(value: Any, path: str, role: str) -> str:
    """A string, or content parts of text, joined by newlines."""
    if not isinstance(value, list):
        return str(check_value(value, string, path))
    if not value and role not in MAY_BE_EMPTY:
        raise InvalidRequest(f"{path} must not be an empty list", param=path)
    texts = (_part(part, f"{path}[{idx}]", role) for idx, part in enumerate(value))
    return "\n".join(text for text in texts if text is not None)


def _part(part: Any, path: str, role: str) -> str | None:
    """The text of one content part; None for what an assistant thought."""
    if isinstance(part, str):
        return str(check_value(part, string, path))
    if not isinstance(part, dict):
        raise InvalidRequest(f"{path} must be an object, got {shown(part)}", param=path)
    kind = part.get("type") or "text"
    if role == "assistant" and kind in THOUGHT_PARTS:
        note_ignored(f"{path}.{kind}")
        return None
    if isinstance(kind, str) and kind not in TEXT_PARTS:
        raise UnsupportedField(
            f"{path}: content of the type {shown(kind)} is not supported, the model reads text only; "
            f"valid types: {', '.join(TEXT_PARTS)}",
            param=path,
        )
    found = read_fields(part, CONTENT_PART_FIELDS, f"{path}.")
    name = TEXT_PARTS[kind]
    if name not in found:
        raise InvalidRequest(f"{path}.{name} is required", param=f"{path}.{name}")
    return str(found[name])
