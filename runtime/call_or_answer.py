"""Which of two an answer is that a grammar holds to tool calls or to a form: calls, or text of that form.

A form can look like a call: without tags a call is JSON as well. Under such a grammar calls begin with one of a few
texts, to the letter, so the beginning decides, and an answer in the form is never taken for a call on the way. Only a
form that itself begins with such a text leaves a doubt; then it is a call. Knows nothing of tokens or HTTP.
"""

from collections.abc import Collection

from runtime.tool_formats import ToolFormat, call_head
from runtime.tool_parser import ToolCallParser, ToolPiece


class CallOrAnswerParser:
    """Finds the calls as `ToolCallParser` does, in answers that begin with a call's head; all other text is said."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._parser = ToolCallParser(form, names)
        self._heads = [call_head(form, name) for name in names]
        self._start = ""  # not yet decided
        self._is_call: bool | None = None

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._parser.num_calls

    def push(self, text: str) -> list[ToolPiece]:
        """Add text; return what is now certain."""
        if self._is_call is None:
            self._start += text
            if any(self._start.startswith(head) for head in self._heads):
                self._is_call = True
            elif not any(head.startswith(self._start) for head in self._heads):
                self._is_call = False
            else:
                return []
            text, self._start = self._start, ""
        if self._is_call:
            return self._parser.push(text)
        return [ToolPiece(text)] if text else []

    def finish(self) -> list[ToolPiece]:
        """What was held back, now that no more will come."""
        if self._is_call:
            return self._parser.finish()
        return [ToolPiece(self._start)] if self._start else []
