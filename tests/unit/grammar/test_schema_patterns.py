r"""Patterns of JavaScript: what the grammar's engine and the check make of them, held against texts."""

import json
import random

import pytest
import regex

from runtime.core import Constraint, ConstraintKind
from runtime.grammar.grammar import GrammarCompiler
from runtime.grammar.schema.formats import CHECKED_PATTERNS, PATTERNS
from runtime.grammar.schema.pattern_parser import PatternError
from runtime.grammar.schema.patterns import Pattern, translate_pattern
from tests.support.byte_tokenizer import byte_tokenizer

EOS_ID = 257
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, vocab_size=258, eos_ids=frozenset([EOS_ID]))


def lets_through(compiler: GrammarCompiler, pattern: Pattern, text: str) -> bool:
    """Whether a grammar of this pattern takes a text, as a JSON string."""
    source = json.dumps({"type": "string", "pattern": pattern.grammar})
    guide = compiler.guide(Constraint(ConstraintKind.JSON_SCHEMA, source, "x"))
    for token_id in TOKENIZER.encode(json.dumps(text, ensure_ascii=False), add_special_tokens=False):
        if not guide.allowed()[token_id]:
            return False
        guide.advance(token_id)
    return guide.is_stopped or bool(guide.allowed()[EOS_ID])


# What the grammar holds exactly: pattern, texts that match, texts that do not.
EXACT = [
    (r"^\/api\/", ["/api/", "/api/x"], ["api", "x/api/"]),
    (r"foo", ["a foo b"], ["fo"]),
    (r"^[\w\-.]+\@x\ y$", ["a-b.c@x y"], ["a b@x y"]),
    (r"^\u00e9\x41\u{1F600}\ud83d\ude01\cA\0$", ["\u00e9A\U0001f600\U0001f601\x01\x00"], ["e"]),
    (r"^[^]$", ["\n", "a"], ["", "ab"]),
    (r"^a[]$|^b$", ["b"], ["a"]),
    (r"^(?<year>\d{4})-(?P<month>\d\d)$", ["2026-01"], ["26-1"]),
    (r"^\d+$", ["12"], ["\u0661", "1\n"]),
    (r"^\s$", ["\u00a0", "\ufeff", "\n"], ["\u0085", "a"]),
    (r"^\S\D\W$", ["aa-"], ["a1-", " a-"]),
    (r"^.$", ["a"], ["\n", "\u2028", "\r"]),
    (r"^{[a-z]}$", ["{a}"], ["a"]),
    (r"^a{,2}$", ["", "aa"], ["aaa"]),
    (r"^a{2,}?b{1}$", ["aab", "aaab"], ["ab"]),
    (r"^[a&&b~~c\]\[^]$", ["&", "~", "]", "[", "^", "a"], ["d", ""]),
    (r"^[\d-x]$", ["-", "5", "x"], ["a"]),
    (r"^[\b]$", ["\b"], ["b"]),
    (r"^[[:alpha:]_]+$", ["ab_"], [":", "1"]),
    (r"^[^\W_]+$", ["ab1"], ["_", "-"]),
    (r"^(?i)ab[c-d](?:e|f)$", ["ABCE", "abdf"], ["abg"]),
    (r"^(?i:a)b$", ["Ab"], ["AB"]),
    (r"\A\d\Z", ["1"], ["12", "1\n"]),
    (r"(^a|b$)", ["ax", "xb"], ["xa", "bx"]),
    (r"^$|^a$", ["", "a"], ["b"]),
    (r"^\p{Lu}\P{L}$", ["A1"], ["a1", "AA"]),
    (r"^(\p{Extended_Pictographic}|\p{Emoji_Component})+$", ["\U0001f600"], ["a"]),
    (r"^a\-\_\"\'\%\<\>\#\&\~$", ["a-_\"'%<>#&~"], ["a"]),
    (r"^\101\n\t\v\f\r$", ["A\n\t\v\f\r"], ["A"]),
    (r"(?#words)^a$", ["a"], ["b"]),
    (r"^(a\1)(?<n>b\k<n>)$", ["ab"], ["aab", "abb"]),
    ("", ["", "a"], []),
]
# What it holds in part: texts that match, texts that it lets through and the check finds, texts that it stops.
PARTLY = [
    (r"^(?!\.)[a-z.]+$", ["a.b"], [".a"], ["A"]),
    (r"^(?=.*\d)(?=.*[a-z]).{2,4}$", ["a1"], ["aa", "11"], ["a1a1a", "1"]),
    (r"\bfoo\b", ["a foo b"], ["afoo"], ["fo"]),
    (r"^a\Bb$", ["ab"], [], ["a b"]),
    (r"^(?<=^)a(?<!b)$", ["a"], [], ["b"]),
    (r"^(['x])[a-z]*\1$", ["'a'", "xx"], ["'ax"], ["a"]),
    (r"^(?<q>a|b)-\k<q>$", ["a-a"], ["a-b"], ["c-c"]),
    (r"(?P<q>a|b)-(?P=q)", ["a-a"], ["a-b"], ["c"]),
    (r"^(?>a+)b$", ["aab"], [], ["a"]),
    (r"^a++b$", ["ab"], [], ["b"]),
    (r"^a(^b|c)$", ["ac"], ["ab"], ["a"]),
    (r"^(?:(a)|b)\1$", ["aa", "b"], ["ab"], ["c"]),
]


