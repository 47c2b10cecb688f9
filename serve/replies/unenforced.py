"""What a reply says about the parts of a JSON schema that a grammar cannot enforce.

The header `X-Headrace-Unenforced` lists them. Each complete choice is checked against the whole schema; the result is
`schema_check` in its last chunk, and a header of a reply that is not streamed. OpenAI's clients keep unknown fields.
Knows the shapes of OpenAI's chunks, nothing of Flask.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from runtime.core import FinishReason, LateCheck
from runtime.grammar.schema.check import CheckResult, Outcome, check_answer
from serve.replies.tools import TOOL_CALLS

Json = dict[str, Any]
UNENFORCED_HEADER = "X-Headrace-Unenforced"
CHECK_HEADER = "X-Headrace-Schema-Check"
MAX_HEADER_CHARS = 2000
"""Proxies refuse headers of more than about 8 kB in all."""
COMPLETE = (FinishReason.STOP.value, TOOL_CALLS)
WORST_FIRST = (Outcome.FAILED, Outcome.NOT_DONE, Outcome.PASSED)


def unenforced(checks: Sequence[LateCheck]) -> str | None:
    """The header's value: JSON pointers to keywords, after `NAME:` for a tool's parameters. None: no header.

    Other characters are percent-encoded. Pointers that do not fit are only counted.
    """
    places = [f"{check.tool}:{place}" if check.tool else place for check in checks for place in check.left_out]
    total = sum(check.num_left_out for check in checks)
    shown: list[str] = []
    num_chars = 0
    for place in places:
        text = quote(place, safe="/:$~@!*()'")
        num_chars += len(text) + 2
        if num_chars > MAX_HEADER_CHARS:
            break
        shown.append(text)
    more = [f"and {total - len(shown)} more"] if total > len(shown) else []
    return ", ".join([*shown, *more]) or None


class AnswerChecks:
    """The late checks of one request. Pass every choice of every chunk to `see`; it adds the result to the last one."""

    def __init__(self, checks: Sequence[LateCheck]) -> None:
        self._checks = {check.tool: check for check in checks}
        self._texts: dict[int, str] = {}
        self._calls: dict[int, list[tuple[str, list[str]]]] = {}
        self.outcomes: list[Outcome] = []
        """One for each complete choice that had something to check."""

    @property
    def worst(self) -> Outcome | None:
        """The outcome of the whole reply."""
        return next((outcome for outcome in WORST_FIRST if outcome in self.outcomes), None)

    def see(self, choice: Json) -> None:
        """Add a chunk's part of its choice."""
        if not self._checks:
            return
        delta = choice.get("delta", choice)
        idx = choice["index"]
        self._texts[idx] = self._texts.get(idx, "") + (delta.get("text") or delta.get("content") or "")
        calls = self._calls.setdefault(idx, [])
        for part in delta.get("tool_calls") or ():
            if part["index"] == len(calls):
                calls.append((part["function"]["name"], []))
            calls[part["index"]][1].append(part["function"]["arguments"])
        if choice["finish_reason"] is not None:
            self._end(choice, calls)

    def _end(self, choice: Json, calls: Sequence[tuple[str, list[str]]]) -> None:
        due = [(self._checks[name], "".join(pieces)) for name, pieces in calls if name in self._checks]
        if not calls and None in self._checks:
            due = [(self._checks[None], self._texts[choice["index"]])]
        if not due:
            return
        is_complete = choice["finish_reason"] in COMPLETE
        results = [check_answer(*pair) if is_complete else CheckResult(Outcome.NOT_DONE) for pair in due]
        found = {result.outcome for result in results}
        outcome = next(outcome for outcome in WORST_FIRST if outcome in found)
        self.outcomes.append(outcome)
        choice["schema_check"] = {
            "outcome": outcome.value,
            "problems": [problem for result in results for problem in result.problems],
        }
