"""Rewrites what a JSON schema says about names of properties into keywords that the compiler has.

The compiler knows `properties`, `patternProperties` whose patterns exclude each other, and `additionalProperties`.
`propertyNames` becomes one of these where it means the same. Schemas are those of `runtime/grammar/schema/repair.py`.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

from runtime.grammar.schema.pattern_parser import parse
from runtime.grammar.schema.pattern_tree import Alternatives, Anchor, CharClass, Group, Node, Ranges, Repeat, complement
from runtime.grammar.schema.patterns import Pattern
from runtime.grammar.schema.refs import Place
from runtime.grammar.schema.repair import PlacedSchema, Schema

Translate = Callable[[str, Place], Pattern]
MAX_PATTERNS = 50
"""Each pattern is compared with all others."""
MAX_HOPS = 8
"""Longest chain of references that is followed."""


class PropertyRules(NamedTuple):
    """schema: rewritten, with patterns in the compiler's syntax; left_out: keywords that it no longer has."""

    schema: PlacedSchema
    left_out: tuple[str, ...]


def property_rules(
    schema: PlacedSchema, definitions: Mapping[str, Schema], translate: Translate, *, may_overlap: bool
) -> PropertyRules:
    """Rewrite the keywords about names.

    may_overlap: keep patterns that may match the same name; the compiler decides, and may refuse them.
    """
    if "propertyNames" not in schema and "patternProperties" not in schema:
        return PropertyRules(schema, ())
    found = PlacedSchema(schema.place)
    found.update(schema)
    left_out = []
    if not _translate_patterns(found, translate, may_overlap=may_overlap):
        left_out.append("patternProperties")
        _widen(found)
    if "propertyNames" in found:
        names = _resolved(found.pop("propertyNames"), definitions)
        if not _restrict_names(found, names, translate):
            left_out.append("propertyNames")
    return PropertyRules(found, tuple(left_out))


def _translate_patterns(schema: PlacedSchema, translate: Translate, *, may_overlap: bool) -> bool:
    """Put the patterns of `patternProperties` into the compiler's syntax; False if it cannot take them."""
    place = schema.place.inside("patternProperties")
    given = schema.get("patternProperties", {})
    patterns = {pattern: translate(pattern, place.inside(pattern)) for pattern in given}
    if len(patterns) > MAX_PATTERNS or not all(pattern.is_exact for pattern in patterns.values()):
        return False
    if len({pattern.grammar for pattern in patterns.values()}) < len(patterns):
        return False
    if not may_overlap:
        beginnings = [_beginning(parse(pattern)) for pattern in patterns]
        if not all(_exclude(one, other) for one, other in combinations(beginnings, 2)):
            return False
    if given:
        schema["patternProperties"] = {patterns[pattern].grammar: item for pattern, item in given.items()}
    return True


def _widen(schema: PlacedSchema) -> None:
    """Drop `patternProperties`: their values may then have any name that is not declared."""
    items = schema.pop("patternProperties").values()
    others = schema.get("additionalProperties", True)
    if others not in ({}, True):
        either = PlacedSchema(schema.place)
        either["anyOf"] = [others, *items]
        schema["additionalProperties"] = either


def _resolved(names: Schema, definitions: Mapping[str, Schema]) -> Schema:
    for _ in range(MAX_HOPS):
        if not isinstance(names, dict) or names.keys() != {"$ref"}:
            break
        names = definitions.get(names["$ref"].removeprefix("#/$defs/"), names)
    return names


def _restrict_names(schema: PlacedSchema, names: Schema, translate: Translate) -> bool:
    """Express `propertyNames` by other keywords; False if that is impossible."""
    if names is False:
        names = {"enum": []}
    if names is True or _without_type(names) == {}:
        return True
    if "patternProperties" in schema:
        return False
    keywords = _without_type(names)
    if keywords.keys() == {"const"}:
        keywords = {"enum": [keywords["const"]]}
    if keywords.keys() == {"enum"}:
        _declare(schema, keywords["enum"])
        return True
    # A declared name would have to match the pattern's schema as well.
    if schema.get("properties"):
        return False
    pattern, is_exact = _name_pattern(keywords, schema, translate)
    if pattern is not None:
        schema["patternProperties"] = {pattern: schema.pop("additionalProperties", True)}
        schema["additionalProperties"] = False
    return is_exact


def _without_type(names: dict[str, Any]) -> dict[str, Any]:
    """Drop `type`, since names are strings; keep it if it excludes strings."""
    kinds = names.get("type", "string")
    is_string = "string" in ([kinds] if isinstance(kinds, str) else kinds)
    return {keyword: value for keyword, value in names.items() if keyword != "type" or not is_string}


def _declare(schema: PlacedSchema, names: list[Any]) -> None:
    """Allow these names alone."""
    others = schema.get("additionalProperties", True)
    declared = {name: item for name, item in schema.get("properties", {}).items() if name in names}
    for name in names:
        if isinstance(name, str):
            declared.setdefault(name, others)
    schema["properties"] = declared
    schema["additionalProperties"] = False


def _name_pattern(keywords: dict[str, Any], schema: PlacedSchema, translate: Translate) -> tuple[str | None, bool]:
    """A pattern in the compiler's syntax that valid names match, and whether it is exact."""
    if "pattern" in keywords:
        pattern = translate(keywords["pattern"], schema.place.inside("propertyNames", "pattern"))
        return pattern.grammar, pattern.is_exact and len(keywords) == 1
    if keywords.keys() <= {"minLength", "maxLength"}:
        least, most = keywords.get("minLength", 0), keywords.get("maxLength", "")
        return f"^[\\x00-\\U0010FFFF]{{{least},{most}}}$", True
    return None, False


def _beginning(tree: Alternatives) -> list[Ranges] | None:
    """The sets of characters with which a match begins, one for each position; None if it may begin with any."""
    if len(tree.options) != 1 or not tree.options[0]:
        return None
    first, *others = tree.options[0]
    if isinstance(first, Group) and not others and not first.ignores_case:
        return _beginning(first.body)
    return _first_sets(others) if first == Anchor("^") else None


def _first_sets(nodes: list[Node]) -> list[Ranges]:
    sets: list[Ranges] = []
    for node in nodes:
        once = node.item if isinstance(node, Repeat) and node.least else node
        if isinstance(once, Group) and not once.ignores_case:
            options = [_first_sets(list(option)) for option in once.body.options]
            if all(options):
                sets.append(tuple(span for option in options for span in option[0]))
            break
        if not isinstance(once, CharClass) or once.properties:
            break
        sets.append(complement(once.ranges) if once.is_negated else once.ranges)
        if once is not node:
            break
    return sets


def _exclude(one: list[Ranges] | None, other: list[Ranges] | None) -> bool:
    """Whether no text can begin both ways."""
    if one is None or other is None:
        return False
    return any(not _overlap(mine, theirs) for mine, theirs in zip(one, other, strict=False))


def _overlap(one: Ranges, other: Ranges) -> bool:
    return any(low <= their_high and their_low <= high for low, high in one for their_low, their_high in other)
