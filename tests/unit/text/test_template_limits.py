"""Limits of rendering a chat template: one that would take too much time or memory ends with an error in one line."""

import pytest

from runtime.errors import InvalidArtifact, InvalidRequest
from runtime.text.chat import limits as template_limits
from runtime.text.chat.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a | b"}]
FEW_STEPS = 20_000
GROWING = "{%% set ns = namespace(x='a', y='a') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
NESTED = GROWING % "[ns.x, ns.x]"
TWICE = NESTED + NESTED.replace("ns.x", "ns.y").replace("{% set ns = namespace(x='a', y='a') %}", "")
BIG = "{% set x = 'a ' * 400000 %}"


def bomb(source: str) -> str:
    """A program that runs for one conversation only, so that the template can be loaded."""
    return "{% if messages | length == 2 %}" + source + "{% endif %}"


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ '%200000000d' % 1 }}", "width"),
        ("{{ '%*d' % (200000000, 1) }}", r"\*"),
        ("{{ '%*d' | format(20000, 1) }}", r"\*"),
        ("{{ '%200000000d' | format(1) }}", "width"),
        ("{{ '{:>200000000}'.format(1) }}", "width"),
        ("{{ '{:>{}}'.format(1, 200000000) }}", "width"),
        ("{{ '{:>{w}}'.format(1, w=200000000) }}", "width"),
        ("{{ '{a:>200000000}'.format_map({'a': 1}) }}", "width"),
        ("{{ 'a'.ljust(200000000) }}", "width"),
        ("{{ 'a'.zfill(200000000) }}", "width"),
        ("{{ '\t'.expandtabs(tabsize=200000000) }}", "width"),
        ("{{ 'a' | center(20000) }}", "width"),
        ("{{ 'a' | center(200000000) }}", "too large"),
        ("{{ 'a' | indent(20000, true) }}", "width"),
        ("{{ ('\n' * 999999) | indent('y' * 999999, true) }}", "more than"),
        ("{{ [[1]] | tojson(indent=20000) }}", "width"),
        ("{{ (range(99999) | list) | tojson(separators=('x' * 99999, 'y')) }}", "more than"),
        ("{{ range(99999) | join('x' * 99999) }}", "more than"),
        ("{{ ('x' * 99999).join('y' * 99999) }}", "more than"),
        ("{{ ('x' * 99999).replace('x', 'y' * 99999) }}", "more than"),
        ("{{ ('x' * 99999) | replace('x', 'y' * 99999) }}", "more than"),
        ("{{ 5 | round(-1000000000) }}", "too large"),
        ("{{ [1] | slice(100000000) | list }}", "too large"),
        ("{{ [[1]] | sum(start=[]) }}", "sum of lists"),
        ("{{ (5).to_bytes(1000000000, 'big') }}", "not there"),
        ("{{ 'a'.translate({97: 'x'}) }}", "not there"),
        ("{{ 'a'.encode() }}", "not there"),
        ("{{ lipsum(n=1000) }}", "undefined"),
        ("{{ 'x' * 10000000 }}", "too long"),
        ("{{ [1] * 10000000 }}", "too long"),
        ("{{ 9 ** 9 ** 9 }}", "too large"),
        (GROWING % "ns.x ~ ns.x", "more than"),
        (GROWING % "ns.x + ns.x", "more than"),
        (GROWING.replace("'a'", "[1]") % "ns.x + ns.x", "too long"),
        (GROWING.replace("'a'", "3") % "ns.x * ns.x", "too large"),
        # Captured output, the template's own text among it, is kept as well.
        ("{% set x %}{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}", "more than"),
        ("{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}", "more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_much_out_of_little_is_refused_before_it_is_made(source: str, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        ChatTemplate(bomb(source), {}).render(MESSAGES)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        NESTED + "{{ ns.x }}",
        NESTED + "{{ ns.x | tojson }}",
        NESTED + "{{ ns.x | string }}",
        NESTED + "{{ ns.x | upper }}",
        NESTED + "{{ [ns.x] | map('string') | list }}",
        NESTED + "{{ ns }}",
        NESTED + "{{ {'a': ns.x}.items() }}",
        NESTED + "{{ '%s' % ns.x }}",
        NESTED + "{{ '{!r:.3}'.format(ns.x) }}",
        NESTED + "{{ '' ~ ns.x }}",
        TWICE + "{{ ns.x == ns.y }}",
        TWICE + "{{ ns.x is eq(ns.y) }}",
        TWICE + "{{ [ns.x, ns.y] | sort }}",
    ],
)
def test_a_few_lists_that_stand_for_any_length_are_not_written(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty lists, each twice in the next: as text, 2 ** 60 letters."""
    monkeypatch.setattr(template_limits, "MAX_REPEAT", FEW_STEPS)
    with pytest.raises(InvalidRequest, match=f"holds more than {FEW_STEPS:,} others"):
        ChatTemplate(bomb(source), {}).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% set y = range(99999) | list %}{% endfor %}",
        BIG + "{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
        BIG + "{% for i in range(99999) %}{% set y = 'b' in x %}{% endfor %}",
        BIG + "{% for i in range(99999) %}{% set y = x.startswith('b') %}{% endfor %}",
        BIG + "{% for i in range(99999) %}{% set y = x.split() %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [i] %}{% endfor %}",
    ],
)
def test_long_renderings_are_stopped_by_count(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", FEW_STEPS)
    with pytest.raises(InvalidRequest, match=f"more than ({FEW_STEPS:,} steps|128,000,000 characters)"):
        ChatTemplate(bomb(source), {}).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '%5d|%s' % (1, 'x') }}{{ '%3d' | format(2) }}", "    1|x  2"),
        ("{{ '{:>4}{!r}{a[b]}'.format(1, 'x', a={'b': 2}) }}", "   1'x'2"),
        ("{{ 'a'.ljust(3) }}|{{ 'a' | center(3) }}|{{ 'a\nb' | indent(2) }}", "a  | a |a\n  b"),
        ("{{ ', '.join(['a', 'b']) }}{{ [1, 2] | join('-') }}{{ messages | join(',', attribute='role') }}", None),
        ("{{ 'a-b'.replace('-', '+') }}{{ 'a-b' | replace('-', '+') }}{{ 'a-b'.split('-')[-1] }}", "a+ba+bb"),
        ("{{ [[1, 2]] == [[1, 2]] }}{{ 'a' in 'ab' }}{{ messages[0].role == messages[1].role }}", "TrueTrueFalse"),
        (
            "{{ 7 // 2 }}{{ 2 ** 10 }}{{ 1.5 * 2 }}{{ 5 - 2 }}{{ [1] + [2] }}{{ 'x' ~ 1 ~ none }}",
            "310243.03[1, 2]x1None",
        ),
        ("{{ messages[1:] | length }}{{ messages | map(attribute='role') | list | last }}", "1assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k ~ v }}{% endfor %}", "a2b1"),
        ("{{ [3, 1] | sort | first }}{{ [1, 2] | sum }}{{ 2.46 | round(1) }}{{ '<' | e }}", "132.5&lt;"),
        ("{% for i in range(3) if i != 1 %}{{ i }}{% else %}none{% endfor %}", "02"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{% set c %}{{ f(2) }}{% endset %}{{ c | trim }}", "[1][2]"),
    ],
)
def test_ordinary_operations_give_what_they_always_gave(source: str, expected: str | None) -> None:
    assert ChatTemplate(source, {}).render(MESSAGES) == (expected or "a, b1-2user,assistant")


def test_a_long_conversation_is_far_from_the_limits() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim }}"
        "{% if m.content.startswith('x') and '</think>' in m.content %}!{% endif %}{% endfor %}",
        {},
    )
    assert len(template.render([{"role": "user", "content": "word " * 200}] * 4096)) > 4_000_000


@pytest.mark.parametrize("source", ["{{ 'x' * 10000000 }}", "{{ '{:>200000000}'.format(1) }}"])
def test_a_template_that_does_it_always_is_no_model_to_load(source: str) -> None:
    with pytest.raises(InvalidArtifact, match="does more than one rendering may"):
        ChatTemplate(source, {})


def test_each_rendering_is_counted_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", FEW_STEPS)
    template = ChatTemplate("{% for i in range(6000) %}{% endfor %}{{ messages[0].content }}", {})
    assert [template.render([{"role": "user", "content": str(i)}]) for i in range(9)] == [str(i) for i in range(9)]
