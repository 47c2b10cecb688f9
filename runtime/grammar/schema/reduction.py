"""Reduces a JSON schema to what a grammar can enforce, and lists what it leaves out.

Each keyword is kept, rewritten without change of meaning, or left out. Leaving out makes the grammar wider, never
narrower: every valid answer can still be written. `runtime/grammar/schema/check.py` checks the rest when the answer is
complete. The limits are llguidance's (https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md).
Schemas are those of `runtime/grammar/schema/repair.py`.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

from runtime.errors import InvalidRequest
from runtime.grammar.limits import Multiples
from runtime.grammar.schema.disjoint import Disjointness, type_of
from runtime.grammar.schema.formats import GRAMMAR_FORMATS, PATTERNS
from runtime.grammar.schema.pattern_parser import PatternError
from runtime.grammar.schema.patterns import Pattern, translate_pattern
from runtime.grammar.schema.property_names import property_rules
from runtime.grammar.schema.refs import Place
from runtime.grammar.schema.repair import PlacedSchema, Schema

MAX_ITEMS = 100_000
"""Most items or properties that the grammar counts, with a rule for each."""
EXACT_NUMBER = 2**53
"""The compiler reads numbers as 64-bit floats, which are exact for whole numbers up to here."""
LEAST_DECIMAL = 1e-4
"""Smaller numbers are written with an exponent, and constants of the grammar are not."""
MAX_PATTERN_CHARS = 100_000
"""Most characters of all patterns, as of the compiler's source; reading them takes 0.3 s."""
MAX_DECIMALS = 9
"""Most decimals of `multipleOf`: the compiler counts its steps in 32 bits."""
APPLICATORS = frozenset(("$ref", "allOf", "anyOf", "oneOf"))
NEVER_HELD = ("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems")
ROOT_NAME = "#"


class Reduced(NamedTuple):
    """schema: for the compiler; left_out: the places of keywords that it lacks; is_exact: whether nothing else in it is
    looser than in the original. A bound beyond what the compiler can count is."""

    schema: Schema
    left_out: list[Place]
    is_exact: bool


class _Keyword(NamedTuple):
    """One keyword of a schema, and the new schema `out` that is being written.

    is_merged: the schema is combined with others by `allOf`, `$ref`, `anyOf` or `oneOf`
    """

    name: str
    schema: PlacedSchema
    out: dict[str, Any]
    is_merged: bool

    @property
    def value(self) -> Any:
        return self.schema[self.name]


def reduce_schema(schema: Schema, *, param: str, is_strict: bool) -> Reduced:
    """Reduce a schema to what goes into the grammar.

    is_strict: in doubt keep a keyword, which the compiler may refuse, instead of leaving it out.
    Raises InvalidRequest, naming `param` and the place, for a pattern that cannot be read.
    """
    if isinstance(schema, bool):
        return Reduced(schema, [], True)
    return _Reduction(schema, param, is_strict=is_strict).run()


