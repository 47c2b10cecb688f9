"""Constraints on a byte tokenizer: what compiles, what is refused, and how a guide advances and rolls back."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar import guide as token_guide
from runtime.grammar.grammar import GrammarCompiler
from runtime.grammar.guide import GrammarGuide
from runtime.grammar.helper import MAX_FORESEEN_CHARS
from runtime.grammar.limits import MAX_SOURCE_CHARS
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.schemas.bombs import nested

EOS_ID, VOCAB_SIZE = 257, 300  # padded beyond the tokenizer's 258
TOKENIZER = byte_tokenizer()
SCHEMA, REGEX, GRAMMAR, CHOICE = (
    ConstraintKind.JSON_SCHEMA,
    ConstraintKind.REGEX,
    ConstraintKind.GRAMMAR,
    ConstraintKind.CHOICE,
)


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(TOKENIZER, vocab_size=VOCAB_SIZE, eos_ids=frozenset([EOS_ID]))
    yield compiler
    compiler.close()


def constraint(kind: ConstraintKind, source: Any) -> Constraint:
    return Constraint(kind, source if isinstance(source, str) else json.dumps(source), "field.name")


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def follow(guide: GrammarGuide, text: str) -> bool:
    """Take the tokens of a text; False at the first that is not allowed."""
    for token_id in ids_of(text):
        if not guide.allowed()[token_id]:
            return False
        guide.advance(token_id)
    return True


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        (SCHEMA, {"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["13", "2", "x", " 3"]),
        (SCHEMA, {"enum": ["a", 1, None]}, ['"a"', "1", "null"], ["2", "a"]),
        (SCHEMA, {"type": "object"}, ["{}", '{"a": [1, {"b": "\u00e9"}]}'], ["[]", '{"a"}', "{} "]),
        (REGEX, "a[0-9]{2}", ["a12"], ["a1x", "b"]),
        (REGEX, "^(yes|no)$", ["yes", "no"], ["maybe"]),
        (CHOICE, ["a", "ab", 'x"\n\u00e9', "%json {}"], ["a", "ab", 'x"\n\u00e9', "%json {}"], ["b", "abc"]),
        (GRAMMAR, 'start: "x" NUMBER\nNUMBER: /[0-9]+/', ["x1", "x12"], ["1", "xx"]),
        (GRAMMAR, 'root ::= "x" num\nnum ::= [0-9]+', ["x1", "x12"], ["1", "xx"]),
        (GRAMMAR, 'start: "<" %json {"type": "boolean"} ">"', ["<true>"], ["<1>"]),
    ],
)
def test_a_guide_allows_valid_texts_and_no_others(
    compiler: GrammarCompiler, kind: ConstraintKind, source: Any, good: list[str], bad: list[str]
) -> None:
    for text in good:
        guide = compiler.guide(constraint(kind, source))
        assert follow(guide, text), text
        assert guide.is_stopped or guide.allowed()[EOS_ID], f"{text} is whole"
        assert not guide.allowed()[TOKENIZER.vocab_size :].any(), "padding is no token"
    for text in bad:
        assert not follow(compiler.guide(constraint(kind, source)), text), text


def test_the_end_is_allowed_only_where_the_answer_is_whole(compiler: GrammarCompiler) -> None:
    guide = compiler.guide(constraint(REGEX, "ab?"))
    assert not guide.allowed()[EOS_ID]
    assert follow(guide, "a") and guide.allowed()[EOS_ID] and not guide.is_stopped
    assert follow(guide, "b") and guide.is_stopped


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        (SCHEMA, {"type": "strin"}, "Invalid type: strin"),
        (SCHEMA, {"type": "array", "uniqueItems": True}, "uniqueItems"),
        (SCHEMA, {"$ref": "http://127.0.0.1:9/schema"}, "does not fetch"),
        (SCHEMA, {"$ref": "#"}, "no text satisfies it"),
        (SCHEMA, {"enum": []}, "Unsatisfiable"),
        (SCHEMA, {"type": "integer", "multipleOf": 99_999_989}, "multipleOf"),
        (SCHEMA, {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "multipleOf"),
        (SCHEMA, {"anyOf": [{"multipleOf": 9973 + i} for i in range(9)]}, "multipleOf"),
        (SCHEMA, {"type": "number", "multipleOf": 123456.789}, "multipleOf"),
        (GRAMMAR, 'start: %json {"multipleOf": 99999989}', "multipleOf"),
        (GRAMMAR, 'start: "%json" %json {"description": "%json", "multipleOf": 99999989}', "multipleOf"),
        (GRAMMAR, 'start: %lark { start: %json {"multipleOf": 99999989} }', "multipleOf"),
        (GRAMMAR, 'start: "a"\nrest: %json {"multipleOf": ', "no JSON follows %json at character 17"),
        (SCHEMA, {"allOf": [{"pattern": f"a{i}"} for i in range(9)]}, "more than 8 patterns"),
        (SCHEMA, {"$defs": {"a": {"allOf": [{"format": "date"}] * 9}}, "$ref": "#/$defs/a"}, "more than 8 patterns"),
        (REGEX, "(", "invalid regex"),
        (REGEX, "(?=a)b", "look-around"),
        (REGEX, "a" * (MAX_SOURCE_CHARS + 1), "100,001 characters"),
        (GRAMMAR, "start: nothing", "nothing"),
        (GRAMMAR, "no grammar at all", "Expected"),
        (GRAMMAR, 'root ::= "a', "Unexpected end of input"),
        (GRAMMAR, "root ::= " + "(" * 5000, "recursion"),
        (SCHEMA, nested(300), "recursion"),
    ],
)
def test_refusals_name_the_field_and_the_problem(
    compiler: GrammarCompiler, kind: ConstraintKind, source: Any, words: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.guide(constraint(kind, source))
    assert refused.value.param == "field.name"
    message = str(refused.value)
    assert message.startswith(f"field.name: the {kind} ") and words in message and "\n" not in message


def test_multiples_that_people_use_are_taken(compiler: GrammarCompiler) -> None:
    price = {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 100}
    compiler.guide(constraint(SCHEMA, {"properties": {f"price{i}": price for i in range(100)}}))
    assert follow(compiler.guide(constraint(SCHEMA, {"type": "integer", "multipleOf": 25})), "175")


def test_a_draft_is_looked_at_ahead_and_another_takes_its_place(compiler: GrammarCompiler) -> None:
    source = constraint(SCHEMA, {"type": "object", "properties": {"ab": {"type": "integer"}}, "required": ["ab"]})
    text = '{"ab": 12'
    plain = compiler.guide(source)
    masks = [plain.allowed()]
    for token_id in ids_of(text):
        plain.advance(token_id)
        masks.append(plain.allowed())
    guide = compiler.guide(source)
    guide.prepare(ids_of('{"ab": x'))  # the last is not allowed
    for count, token_id in enumerate(ids_of(text)):
        assert np.array_equal(guide.allowed(), masks[count])
        guide.advance(token_id)
        if count == 2:  # two others: one that is wrong in its middle, and one that is right
            guide.prepare(ids_of('b"x 12'))
            assert np.array_equal(guide.allowed(), masks[3])
            guide.prepare(ids_of(text)[3:6])
    assert np.array_equal(guide.allowed(), masks[-1])
    follow(guide, "}")
    assert guide.is_stopped


@pytest.mark.parametrize(("source", "text"), [("a?", "a"), ("ab", "ab"), ("a+", "aaa")])
@pytest.mark.parametrize("behind", [[EOS_ID], [EOS_ID, EOS_ID], [EOS_ID, 5], [5]])
def test_a_draft_may_go_on_behind_the_end(compiler: GrammarCompiler, source: str, text: str, behind: list[int]) -> None:
    guide = compiler.guide(constraint(REGEX, source))
    guide.prepare([*ids_of(text), *behind])
    assert follow(guide, text) and (guide.is_stopped or guide.allowed()[EOS_ID])


def test_an_ordinary_token_that_ends_the_text_is_no_text() -> None:
    """Tiny and odd models have such: `#` is token 2 here, and the end. Inside a string it must not be offered."""
    compiler = GrammarCompiler(TOKENIZER, vocab_size=VOCAB_SIZE, eos_ids=frozenset(ids_of("#")))
    guide = compiler.guide(constraint(SCHEMA, {"type": "string"}))
    assert follow(guide, '"a') and not guide.allowed()[ids_of("#")[0]]
    guide.prepare(ids_of('b#c"'))
    assert follow(guide, 'bc"') and (guide.is_stopped or guide.allowed()[ids_of("#")[0]])


def test_grammars_are_kept_and_each_answer_starts_at_the_beginning(compiler: GrammarCompiler) -> None:
    first = compiler.guide(constraint(REGEX, "kept"))
    assert follow(first, "ke")
    second = compiler.guide(constraint(REGEX, "kept"))
    assert second._lexer is first._lexer, "compiled once"
    assert follow(second, "kept") and follow(first, "pt")


def test_a_grammar_that_one_answer_used_up_is_new_for_the_next(compiler: GrammarCompiler) -> None:
    """All copies share a lexer; what exceeds its limits for one exceeds them for all, from then on."""
    greedy = constraint(REGEX, "((a{1,100}){1,100}){1,100}")
    first, beside = compiler.guide(greedy), compiler.guide(greedy)
    with pytest.raises(InvalidRequest, match="too many expressions"):
        follow(first, "a" * 100)
    with pytest.raises(InvalidRequest, match="too many expressions"):
        follow(beside, "aa")
    assert follow(compiler.guide(greedy), "aa")


def test_the_same_constraint_is_compiled_once_at_a_time(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_one, begun, may_go_on = compiler._compile, threading.Semaphore(0), threading.Event()

    def slow(wanted: Constraint) -> Any:
        begun.release()
        may_go_on.wait()
        return compile_one(wanted)

    monkeypatch.setattr(compiler, "_compile", slow)
    with ThreadPoolExecutor(8) as pool:
        guides = [pool.submit(compiler.guide, constraint(REGEX, "once|twice")) for _ in range(8)]
        begun.acquire()
        may_go_on.set()
        assert all(follow(guide.result(), "once") for guide in guides)
    assert len({id(guide.result()._lexer) for guide in guides}) == 1
    monkeypatch.undo()
    with ThreadPoolExecutor(2) as pool:  # whoever waits is refused as well, for the same reason
        bad = [pool.submit(compiler.guide, constraint(REGEX, "(")) for _ in range(2)]
        assert all("invalid regex" in str(guide.exception()) for guide in bad)


def test_a_model_without_an_end_of_text_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="end-of-text"):
        GrammarCompiler(TOKENIZER, vocab_size=VOCAB_SIZE, eos_ids=frozenset()).guide(constraint(REGEX, "a"))


class StuckPool(Executor):
    """Takes work and never does it; `begins` says whether it pretends to be at it."""

    def __init__(self, *, begins: bool) -> None:
        self._begins = begins

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        if self._begins:
            future.set_running_or_notify_cancel()
        return future


def stuck(compiler: GrammarCompiler, *, begins: bool) -> GrammarGuide:
    guide = compiler.guide(constraint(REGEX, "abc"))
    guide.advance(ids_of("a")[0])
    guide._pool = StuckPool(begins=begins)
    guide.prepare()
    return guide


def test_a_mask_that_others_keep_waiting_is_computed_on_the_spot(compiler: GrammarCompiler) -> None:
    assert np.flatnonzero(stuck(compiler, begins=False).allowed()).tolist() == ids_of("b")


def test_a_mask_that_takes_too_long_ends_its_request(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_guide, "MAX_WAIT_S", 0.01)
    with pytest.raises(InvalidRequest, match="too complex to follow") as refused:
        stuck(compiler, begins=True).allowed()
    assert refused.value.param == "field.name"


def test_masks_may_not_take_more_than_their_share_of_time(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_guide, "FREE_S", 0.0)
    monkeypatch.setattr(token_guide, "FREE_PER_TOKEN_S", 0.0)
    guide = compiler.guide(constraint(REGEX, "abc"))
    guide.advance(ids_of("a")[0])
    with pytest.raises(InvalidRequest, match="1 tokens took"):
        guide.allowed()


def test_what_is_forced_is_seen_ahead(compiler: GrammarCompiler) -> None:
    guide = compiler.guide(constraint(REGEX, "ab(cd|ce)fg"))
    assert guide.forced() == ids_of("abc")
    assert guide.num_allowed(ids_of("abcefg")) == 6 and guide.num_allowed(ids_of("abxdfg")) == 2
    assert follow(guide, "abc") and guide.forced() == []
    assert follow(guide, "d") and guide.forced() == ids_of("fg")
    assert guide.num_allowed(ids_of("fgfg")) == 2, "nothing comes behind the end"
    assert follow(guide, "fg") and guide.is_stopped


def test_looking_ahead_is_given_up_where_it_takes_long(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = compiler.guide(constraint(CHOICE, ["xyz" * (MAX_FORESEEN_CHARS // 3)]))
    assert long.forced() == [] and long.num_allowed([1, 2]) == 2
    monkeypatch.setattr(token_guide, "MAX_FORESIGHT_S", -1.0)
    guide = compiler.guide(constraint(REGEX, "abc"))
    assert guide.forced() == ids_of("abc"), "the first look tells how long it takes"
    assert guide.forced() == [] and guide.num_allowed(ids_of("xx")) == 2
    assert follow(guide, "abc") and guide.is_stopped


def test_looking_ahead_never_fails(compiler: GrammarCompiler) -> None:
    busy = compiler.guide(constraint(REGEX, "abc"))
    busy.advance(ids_of("a")[0])
    busy.prepare()
    assert busy.forced() == [] and busy.num_allowed(ids_of("bc")) == 2
    assert busy.allowed()[ids_of("b")[0]] and busy.forced() == ids_of("bc")
    broken = compiler.guide(constraint(REGEX, "abc"))
    with pytest.raises(InvalidRequest):
        broken.advance(ids_of("x")[0])
    assert broken.forced() == [] and broken.num_allowed(ids_of("bc")) == 2


def test_a_constraint_with_long_forced_text_is_followed_without_foresight(compiler: GrammarCompiler) -> None:
    """A count makes a short source long, and a constant a long one: the search for forced text went to its end."""
    text = "xyz " * 22_000
    for source in (constraint(REGEX, "(xyz ){22000}"), constraint(CHOICE, [text]), constraint(REGEX, text)):
        guide = compiler.guide(source)
        assert follow(guide, text[:2000]) and guide.forced() == [], source.kind
