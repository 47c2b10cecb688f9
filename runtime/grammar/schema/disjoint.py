"""Whether two JSON schemas exclude each other, so that `oneOf` may be read as `anyOf`.

Says yes only where it is certain: different types, different constants, or a required property that excludes the other
schema (the discriminator of a union). Follows references, which the compiler does not.
Schemas are those of `runtime/grammar/schema/repair.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime.grammar.schema.repair import TYPES, Schema

MAX_STEPS = 50_000
"""Comparisons for all unions of one request: some 50 ms."""
MAX_LEVELS = 8
MAX_TYPE_LEVELS = 3
ALL_TYPES = frozenset(TYPES) - {"integer"}


def json_key(value: Any) -> Any:
    """A hashable key that is equal for equal JSON values: 1 equals 1.0, and not true."""
    if isinstance(value, dict):
        return ("object", frozenset((name, json_key(item)) for name, item in value.items()))
    if isinstance(value, list):
        return ("array", tuple(json_key(item) for item in value))
    return (type_of(value), value)


def type_of(value: Any) -> str:
    """The JSON type of a value; "number" for whole numbers."""
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


class Disjointness:
    """Compares the schemas of one document, within a budget of steps."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions
        self._num_steps = 0
        self._keys: dict[int, list[frozenset[Any]]] = {}

    def is_exclusive(self, options: Sequence[Schema], outer: Schema) -> bool:
        """Whether no value satisfies two of the options. All values satisfy `outer`, which narrows their types."""
        types = _types(outer)
        return all(
            self._are_disjoint(first, second, types, 0)
            for idx, first in enumerate(options)
            for second in options[idx + 1 :]
        )

    def types_of(self, schema: Schema, level: int = 0) -> frozenset[str]:
        """The types that values of a schema can have, as far as a short search shows. Whole numbers are numbers."""
        found = _types(schema)
        self._num_steps += 1
        if isinstance(schema, bool) or level > MAX_TYPE_LEVELS or self._num_steps > MAX_STEPS:
            return found
        for item in (*schema.get("allOf", ()), *self._target(schema)):
            found &= self.types_of(item, level + 1)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                found &= frozenset().union(*(self.types_of(item, level + 1) for item in schema[keyword]))
        return found

    def _target(self, schema: dict[str, Any]) -> list[Schema]:
        """The target of a schema's `$ref` in a list, which is empty without one."""
        name = schema.get("$ref", "").removeprefix("#/$defs/")
        return [self._definitions[name]] if name in self._definitions else []

    def _are_disjoint(self, first: Schema, second: Schema, among: frozenset[str], level: int) -> bool:
        """Whether no value of the types `among` satisfies both."""
        self._num_steps += 1
        if first is False or second is False:
            return True
        if self._num_steps > MAX_STEPS or level > MAX_LEVELS or first is True or second is True:
            return False
        common = among & _types(first) & _types(second)
        if not common or self._have_no_value_in_common(first, second):
            return True
        if common == {"object"} and self._differ_in_a_property(first, second, level):
            return True
        if common == {"number"} and (_is_below(first, second) or _is_below(second, first)):
            return True
        return self._is_disjoint_within(first, second, common, level) or self._is_disjoint_within(
            second, first, common, level
        )

    def _have_no_value_in_common(self, first: dict[str, Any], second: dict[str, Any]) -> bool:
        return any(mine.isdisjoint(others) for mine in self._value_keys(first) for others in self._value_keys(second))

    def _value_keys(self, schema: dict[str, Any]) -> list[frozenset[Any]]:
        found = self._keys.get(id(schema))
        if found is None:
            found = self._keys[id(schema)] = [frozenset(map(json_key, values)) for values in _values(schema)]
        self._num_steps += sum(map(len, found))
        return found

    def _is_disjoint_within(self, first: dict[str, Any], second: Schema, among: frozenset[str], level: int) -> bool:
        """Whether the subschemas that `first` combines exclude `second`."""
        if any(
            self._are_disjoint(item, second, among, level + 1)
            for item in (*first.get("allOf", ()), *self._target(first))
        ):
            return True
        return any(
            all(self._are_disjoint(item, second, among, level + 1) for item in first[keyword])
            for keyword in ("anyOf", "oneOf")
            if keyword in first
        )

    def _differ_in_a_property(self, first: dict[str, Any], second: dict[str, Any], level: int) -> bool:
        names = dict.fromkeys([*first.get("required", ()), *second.get("required", ())])
        return any(
            self._are_disjoint(_property(first, name), _property(second, name), ALL_TYPES, level + 1) for name in names
        )


def _types(schema: Schema) -> frozenset[str]:
    """The types that values of a schema may have, by its own keywords alone."""
    if isinstance(schema, bool):
        return ALL_TYPES
    kinds = schema.get("type", ALL_TYPES)
    found = frozenset(
        "number" if kind == "integer" else kind for kind in ([kinds] if isinstance(kinds, str) else kinds)
    )
    for values in _values(schema):
        found &= {type_of(value) for value in values}
    return found


def _values(schema: dict[str, Any]) -> Iterator[list[Any]]:
    """The lists of values that `enum` and `const` allow."""
    if "enum" in schema:
        yield schema["enum"]
    if "const" in schema:
        yield [schema["const"]]


def _property(schema: dict[str, Any], name: str) -> Schema:
    """The schema of a property, as far as it is certain."""
    if name in (declared := schema.get("properties", {})):
        found: Schema = declared[name]
        return found
    return True if "patternProperties" in schema else schema.get("additionalProperties", True)


def _is_below(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether every number of `first` is less than every one of `second`."""
    highest = [(first[key], key == "maximum") for key in ("maximum", "exclusiveMaximum") if key in first]
    lowest = [(second[key], key == "minimum") for key in ("minimum", "exclusiveMinimum") if key in second]
    return any(
        high < low or (high == low and not (has_high and has_low))
        for high, has_high in highest
        for low, has_low in lowest
    )
