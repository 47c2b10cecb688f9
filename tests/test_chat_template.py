"""The chat template: what transformers' environment offers, and what the sandbox refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.chat_options import ChatOptions
from runtime.chat_template import ChatTemplate, load_chat_template
from runtime.errors import InvalidArtifact, InvalidRequest
from runtime.tool_formats import GENERIC, plain_messages

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


THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}[]{% endif %}{% endif %}{{ style }}"
)


@pytest.mark.parametrize(
    ("options", "prompt_end", "unread"),
    [
        (ChatOptions(), "<assistant>", []),
        (ChatOptions(enable_thinking=False), "<assistant>[]", []),
        (ChatOptions(enable_thinking=True), "<assistant>", []),
        (ChatOptions(reasoning_effort="none"), "<assistant>[]", []),
        (ChatOptions(reasoning_effort="none", enable_thinking=True), "<assistant>", []),
        (ChatOptions(reasoning_effort="high"), "<assistant>", ["reasoning_effort"]),
        (ChatOptions(variables={"style": " brief", "tone": 1}), "<assistant> brief", ["chat_template_kwargs.tone"]),
        (ChatOptions(variables={"enable_thinking": False}), "<assistant>[]", []),
        (ChatOptions(add_generation_prompt=False), "Be kind.</><user>H\u00e9 <b></>", []),
    ],
)
def test_variables_reach_a_template_that_reads_them(options: ChatOptions, prompt_end: str, unread: list[str]) -> None:
    template = ChatTemplate(THINKING, TOKENS)
    text = template.render(
        MESSAGES,
        add_generation_prompt=options.add_generation_prompt,
        variables=options.values(template.reads),
    )
    assert text.endswith(prompt_end)
    assert options.unread(template.reads) == unread


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "range"]
)
def test_a_variable_cannot_have_a_name_of_the_servers(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"chat_template_kwargs.{name} cannot be set") as caught:
        ChatTemplate(THINKING, TOKENS).render(MESSAGES, variables={name: 1})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"enable_thinking": True, "variables": {"enable_thinking": False}}, "enable_thinking"),
        ({"reasoning_effort": "low", "variables": {"reasoning_effort": "high"}}, "reasoning_effort"),
        ({"variables": {str(idx): 0 for idx in range(65)}}, "chat_template_kwargs"),
    ],
)
def test_options_that_exclude_each_other(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatOptions(**values)
    assert caught.value.param == param


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_the_reasoning_of_earlier_turns_reaches_the_template_under_any_name(name: str) -> None:
    last = {"role": "assistant", "content": "4", "reasoning_content": None, name: "2 + 2"}
    turns: list[dict[str, Any]] = [*MESSAGES, last]
    template = ChatTemplate(THINKING, TOKENS)
    assert template.knows_reasoning and not ChatTemplate("{{ messages[0].content }}", {}).knows_reasoning
    assert "<assistant>[2 + 2]4</>" in template.render(turns)
    plain = plain_messages(turns, [], GENERIC)
    assert template.render(plain) == template.render(turns)


TRIMMING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}"


@pytest.mark.parametrize("source", [THINKING, TRIMMING], ids=["as it is", "trimmed"])
@pytest.mark.parametrize("content", ["The answer", " The answer is ", "", "twice twice", "a\n\n"])
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_a_final_message_is_left_open_as_transformers_leaves_it(source: str, content: str, role: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "user", "content": "twice"}, {"role": role, "content": content}]
    expected = render_jinja_template([turns], chat_template=source, continue_final_message=True, **TOKENS)[0][0]
    text = ChatTemplate(source, TOKENS).render(turns, add_generation_prompt=False, continue_final_message=True)
    assert text == expected
    assert text.endswith(content if source is THINKING else content.strip()) and not text.endswith("</>")


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("{{ messages[0].content }}", {"role": "assistant", "content": "left out"}),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", {"role": "assistant", "content": "changed"}),
        (THINKING, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(source: str, last: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="last message") as caught:
        ChatTemplate(source, TOKENS).render([*MESSAGES, last], add_generation_prompt=False, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


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
