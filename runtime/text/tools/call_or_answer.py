"""Answers that are tool calls or have a form, as `tools` together with `response_format` ask: one grammar of both, and
which of the two an answer is.

A form can look like a call: without tags a call is JSON as well. Under such a grammar calls begin with one of a few
texts, to the letter, so the beginning decides, and an answer in the form is never taken for a call on the way. Only a
form that itself begins with such a text leaves a doubt; then it is a call. Knows nothing of tokens or HTTP.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar.notation import to_lark
from runtime.text.tools.formats import Tool, ToolFormat, call_head, calls_grammar
from runtime.text.tools.parser import ToolCallParser, ToolPiece

MAX_GBNF_CHARS = 4_000
"""Longest grammar in llama.cpp's notation beside tools. It is translated on the thread of the request, in a time that
grows with the square of its length."""


def calls_or(answer: Constraint, form: ToolFormat, tools: Sequence[Tool], *, is_parallel: bool) -> Constraint:
    """What holds an answer to calls of the tools, or else to the form that `answer` says. InvalidRequest for a grammar
    in llama.cpp's notation that is too long or cannot be read."""
    calls = calls_grammar(form, tools, is_parallel=is_parallel, start="calls")
    # A grammar within a grammar: its rules may have the names of ours.
    source = f"start: calls | answer\n{calls}\nanswer: %lark {{\n{_in_lark(answer)}\n}}"
    return replace(answer, kind=ConstraintKind.GRAMMAR, source=source)


def _in_lark(answer: Constraint) -> str:
    """A form in Lark's notation."""
    num_chars = len(answer.source)
    if answer.kind is ConstraintKind.GRAMMAR and "::=" in answer.source and num_chars > MAX_GBNF_CHARS:
        raise InvalidRequest(
            f"{answer.param} has {num_chars:,} characters; together with tools a grammar in llama.cpp's notation may "
            f"have {MAX_GBNF_CHARS:,}, and one in Lark's 100,000",
            param=answer.param,
        )
    try:
        return to_lark(answer.kind.value, answer.source)
    except Exception as error:  # whatever the readers stumble over
        message = f"{answer.param}: the {answer.kind} cannot be read: {error}"[:400]
        raise InvalidRequest(message, param=answer.param) from None


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
