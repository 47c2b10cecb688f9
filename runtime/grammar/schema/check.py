"""Validates a complete answer against its whole JSON schema, where the grammar could not enforce all of it.

`jsonschema` does the work. A client chooses the schema and can steer the answer, so the work ends after `CHECK_S`:
between two keywords, and inside a pattern. That is why patterns run in the `regex` package (Python's own `re` cannot be
stopped, and RE2 has no look-around). Keywords that `jsonschema` checks in quadratic time are replaced.
Knows nothing of HTTP.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple, Protocol

from runtime.core import LateCheck
from runtime.grammar.schema.disjoint import json_key
from runtime.grammar.schema.formats import format_checker
from runtime.grammar.schema.pattern_parser import PatternError
from runtime.grammar.schema.patterns import translate_pattern

CHECK_S = 1.0
"""Ordinary answers take milliseconds."""
MAX_PROBLEMS = 3
MAX_MESSAGE_CHARS = 200


class Outcome(StrEnum):
    """The outcome of a check. NOT_DONE: the answer is incomplete, or the check took too long."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_DONE = "not_done"


class CheckResult(NamedTuple):
    """problems: the first few, each with its place in the answer as a JSON pointer."""

    outcome: Outcome
    problems: tuple[str, ...] = ()


NOT_DONE = CheckResult(Outcome.NOT_DONE)


class _TooLongError(Exception):
    """The check's time is up."""


class _Validator(Protocol):
    """The part of a `jsonschema` validator that this module uses."""

    def is_valid(self, instance: Any) -> bool: ...
    def descend(self, instance: Any, schema: Any, path: Any = None) -> Iterable[Any]: ...
    def evolve(self, **changes: Any) -> "_Validator": ...
    def iter_errors(self, instance: Any) -> Iterator[Any]: ...


Keyword = Callable[[_Validator, Any, Any, Any], Iterable[Any] | None]


def check_answer(check: LateCheck, text: str, *, limit_s: float = CHECK_S) -> CheckResult:
    """Check the text of an answer, or of a call's arguments. Takes `limit_s` seconds at most; raises nothing."""
    try:
        answer = json.loads(text)
        validator = _make_validator(json.loads(check.schema), time.monotonic() + limit_s)
        problems = []
        for error in validator.iter_errors(answer):
            where = "".join(f"/{str(name).replace('~', '~0').replace('/', '~1')}" for name in error.absolute_path)
            problems.append(f"{where[:MAX_MESSAGE_CHARS] or '(whole)'}: {error.message[:MAX_MESSAGE_CHARS]}")
            if len(problems) == MAX_PROBLEMS:
                break
    except (ValueError, ArithmeticError, RecursionError, TimeoutError, _TooLongError, PatternError):
        return NOT_DONE
    return CheckResult(Outcome.FAILED if problems else Outcome.PASSED, tuple(problems))


def _make_validator(schema: Any, deadline: float) -> _Validator:
    from jsonschema import Draft7Validator, Draft202012Validator, validators

    matcher = _Patterns(schema, deadline)
    keywords: dict[str, Any] = {
        **Draft202012Validator.VALIDATORS,
        "dependencies": Draft7Validator.VALIDATORS["dependencies"],
        "pattern": matcher.pattern,
        "patternProperties": matcher.pattern_properties,
        "additionalProperties": matcher.additional_properties,
        "unevaluatedProperties": matcher.unevaluated_properties,
        "uniqueItems": _unique_items,
        "multipleOf": _multiple_of,
    }
    timed = {name: _timed(keyword, deadline) for name, keyword in keywords.items()}
    extend: Any = validators.extend
    validator: _Validator = extend(Draft202012Validator, timed)(schema, format_checker=format_checker(matcher.matches))
    return validator


def _timed(keyword: Keyword, deadline: float) -> Keyword:
    """The same keyword, which raises _TooLongError after `deadline`."""

    def check(validator: _Validator, value: Any, instance: Any, schema: Any) -> Iterable[Any]:
        if time.monotonic() > deadline:
            raise _TooLongError
        return keyword(validator, value, instance, schema) or ()

    return check


def _error(message: str) -> Any:
    from jsonschema import ValidationError

    return ValidationError(message)


