"""Answers that are tool calls or follow a `response_format`: one grammar for both, and a parser that tells them apart.

An answer in the form may look like a call: without tags a call is JSON as well. But under this grammar every call
begins with one of a few exact texts, so the beginning decides. A form that itself begins with such a text is read as a
call. Knows nothing of tokens or HTTP.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar.notation import to_lark
from runtime.text.tools.formats import Tool, ToolFormat, call_head, calls_grammar
from runtime.text.tools.parser import ToolCallParser, ToolPiece

MAX_GBNF_CHARS = 4_000
"""Longest grammar in llama.cpp's notation beside tools. Its translation, on the request's thread, takes quadratic
time."""


def calls_or(answer: Constraint, form: ToolFormat, tools: Sequence[Tool], *, is_parallel: bool) -> Constraint:
    """The constraint for an answer that is either calls of the tools or what `answer` allows. InvalidRequest for a
    grammar in llama.cpp's notation that is too long or cannot be read."""
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
    except Exception as error:  # the readers raise anything
        message = f"{answer.param}: the {answer.kind} cannot be read: {error}"[:400]
        raise InvalidRequest(message, param=answer.param) from None


class CallOrAnswerParser:
    """Finds calls as `ToolCallParser` does, in answers that begin with the head of a call; other answers are text."""

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
        """The rest that was held back, at the end of the answer."""
        if self._is_call:
            return self._parser.finish()
        return [ToolPiece(self._start)] if self._start else []
