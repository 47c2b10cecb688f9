"""Tool calls in replies: from the text of a choice to the deltas of a stream, and from those to a message.

Knows OpenAI's shapes; finding the calls is `runtime/tool_parser.py`'s.
"""

import uuid
from collections.abc import Collection, Iterator
from typing import Any

from runtime.call_or_answer import CallOrAnswerParser
from runtime.core import FinishReason, TokenEvent
from runtime.tool_formats import ToolFormat
from runtime.tool_parser import ToolCallParser, ToolPiece

Json = dict[str, Any]
TOOL_CALLS = "tool_calls"
"""The finish reason of an answer that calls."""


class ToolDeltas:
    """The deltas of one choice. Feed it every event; at the last it says what was held back."""

    def __init__(self, form: ToolFormat, names: Collection[str], *, may_answer: bool = False) -> None:
        """`may_answer`: a grammar held the answer to calls or to a form."""
        self._parser = CallOrAnswerParser(form, names) if may_answer else ToolCallParser(form, names)

    def of(self, event: TokenEvent) -> Iterator[Json]:
        """Deltas for one event, in order."""
        pieces = self._parser.push(event.text)
        if event.finish_reason is not None:
            pieces += self._parser.finish()
        for piece in pieces:
            yield {"content": piece.text} if piece.call_idx is None else {"tool_calls": [_call(piece)]}

    def finish_reason(self, reason: FinishReason) -> str:
        """The reason as a client is told: an answer that ended by itself and has calls ended for them."""
        return TOOL_CALLS if self._parser.num_calls and reason is FinishReason.STOP else reason.value


def _call(piece: ToolPiece) -> Json:
    if piece.name is None:
        return {"index": piece.call_idx, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": ""}
    return {"index": piece.call_idx, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def add_delta(message: Json, delta: Json) -> None:
    """Grow a whole message by one delta of its stream."""
    message["content"] += delta.get("content", "")
    for part in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if part["index"] == len(calls):
            calls.append({key: part[key] for key in ("id", "type", "function")})
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]


def close_message(message: Json) -> None:
    """A message that only calls has no content."""
    if message.get("tool_calls") and not message["content"]:
        message["content"] = None
