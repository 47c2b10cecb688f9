"""The chat template: what transformers' environment offers, and what the sandbox refuses."""

import json
from pathlib import Path

import pytest

from runtime.chat_template import ChatTemplate, load_chat_template
from runtime.errors import InvalidArtifact, InvalidRequest

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "H\u00e9 <b>"}]


def render(source: str) -> str:
    return ChatTemplate(source, TOKENS).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[1].content }}{{ messages[1]['role'] }}", "<s>H\u00e9 <b>user"),
        ("{% for m in messages %}\n{{ m.role }}\n    {% endfor %}\nx", "system\nuser\nx"),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
            "user",
        ),
        ("{% for m in messages %}{% break %}{% endfor %}.", "."),
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "H\u00e9 <b>"}'),
        ("{{ {'b': 1} | tojson(indent=1) }}", '{\n "b": 1\n}'),
        ("{% generation %}{{ eos_token }}{% endgeneration %}.", "</s>."),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if tools is none and documents is none and add_generation_prompt %}yes{% endif %}", "yes"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 7 %}{% endfor %}{{ ns.n }}",
            "7",
        ),
        ("{{ '=' * 3 }}{{ 2 * 3 }}{{ 2 ** 3 }}", "===68"),
        ("{{ missing }}.", "."),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content.missing.field }}", "no attribute"),
        ("{% for i in range(10000000) %}{% endfor %}", "[Rr]ange"),
        ("{{ 'x' * 10000000 }}", "too long"),
        ("{{ 9 ** 9 ** 9 }}", "too large"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_an_invalid_request(source: str, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_a_template_that_does_not_compile_is_an_invalid_artifact() -> None:
    with pytest.raises(InvalidArtifact, match=r"some\.jinja does not compile"):
        ChatTemplate("{% if %}", {}, where="some.jinja")


def test_the_file_comes_before_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"

    def load(config: object) -> str | None:
        parsed = json.loads(json.dumps(config))
        template = load_chat_template(file if file.is_file() else None, parsed, TOKENS)
        return None if template is None else template.render(MESSAGES)

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "list"}]
    assert load({}) is None
    assert load({"chat_template": "string"}) == "string"
    assert load({"chat_template": named}) == "list"
    assert load({"chat_template": named[:1]}) is None
    with pytest.raises(InvalidArtifact, match="int"):
        load({"chat_template": 3})
    file.write_text("file")
    assert load({"chat_template": "string"}) == "file"
