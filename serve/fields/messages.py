"""The messages of a chat: roles, content and its parts, and the turns that clients send back.

A turn comes back as another server wrote it, or as the client's library keeps it. So this accepts more shapes than any
server sends: assistant turns without content, calls without ids, results with a function's name only. Knows nothing of
HTTP or of chat templates.
"""

from collections.abc import Mapping
from typing import Any

from runtime.errors import InvalidRequest, UnsupportedField
from serve.fields.checks import Json, MismatchError, described, one_of, shown, string
from serve.fields.foreign import MESSAGE, PART, table
from serve.fields.reading import (
    Field,
    at_path,
    check_value,
    fields_of,
    note_ignored,
    read_fields,
    table_schema,
)
from serve.fields.tools import called_function, calls

MAX_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
RESULT_ROLES = ("tool", "function")
"""`function` is OpenAI's older word."""
MAY_BE_EMPTY = ("assistant", *RESULT_ROLES)
"""Roles whose turns need no content."""
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The field that holds the text, by type of content part."""
REASONING_NAMES = ("reasoning_content", "reasoning")
"""What clients call the reasoning of an earlier turn; it goes to the chat template."""
THOUGHT_PARTS = ("thinking", "redacted_thinking", "reasoning")
"""Types of an assistant's content parts that are ignored: thoughts are not part of the answer."""

CONTENT_PART_FIELDS = table(PART, Field("type", string), Field("text", string), Field("refusal", string))


@described(
    anyOf=[
        {"type": "string"},
        {"type": "array", "items": {"anyOf": [{"type": "string"}, table_schema(CONTENT_PART_FIELDS)]}},
    ]
)
def _any_content(value: Any) -> Any:
    """Checked in `_message`, which knows the role."""
    return value


@described(description="The reasoning of an assistant's earlier turn, as text; other values are ignored.")
def _reasoning(value: Any) -> Any:
    """Checked in `_message`, which knows the role."""
    return value


MESSAGE_FIELDS = table(
    MESSAGE,
    Field("role", one_of(*ROLES), is_required=True),
    Field("content", _any_content),
    Field("name", string),
    Field("tool_calls", calls),
    Field("tool_call_id", string),
    Field("function_call", called_function),
    *(Field(name, _reasoning) for name in REASONING_NAMES),
)
_message_fields = fields_of(MESSAGE_FIELDS)


@at_path(type="array", items=table_schema(MESSAGE_FIELDS), minItems=1, maxItems=MAX_MESSAGES)
def read_messages(value: Any, path: str = "messages") -> tuple[Json, ...]:
    """Messages for a chat template: role, content as text, and name, tool_calls, tool_call_id if they are given.

    `developer` is the newer word for `system`; `function` and `function_call` are the older words for tools.
    """
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise MismatchError(f"a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    pending: dict[str, str] = {}
    for idx, item in enumerate(value):
        found = check_value(item, _message_fields, f"{path}[{idx}]")
        message = _message(found, f"{path}[{idx}].", idx)
        if found["role"] in RESULT_ROLES:
            message["tool_call_id"] = _answered(found, pending, f"{path}[{idx}].", idx)
        elif made := message.get("tool_calls"):
            pending = {call["id"]: call["function"]["name"] for call in made}
        messages.append(message)
    return tuple(messages)


def _message(found: Json, path: str, idx: int) -> Json:
    role = found["role"]
    message: Json = {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    made = _calls(found, idx)
    if made and role != "assistant":
        raise InvalidRequest(f"{path}tool_calls belong to the role assistant, not {role}", param=f"{path}tool_calls")
    if "content" not in found and role not in MAY_BE_EMPTY:
        raise InvalidRequest(f"{path}content is required", param=f"{path}content")
    message["content"] = _content(found["content"], f"{path}content", role) if "content" in found else ""
    if "name" in found:
        message["name"] = found["name"]
    if made:
        message["tool_calls"] = made
    for name in found.keys() & set(REASONING_NAMES):
        if role == "assistant" and isinstance(found[name], str):
            message[name] = check_value(found[name], string, path + name)
        else:
            note_ignored(path + name)
    return message


def _calls(found: Json, idx: int) -> list[Json]:
    """The calls of a turn, each with an id. A `function_call` is one call."""
    made = found.get("tool_calls", [])
    if not made and "function_call" in found:
        made = [{"function": found["function_call"]}]
    return [
        {"id": call.get("id") or f"call_{idx}_{number}", "type": "function", "function": call["function"]}
        for number, call in enumerate(made)
    ]


def _answered(found: Mapping[str, Any], pending: dict[str, str], path: str, idx: int) -> str:
    """The id of the call that a result answers: its own id, else the first open call, with the result's name if it has
    one.

    `pending` has the function names of the open calls by their ids. The answered call is removed.
    """
    call_id = found.get("tool_call_id")
    if call_id is None:
        name = found.get("name")
        call_id = next((key for key, called in pending.items() if name in (None, called)), None)
    if call_id is None and found["role"] == "function":
        call_id = f"call_{idx}"
    if call_id is None:
        where = f"{path}tool_call_id"
        raise InvalidRequest(f"{where} is required: no earlier call waits for a result", param=where)
    pending.pop(call_id, None)
    return str(call_id)


def _content(value: Any, path: str, role: str) -> str:
    """A string, or the texts of content parts, joined by newlines."""
    if not isinstance(value, list):
        return str(check_value(value, string, path))
    if not value and role not in MAY_BE_EMPTY:
        raise InvalidRequest(f"{path} must not be an empty list", param=path)
    texts = (_part(part, f"{path}[{idx}]", role) for idx, part in enumerate(value))
    return "\n".join(text for text in texts if text is not None)


def _part(part: Any, path: str, role: str) -> str | None:
    """The text of one content part; None for an assistant's thoughts."""
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