class _Reduction:
    """The reduction of one schema.

    The compiler cannot count the properties of an object that is combined from several schemas. So each definition is
    reduced for its own use, and again when a place is found that combines it with others.
    """

    def __init__(self, root: dict[str, Any], param: str, *, is_strict: bool) -> None:
        self._definitions: dict[str, Schema] = {**root.get("$defs", {}), ROOT_NAME: root}
        self._param = param
        self._is_strict = is_strict
        self._disjoint = Disjointness(self._definitions)
        self._is_merged: dict[str, bool] = {}
        self._pending: list[str] = []
        self._left_out: dict[Place, None] = {}
        self._is_exact = True
        self._num_pattern_chars = 0
        self._multiples = Multiples()
        self._handlers = self._table()

    def run(self) -> Reduced:
        reduced: dict[str, Schema] = {}
        self._want(ROOT_NAME, is_merged=False)
        while self._pending:
            name = self._pending.pop()
            reduced[name] = self._schema(self._definitions[name], is_merged=self._is_merged[name])
        root = reduced.pop(ROOT_NAME)
        if reduced and isinstance(root, dict):
            root["$defs"] = reduced
        return Reduced(root, list(self._left_out), self._is_exact)

    def _table(self) -> dict[str, Callable[[_Keyword], None]]:
        """The handler of each keyword. Keywords without one are read by the handlers of others."""
        return {
            "type": self._type,
            **dict.fromkeys(("required", "minLength", "maxLength"), self._keep),
            **dict.fromkeys(("minItems", "maxItems"), self._item_count),
            **dict.fromkeys(("items", "additionalProperties"), self._inner),
            **dict.fromkeys(("properties", "patternProperties"), self._inner_map),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), self._bound),
            **dict.fromkeys(NEVER_HELD, self._never_held),
            "prefixItems": self._inner_list,
            "$ref": self._reference,
            "allOf": self._all_of,
            "anyOf": self._any_of,
            "oneOf": self._one_of,
            "not": self._negation,
            "if": self._condition,
            "enum": self._enum,
            "const": self._const,
            "pattern": self._pattern,
            "format": self._format,
            "multipleOf": self._multiple,
            "contains": self._contains,
            "uniqueItems": self._unique,
        }

    def _want(self, name: str, *, is_merged: bool) -> None:
        known = self._is_merged.get(name)
        if known is None or (is_merged and not known):
            self._is_merged[name] = is_merged
            self._pending.append(name)

    def _leave_out(self, schema: PlacedSchema, keyword: str) -> None:
        self._left_out[schema.place.inside(keyword)] = None

    def _schema(self, schema: Schema, *, is_merged: bool = False) -> Schema:
        if isinstance(schema, bool):
            return schema
        assert isinstance(schema, PlacedSchema)
        rules = property_rules(schema, self._definitions, self._translated, may_overlap=self._is_strict)
        for keyword in rules.left_out:
            self._leave_out(schema, keyword)
        out: dict[str, Any] = {}
        for name in rules.schema:
            if (handle := self._handlers.get(name)) is not None:
                handle(_Keyword(name, rules.schema, out, is_merged))
        self._property_counts(rules.schema, out, is_merged=is_merged)
        return False if out.pop("not", False) else out

    def _translated(self, pattern: str, place: Place) -> Pattern:
        self._num_pattern_chars += len(pattern)
        if self._num_pattern_chars > MAX_PATTERN_CHARS:
            message = f"{self._param}: the JSON schema's patterns have more than {MAX_PATTERN_CHARS:,} characters"
            raise InvalidRequest(message, param=self._param)
        try:
            return translate_pattern(pattern)
        except PatternError as error:
            message = f"{self._param}: the pattern {error}, at {place.shown()}"
            raise InvalidRequest(message, param=self._param) from None

    def _keep(self, at: _Keyword) -> None:
        at.out[at.name] = at.value

    def _type(self, at: _Keyword) -> None:
        """Leave out a type beside references that imply it: the compiler merges neighbours, and cannot merge a schema
        that contains itself."""
        keywords = at.schema.keys() - {"type"}
        if len(keywords) == 1 and keywords <= APPLICATORS:
            inner = {keyword: at.schema[keyword] for keyword in keywords}
            kinds = [at.value] if isinstance(at.value, str) else at.value
            if "integer" not in kinds and self._disjoint.types_of(inner) <= frozenset(kinds):
                return
        at.out["type"] = at.value

    def _inner(self, at: _Keyword) -> None:
        at.out[at.name] = self._schema(at.value)

    def _inner_list(self, at: _Keyword) -> None:
        at.out[at.name] = [self._schema(item) for item in at.value]

    def _inner_map(self, at: _Keyword) -> None:
        at.out[at.name] = {name: self._schema(item) for name, item in at.value.items()}

    def _never_held(self, at: _Keyword) -> None:
        if at.value not in ({}, True):
            self._leave_out(at.schema, at.name)

    def _reference(self, at: _Keyword) -> None:
        at.out["$ref"] = at.value
        self._want(at.value.removeprefix("#/$defs/"), is_merged=at.is_merged or len(at.schema) > 1)

    def _all_of(self, at: _Keyword) -> None:
        at.out.setdefault("allOf", []).extend(self._schema(item, is_merged=True) for item in at.value)

    def _any_of(self, at: _Keyword) -> None:
        is_merged = at.is_merged or len(at.schema) > 1
        options = [self._schema(item, is_merged=is_merged) for item in at.value]
        if "anyOf" in at.out:
            at.out.setdefault("allOf", []).append({"anyOf": options})
        else:
            at.out["anyOf"] = options

    def _one_of(self, at: _Keyword) -> None:
        """`oneOf` as `anyOf`: the grammar accepts an answer that satisfies any of the options."""
        if not self._disjoint.is_exclusive(at.value, at.schema):
            self._leave_out(at.schema, at.name)
        self._any_of(at)

    def _negation(self, at: _Keyword) -> None:
        """Keep `not: {}`, by which some generators write "never"; a grammar has no other `not`."""
        if at.value in ({}, True):
            at.out["not"] = True
        elif at.value is not False:
            self._leave_out(at.schema, at.name)

    def _condition(self, at: _Keyword) -> None:
        if any(at.schema.get(keyword, True) not in ({}, True) for keyword in ("then", "else")):
            self._leave_out(at.schema, at.name)

    def _enum(self, at: _Keyword) -> None:
        values = [value for value in at.value if _is_written_exactly(value)]
        if len(values) == len(at.value):
            at.out["enum"] = values
            return
        self._leave_out(at.schema, at.name)
        types = sorted({type_of(value) for value in at.value if not _is_written_exactly(value)})
        options = [{"type": types}, *([{"enum": values}] if values else [])]
        at.out.setdefault("allOf", []).append({"anyOf": options})

    def _const(self, at: _Keyword) -> None:
        if _is_written_exactly(at.value):
            at.out["const"] = at.value
        else:
            self._leave_out(at.schema, at.name)
            at.out.setdefault("allOf", []).append({"type": type_of(at.value)})

    def _pattern(self, at: _Keyword) -> None:
        pattern = self._translated(at.value, at.schema.place.inside(at.name))
        at.out["pattern"] = pattern.grammar
        if not pattern.is_exact:
            self._leave_out(at.schema, at.name)

    def _format(self, at: _Keyword) -> None:
        if at.value in GRAMMAR_FORMATS:
            at.out["format"] = at.value
        elif at.value in PATTERNS:
            at.out.setdefault("allOf", []).append({"pattern": translate_pattern(PATTERNS[at.value]).grammar})
        else:
            self._is_exact = False

    def _bound(self, at: _Keyword) -> None:
        """Leave out a bound beyond exact floats: it is the limit of the sender's integer type."""
        if abs(at.value) <= EXACT_NUMBER:
            at.out[at.name] = at.value
        else:
            self._is_exact = False

    def _multiple(self, at: _Keyword) -> None:
        num_decimals = -int(Decimal(str(at.value)).as_tuple().exponent)
        if num_decimals <= MAX_DECIMALS and self._multiples.fits(at.value):
            at.out["multipleOf"] = at.value
        else:
            self._leave_out(at.schema, at.name)

    def _item_count(self, at: _Keyword) -> None:
        if at.value <= MAX_ITEMS:
            at.out[at.name] = at.value
        else:
            self._is_exact = False

    def _contains(self, at: _Keyword) -> None:
        if at.schema.get("minContains", 1) or "maxContains" in at.schema:
            self._leave_out(at.schema, at.name)

    def _unique(self, at: _Keyword) -> None:
        if at.schema.get("maxItems", 2) > 1:
            self._leave_out(at.schema, at.name)

    def _property_counts(self, schema: PlacedSchema, out: dict[str, Any], *, is_merged: bool) -> None:
        """Keep `minProperties` and `maxProperties` where the compiler can count: in a map, or with one optional
        property."""
        required = set(schema.get("required", ()))
        optional = [
            name for name, item in out.get("properties", {}).items() if name not in required and item is not False
        ]
        is_closed = out.get("additionalProperties") is False and not out.get("patternProperties")
        least = max(0, schema.get("minProperties", 0) - len(required))
        most = schema["maxProperties"] - len(required) if "maxProperties" in schema else None
        if most is not None and is_closed and most >= len(optional):
            most = None
        wanted = {"minProperties": bool(least), "maxProperties": most is not None}
        is_whole = not is_merged and APPLICATORS.isdisjoint(out)
        is_countable = max(least, most or 0) <= MAX_ITEMS
        is_countable &= not optional or (is_closed and least <= 1 and most in (None, 1))
        for keyword in (keyword for keyword, is_wanted in wanted.items() if is_wanted):
            if is_whole and is_countable:
                out[keyword] = schema[keyword]
            else:
                self._leave_out(schema, keyword)
        if least > 1:
            self._is_exact = False  # an undeclared name may come twice, which the schema counts once


def _is_written_exactly(value: Any) -> bool:
    """Whether the grammar writes a constant as text of the same value."""
    if isinstance(value, dict):
        return all(map(_is_written_exactly, value.values()))
    if isinstance(value, list):
        return all(map(_is_written_exactly, value))
    if isinstance(value, float):
        return LEAST_DECIMAL <= abs(value) < EXACT_NUMBER and "e" not in repr(value)
    return not isinstance(value, int) or abs(value) <= EXACT_NUMBER
