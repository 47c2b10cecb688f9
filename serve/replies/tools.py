"""Tool calls in replies: from the text of a choice to the deltas of a stream.

Knows OpenAI's shapes. `runtime/text/tools/parser.py` finds the calls.
"""

import uuid
from collections.abc import Collection, Iterator
from typing import Any

from runtime.core import FinishReason, TokenEvent
from runtime.text.tools.call_or_answer import CallOrAnswerParser
from runtime.text.tools.formats import ToolFormat
from runtime.text.tools.parser import ToolCallParser, ToolPiece

Json = dict[str, Any]
SHORT_ID_LEN = 9
"""The length of Mistral's call ids."""
TOOL_CALLS = "tool_calls"
"""The finish reason of an answer with calls."""


class ToolDeltas:
    """The deltas of one choice. Pass every event to `of`; the last one releases text that was held back."""

    def __init__(
        self, form: ToolFormat, names: Collection[str], *, may_answer: bool = False, has_short_ids: bool = False
    ) -> None:
        """`may_answer`: a grammar allows calls or a form of the answer. `has_short_ids`: the chat template accepts only
        ids of nine letters and digits."""
        self._parser = CallOrAnswerParser(form, names) if may_answer else ToolCallParser(form, names)
        self._has_short_ids = has_short_ids

    def of(self, event: TokenEvent) -> Iterator[Json]:
        """The deltas for one event."""
        pieces = self._parser.push(event.text)
        if event.finish_reason is not None:
            pieces += self._parser.finish()
        for piece in pieces:
            yield {"content": piece.text} if piece.call_idx is None else {"tool_calls": [self._call(piece)]}

    def finish_reason(self, reason: FinishReason) -> str:
        """The client's finish reason: `tool_calls` for an answer that stopped by itself and has calls."""
        return TOOL_CALLS if self._parser.num_calls and reason is FinishReason.STOP else reason.value

    def _call(self, piece: ToolPiece) -> Json:
        if piece.name is None:
            return {"index": piece.call_idx, "function": {"arguments": piece.arguments}}
        random = uuid.uuid4().hex
        call_id = random[:SHORT_ID_LEN] if self._has_short_ids else f"call_{random[:24]}"
        function = {"name": piece.name, "arguments": ""}
        return {"index": piece.call_idx, "id": call_id, "type": "function", "function": function}