@pytest.mark.parametrize(("pattern", "good", "bad"), EXACT)
def test_both_engines_match_what_javascript_does(
    compiler: GrammarCompiler, pattern: str, good: list[str], bad: list[str]
) -> None:
    found = translate_pattern(pattern)
    assert found.is_exact
    for texts, is_match in ((good, True), (bad, False)):
        for text in texts:
            assert lets_through(compiler, found, text) is is_match, text
            assert (regex.search(found.whole, text) is not None) is is_match, text


@pytest.mark.parametrize(("pattern", "good", "looser", "bad"), PARTLY)
def test_parts_that_a_grammar_cannot_express_only_make_it_wider(
    compiler: GrammarCompiler, pattern: str, good: list[str], looser: list[str], bad: list[str]
) -> None:
    found = translate_pattern(pattern)
    assert not found.is_exact
    for text in good:
        assert lets_through(compiler, found, text) and regex.search(found.whole, text), text
    for text in looser:
        assert lets_through(compiler, found, text) and not regex.search(found.whole, text), text
    for text in bad:
        assert not lets_through(compiler, found, text) and not regex.search(found.whole, text), text


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a", "opens a group at 0"),
        ("a)", "closes a group at 1"),
        ("[a", "opens a class at 0"),
        ("*a", "repeats nothing at 0"),
        ("a{3,2}", "bounds at 1"),
        ("a{99999999}", "bounds at 1"),
        ("[b-a]", "range at 1 that runs backwards"),
        ("a\\", "ends with a backslash"),
        (r"\u{D800}", "U\\+D800"),
        ("(?<n", "unknown kind of group"),
        (r"\k<n>", None),
        ("(?P=n)", "refers to a group 'n'"),
        ("a(?i)b", "not at the beginning"),
        ("(?m)a", "flag 'm'"),
        ("(?i-s:a)", "switches a flag off"),
        ("[[:what:]]", r"\[:what:\]"),
        ("(" * 100, "groups within groups"),
    ],
)
def test_unsupported_patterns_are_refused(pattern: str, words: str | None) -> None:
    with pytest.raises(PatternError, match=words):
        translate_pattern(pattern)


