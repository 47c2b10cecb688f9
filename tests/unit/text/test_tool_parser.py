"""Tool calls in generated text: every format, whole and in pieces; what stays text; the grammar that forces calls."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core import Constraint, ConstraintKind
from runtime.grammar.grammar import GrammarCompiler
from runtime.text.tools.formats import (
    GENERIC,
    HERMES,
    LLAMA3,
    TOOL_FORMATS,
    Tool,
    ToolFormat,
    calls_grammar,
    detect_format,
)
from runtime.text.tools.parser import ToolCallParser, ToolPiece
from tests.support.byte_tokenizer import byte_tokenizer

WEATHER = Tool(
    name="get_weather",
    description="The weather of a place",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
CLOCK = Tool(name="clock", description="", parameters={"type": "object", "additionalProperties": False})
NAMES = ("get_weather", "clock")
CITY = '{"city": "S\u00e3o \\"P\\" {[}"}'
W = f'{{"name": "get_weather", "arguments": {CITY}}}'
P = f'{{"name": "get_weather", "parameters": {CITY}}}'
C = '{"name": "clock", "arguments": {}}'
WEATHER_CALL, CLOCK_CALL = ("get_weather", CITY), ("clock", "{}")

Calls = list[tuple[str, str]]
CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    (HERMES, f"<tool_call>\n{W}\n</tool_call>", "", [WEATHER_CALL]),
    (HERMES, f"Let me see. \n<tool_call>{W}</tool_call>", "Let me see.", [WEATHER_CALL]),
    (HERMES, f"<tool_call>\n{W}\n</tool_call>\n<tool_call>\n{C}\n</tool_call>\n", "", [WEATHER_CALL, CLOCK_CALL]),
    (HERMES, f"<tool_call>{C}<tool_call>{W}", "", [CLOCK_CALL, WEATHER_CALL]),
    (HERMES, f"<tool_call>{C}</tool_call> Done.", " Done.", [CLOCK_CALL]),
    (HERMES, "a < b <tool_cal", "a < b <tool_cal", []),
    (HERMES, "<<tool_call>", "<<tool_call>", []),
    (HERMES, "just text \n", "just text \n", []),
    (HERMES, W, W, []),
    (
        HERMES,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>x',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>x',
        [],
    ),
    (HERMES, "<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
    (HERMES, f"<tool_call>[1]</tool_call><tool_call>{C}</tool_call>", "<tool_call>[1]</tool_call>", [CLOCK_CALL]),
    (HERMES, '<tool_call>{"name": "clock", "arguments": {"a": 1', "", [("clock", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "clock", oops}</tool_call>', '<tool_call>{"name": "clock", oops}</tool_call>', []),
    (
        HERMES,
        '<tool_call>{"name": "clock", "arguments": {"a": 1}, oops}</tool_call>ok',
        ", oops}ok",
        [("clock", '{"a": 1}')],
    ),
    (HERMES, "Hm.\n <tool_call>[1]</tool_call>", "Hm.\n <tool_call>[1]</tool_call>", []),
    (HERMES, f"{C}\n<tool_call>{C}</tool_call>\n<tool_call>no", f"{C}\n<tool_call>no", [CLOCK_CALL]),
    (HERMES, "a" + " " * 2000 + f"<tool_call>{C}", "a" + " " * 1000, [CLOCK_CALL]),
    (HERMES, '<tool_call>{"name": "clock", "args": {"a": 1}}', '<tool_call>{"name": "clock", "args": {"a": 1}}', []),
    (HERMES, '<tool_call>{"name": "clock", "arguments": {}, "why": "x"}</tool_call>', "", [CLOCK_CALL]),
    (HERMES, '<tool_call>{"name": ["clock"]}', '<tool_call>{"name": ["clock"]}', []),
    (LLAMA3, P, "", [WEATHER_CALL]),
    (LLAMA3, f" <|python_tag|>{P}; {P}", "", [WEATHER_CALL, WEATHER_CALL]),
    (LLAMA3, '{"name": "clock"}', "", [CLOCK_CALL]),
    (LLAMA3, f'{{"type": "function", "parameters": {CITY}, "name": "get_weather"}}', "", [WEATHER_CALL]),
    (LLAMA3, '{"other": {"name": "clock"}}', '{"other": {"name": "clock"}}', []),
    (LLAMA3, "It is {hot}.", "It is {hot}.", []),
    (LLAMA3, "<|python", "<|python", []),
    # An object that is more than a call is what was asked for: JSON with a field `name`.
    (GENERIC, '{"name": "clock", "age": 3}', '{"name": "clock", "age": 3}', []),
    (GENERIC, '{"age": 3, "name": "clock"}', '{"age": 3, "name": "clock"}', []),
    (GENERIC, '{"name": "clock", "age": 3, "arguments": {}}', '{"name": "clock", "age": 3, "arguments": {}}', []),
    (GENERIC, '{"name": "clock", "type": "watch"}', '{"name": "clock", "type": "watch"}', []),
    (GENERIC, '{"name": "clock", "arguments": {}, oops} and more', ", oops} and more", [CLOCK_CALL]),
    (
        GENERIC,
        '{"name": "clock", "arguments": {"a": 1}, "parameters": {}}',
        ', "parameters": {}}',
        [("clock", '{"a": 1}')],
    ),
    (GENERIC, '[{"name": "clock", "arguments": {}, "id": "aB3dE6gH9"}]', "", [CLOCK_CALL]),
    (GENERIC, " " * 1001 + C, " " * 1001 + C, []),
    (GENERIC, f"[{W}, {C}]", "", [WEATHER_CALL, CLOCK_CALL]),
    (GENERIC, f"{W}\n{C}\n", "", [WEATHER_CALL, CLOCK_CALL]),
    (GENERIC, "[1, 2]", "[1, 2]", []),
    (GENERIC, '{"name": "clock", "arguments": "{\\"a\\": 1}"}', "", [("clock", '{"a": 1}')]),
    (GENERIC, '{"name": "clock", "arguments": null}', "", [CLOCK_CALL]),
    (GENERIC, '{"name": "clock", "arguments": "London"}', "", [("clock", "London")]),
    (GENERIC, '{"name": "clock", "arguments": "[1]"}', '{"name": "clock", "arguments": "[1]"}', []),
    (GENERIC, '{"name": "clock", "arguments": "5"}', '{"name": "clock", "arguments": "5"}', []),
    (GENERIC, f"  {C} That is all.", "That is all.", [CLOCK_CALL]),
    (GENERIC, "", "", []),
    (GENERIC, " \n", " \n", []),
]


def collected(pieces: list[ToolPiece]) -> tuple[str, Calls]:
    """Joined text and calls; checks that the pieces come in a sensible order."""
    text = ""
    calls: list[list[str]] = []
    for piece in pieces:
        if piece.call_idx is None:
            assert piece.text and piece.name is None
            text += piece.text
        elif piece.name is not None:
            assert piece.call_idx == len(calls) and not piece.arguments
            calls.append([piece.name, ""])
        else:
            assert piece.call_idx == len(calls) - 1 and piece.arguments
            calls[-1][1] += piece.arguments
    return text, [(name, arguments) for name, arguments in calls]


def parsed(form: ToolFormat, parts: list[str]) -> tuple[str, Calls]:
    parser = ToolCallParser(form, NAMES)
    pieces = [piece for part in parts for piece in parser.push(part)]
    return collected([*pieces, *parser.finish()])


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES)
def test_whole_and_by_character(form: ToolFormat, text: str, said: str, calls: Calls) -> None:
    assert parsed(form, [text]) == (said, calls)
    assert parsed(form, list(text)) == (said, calls)


@settings(deadline=None)
@given(case=st.sampled_from(CASES), data=st.data())
def test_how_the_text_is_cut_changes_nothing(case: tuple[ToolFormat, str, str, Calls], data: st.DataObject) -> None:
    form, text, said, calls = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(form, parts) == (said, calls)


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<tool",
    '{"name": "clock"',
    ', "arguments": ',
    "{",
    "}",
    '"',
    "\\",
    ":",
    ",",
]
FRAGMENTS += ["[", "]", " ", "\n", "null", "clock", C, W, "<|python_tag|>", "; ", "text"]


@settings(deadline=None, max_examples=300)
@given(form=st.sampled_from(list(TOOL_FORMATS.values())), parts=st.lists(st.sampled_from(FRAGMENTS), max_size=12))
def test_anything_at_all_is_read_the_same_in_pieces(form: ToolFormat, parts: list[str]) -> None:
    assert parsed(form, parts) == parsed(form, ["".join(parts)]) == parsed(form, list("".join(parts)))


@pytest.mark.parametrize("form", TOOL_FORMATS.values(), ids=TOOL_FORMATS)
def test_no_part_of_a_call_is_ever_shown(form: ToolFormat) -> None:
    call = W if form is not LLAMA3 else P
    text = f"{form.opening}\n{call}\n{form.closing}" if form.opening else form.prefix + call
    for end in range(len(text) + 1):
        parser = ToolCallParser(form, NAMES)
        assert not any(piece.text for piece in parser.push(text[:end])), text[:end]


def test_nothing_is_kept_of_a_call_that_has_begun() -> None:
    """What is kept would be copied with every token."""
    text = '<tool_call>{"name": "clock", "arguments": {"a": "' + "x" * 20_000
    parser = ToolCallParser(HERMES, NAMES)
    most = 0
    for char in text:
        parser.push(char)
        most = max(most, len(parser._raw) + len(parser._held))
    assert most < 100


def test_arguments_come_as_they_grow() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert not parser.push('<tool_call>{"name": "clock"')
    began = parser.push(', "arguments": {"a": [1')
    assert began == [ToolPiece(call_idx=0, name="clock"), ToolPiece(call_idx=0, arguments='{"a": [1')]
    assert parser.push(", 2]}}") == [ToolPiece(call_idx=0, arguments=", 2]}")]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, GENERIC),
        ("{{ message.content }}", GENERIC),
        ("... <tool_call></tool_call> XML tags", HERMES),
        ('{% if tools %}{"name": function name, "parameters": dictionary}', LLAMA3),
        ("{{- '<|python_tag|>' }}", LLAMA3),
    ],
)
def test_the_format_is_seen_in_the_template(template: str | None, form: ToolFormat) -> None:
    assert detect_format(template) is form


@pytest.mark.parametrize("form", TOOL_FORMATS.values(), ids=TOOL_FORMATS)
def test_the_grammar_admits_what_the_parser_reads(form: ToolFormat) -> None:
    tokenizer = byte_tokenizer()
    compiler = GrammarCompiler(tokenizer, vocab_size=258, eos_ids=frozenset([257]))

    def admits(text: str, *, is_parallel: bool, tools: tuple[Tool, ...] = (WEATHER, CLOCK)) -> bool:
        source = calls_grammar(form, tools, is_parallel=is_parallel)
        guide = compiler.guide(Constraint(ConstraintKind.GRAMMAR, source, "tools"))
        for token_id in tokenizer.encode(text):
            if not guide.allowed()[token_id]:
                return False
            guide.advance(token_id)
        return guide.is_stopped or bool(guide.allowed()[257])

    def written(name: str, arguments: Any) -> str:
        call = f'{{"name": "{name}", "{form.arguments_key}": {json.dumps(arguments)}}}'
        return f"{form.opening}\n{call}\n{form.closing}" if form.opening else call

    good, other = written("get_weather", {"city": "Rome", "days": 3}), written("clock", {})
    both = good + form.separator + other
    assert admits(good, is_parallel=False) and admits(both, is_parallel=True)
    assert not admits(both, is_parallel=False)
    assert not admits(other, is_parallel=True, tools=(WEATHER,))
    assert not admits(written("get_weather", {"city": 5}), is_parallel=True)
    assert not admits(written("clock", {"zone": 1}), is_parallel=True)
    assert not admits("Hello", is_parallel=True)
    assert parsed(form, [both])[1] == [("get_weather", '{"city": "Rome", "days": 3}'), ("clock", "{}")]