class _Patterns:
    """The keywords that match patterns."""

    def __init__(self, root: Any, deadline: float) -> None:
        self._root = root
        self._deadline = deadline
        self._compile = cache(_compiled)

    def matches(self, pattern: str, text: str) -> bool:
        """Whether a text contains a match of a pattern."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise _TooLongError
        return self._compile(pattern).search(text, timeout=left_s) is not None

    def pattern(self, validator: _Validator, pattern: str, instance: Any, _: Any) -> Iterator[Any]:
        if isinstance(instance, str) and not self.matches(pattern, instance):
            yield _error(f"{instance!r} does not match {pattern!r}")

    def pattern_properties(
        self, validator: _Validator, patterns: Mapping[str, Any], instance: Any, _: Any
    ) -> Iterator[Any]:
        if isinstance(instance, dict):
            for pattern, schema in patterns.items():
                for name, item in instance.items():
                    if self.matches(pattern, name):
                        yield from validator.descend(item, schema, path=name)

    def additional_properties(
        self, validator: _Validator, value: Any, instance: Any, schema: Mapping[str, Any]
    ) -> Iterator[Any]:
        if isinstance(instance, dict):
            for name in instance.keys() - schema.get("properties", {}).keys():
                if not self._has_match(schema, name):
                    if value is False:
                        yield _error(f"{name!r} is not one of its properties")
                    else:
                        yield from validator.descend(instance[name], value, path=name)

    def _has_match(self, schema: Mapping[str, Any], name: str) -> bool:
        return any(self.matches(pattern, name) for pattern in schema.get("patternProperties", ()))

    def unevaluated_properties(
        self, validator: _Validator, value: Any, instance: Any, schema: Mapping[str, Any]
    ) -> Iterator[Any]:
        if isinstance(instance, dict):
            others = {name: item for name, item in schema.items() if name != "unevaluatedProperties"}
            for name in instance.keys() - self._evaluated(validator, instance, others):
                if value is False:
                    yield _error(f"{name!r} is not one of its properties")
                else:
                    yield from validator.descend(instance[name], value, path=name)

    def _evaluated(self, validator: _Validator, instance: dict[str, Any], schema: Any) -> set[str]:
        """Names of properties that some keyword of a schema, which the instance satisfies, has evaluated."""
        if isinstance(schema, bool):
            return set()
        if time.monotonic() > self._deadline:
            raise _TooLongError
        if "additionalProperties" in schema or "unevaluatedProperties" in schema:
            return set(instance)
        found = {name for name in instance if name in schema.get("properties", {}) or self._has_match(schema, name)}
        for inner in self._applied(validator, instance, schema):
            found |= self._evaluated(validator, instance, inner)
        return found

    def _applied(self, validator: _Validator, instance: Any, schema: Mapping[str, Any]) -> Iterator[Any]:
        """The subschemas that apply to the same instance and that it satisfies."""
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/$defs/")
            yield self._root if name == "#" else self._root["$defs"][name]
        needed = schema.get("dependentSchemas", {})
        tried = [needed[name] for name in instance if name in needed]
        for keyword in ("allOf", "anyOf", "oneOf"):
            tried += schema.get(keyword, ())
        if "if" in schema:
            holds = validator.evolve(schema=schema["if"]).is_valid(instance)
            tried += [schema["if"], schema.get("then", True)] if holds else [schema.get("else", True)]
        for inner in tried:
            if validator.evolve(schema=inner).is_valid(instance):
                yield inner


def _compiled(pattern: str) -> Any:
    import regex

    try:
        return regex.compile(translate_pattern(pattern).whole)
    except regex.error as error:  # a Unicode property that the package does not know
        raise PatternError(str(error)) from None


def _unique_items(validator: _Validator, value: Any, instance: Any, _: Any) -> Iterator[Any]:
    """`uniqueItems` in linear time: `jsonschema` compares all pairs of items that are objects."""
    if value and isinstance(instance, list) and len(set(map(json_key, instance))) < len(instance):
        yield _error("its items are not all different")


def _multiple_of(validator: _Validator, step: Any, instance: Any, _: Any) -> Iterator[Any]:
    """`multipleOf` in decimals: as floats, 0.3 is not a multiple of 0.1."""
    is_number = isinstance(instance, int | float) and not isinstance(instance, bool)
    if is_number and Fraction(str(instance)) % Fraction(str(step)):
        yield _error(f"{instance} is not a multiple of {step}")