FORMATS = {
    "uri-reference": (
        ["a/b?c#d", "//h/p", "http://[::1]:80/", "../a", "#f", "", "a:b"],
        ["://", "a b", "\u00e9", "#a#b"],
    ),
    "iri": (["http://\u00e9.org/\u00fc"], ["not-an-iri", "a: b"]),
    "iri-reference": (["\u00fc"], ["a b"]),
    "uri-template": (["http://x/{a}{?b,c*}{+d:3}", "a"], ["{", "{a b}", "x y"]),
    "json-pointer": (["", "/a~1b"], ["a", "/~2"]),
    "relative-json-pointer": (["0", "1/a", "2#"], ["/a", "01"]),
    "idn-email": (["\u00fc@x"], ["x"]),
    "uri": (["http://a/b", "urn:x:y"], ["a/b", "//x"]),
    "time": (["10:00:00Z", "10:00:00.5+01:00"], ["10:00", "25:00:00Z"]),
    "date-time": (["2026-01-02T03:04:05Z"], ["2026-01-02 03:04:05Z", "2026-13-02T03:04:05Z"]),
    "hostname": (["a.b-c"], ["-a", "a..b"]),
    "duration": (["P1D", "PT1H", "P1Y2M", "P3W", "P1DT2H"], ["P", "PT", "1D", "P1DT"]),
}


@pytest.mark.parametrize("name", CHECKED_PATTERNS)
def test_formats_that_are_patterns(compiler: GrammarCompiler, name: str) -> None:
    found = translate_pattern(CHECKED_PATTERNS[name])
    good, bad = FORMATS[name]
    for texts, is_match in ((good, True), (bad, False)):
        for text in texts:
            assert (regex.search(found.whole, text) is not None) is is_match, text
            if name in PATTERNS:
                assert found.is_exact and lets_through(compiler, found, text) is is_match, text


ATOMS = (
    *("a", "b", "-", ".", r"\d", r"\w", r"\s", "[ab]", "[^a]", "[a-c.]", r"\.", r"[\d-x]", r"\/", "(?:a|b)", "(a)"),
    *("^", "$", r"\b", "(?=a)", "(?!b)", "(?<=a)", r"\1", r"[\S]", r"\u0061", r"[^\W]", '"', r"\\", r"\n"),
)
REPEATS = ("*", "+", "?", "{2}", "{1,2}", "{0,}", "*?", "+?")


def made_up(rng: random.Random, depth: int = 0) -> str:
    pieces = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.2 and depth < 2:
            atom = rng.choice(("(", "(?:")) + made_up(rng, depth + 1) + ")"
        else:
            atom = rng.choice(ATOMS)
        is_repeated = rng.random() < 0.3 and not atom.startswith(("^", "$", r"\b", "(?"))
        pieces.append(atom + (rng.choice(REPEATS) if is_repeated else "") + ("|" if rng.random() < 0.12 else ""))
    return "".join(pieces)


@pytest.mark.parametrize("seed", range(4))
def test_the_grammar_never_stops_what_the_pattern_matches(compiler: GrammarCompiler, seed: int) -> None:
    """Patterns and texts by chance; where the translation says that it is exact, the two agree."""
    rng = random.Random(seed)
    num_matches = 0
    for _ in range(40):
        pattern = made_up(rng)
        found = translate_pattern(pattern)
        texts = ["".join(rng.choice('ab-.1x \n"\\/_') for _ in range(rng.randint(0, 5))) for _ in range(8)]
        for text in texts:
            is_match = regex.search(found.whole, text) is not None
            num_matches += is_match
            if is_match or not found.is_exact:
                continue
            assert not lets_through_or_empty(compiler, found, text), (pattern, text)
        for text in (text for text in texts if regex.search(found.whole, text)):
            assert lets_through(compiler, found, text), (pattern, text)
    assert num_matches > 50


def lets_through_or_empty(compiler: GrammarCompiler, pattern: Pattern, text: str) -> bool:
    """The same for a pattern that may match nothing at all, which does not compile."""
    from runtime.errors import InvalidRequest

    try:
        return lets_through(compiler, pattern, text)
    except InvalidRequest as refused:
        assert "empty" in str(refused)
        return False
