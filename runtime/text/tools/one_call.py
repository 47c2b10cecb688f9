"""A text stream that ends with its first tool call: `parallel_tool_calls: false`, where no grammar enforces it.

After every token the engine asks the stream of the request whether it is complete. So the request ends in that step,
and no tokens are generated that the client would never see. Knows nothing of HTTP.
"""

from runtime.core import TextPiece, TextStream
from runtime.text.tools.parser import ToolCallParser


class OneCallText:
    """Another stream's text, up to the end of the first call that `parser` finds in it."""

    def __init__(self, text: TextStream, parser: ToolCallParser) -> None:
        self._text = text
        self._parser = parser

    def push(self, token_id: int) -> TextPiece:
        """Add a token; return the characters that are now final, and whether a call or a stop string ends them."""
        piece = self._text.push(token_id)
        text, is_ended = self._cut(piece.text)
        return TextPiece(text, is_ended or piece.is_stopped)

    def finish(self, end_id: int | None = None) -> str:
        """The characters still held back."""
        return self._cut(self._text.finish(end_id))[0]

    def _cut(self, text: str) -> tuple[str, bool]:
        """The text up to the end of the call, and whether the call has ended."""
        for idx, char in enumerate(text):
            self._parser.push(char)
            if self._parser.num_ended:
                return text[: idx + 1], True
        return text, False
