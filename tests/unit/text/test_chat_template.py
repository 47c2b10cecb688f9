"""The chat template: what transformers' environment offers, and what the sandbox refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InvalidArtifact, InvalidRequest
from runtime.text.chat.needs import SHORT_ID, short_id
from runtime.text.chat.options import ChatOptions
from runtime.text.chat.prompt import ChatPrompts
from runtime.text.chat.template import ChatTemplate, load_chat_template
from runtime.text.tools.formats import GENERIC, Tool, plain_messages
from tests.support.byte_tokenizer import byte_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "H\u00e9 <b>"}]

BYTES = byte_tokenizer()
CLOCK = Tool(name="clock", description="", parameters={"type": "object"})
CALLED: list[dict[str, Any]] = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": {"a": "\u00e9"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "12"},
]


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


def test_a_model_with_several_templates_has_one_for_tools(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "{{ tools }}tools"}, {"name": "default", "template": "plain"}]
    template = load_chat_template(None, {"chat_template": named}, TOKENS)
    assert template is not None and template.render(MESSAGES) == "plain"
    assert template.with_tools.knows_tools and not template.knows_tools
    file = tmp_path / "chat_template.jinja"
    file.write_text("file")
    template = load_chat_template(file, {"chat_template": named}, TOKENS)
    assert template is not None and template.render(MESSAGES) == "file" and template.with_tools is not template
    prompts = ChatPrompts(BYTES, template, GENERIC)
    assert BYTES.decode(prompts.encode(MESSAGES, tools=(), options=ChatOptions())) == "file"
    assert BYTES.decode(prompts.encode(MESSAGES, tools=(CLOCK,), options=ChatOptions())).endswith("tools")
    assert BYTES.decode(prompts.encode([*MESSAGES, *CALLED], tools=(), options=ChatOptions())).endswith("tools")
    with pytest.raises(InvalidArtifact, match="tool_use does not compile"):
        load_chat_template(file, {"chat_template": [{"name": "tool_use", "template": "{% if %}"}]}, TOKENS)


JOINING = """{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}
{%- for call in m.tool_calls %}{{ 'CALL ' + call.function.name + ' ' + call.function.arguments + ';' }}{% endfor %}
{%- else %}{{ m.role + ':' + m.content + ';' }}{% endif %}{% endfor %}{% if tools %}{% endif %}"""
"""As DeepSeek's: calls of a message without content alone, their arguments joined as text."""
NINE = """{% for m in messages %}{% for call in m.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
{{- call.function.name + (call.function.arguments | tojson) + call.id }}{% endfor %}
{%- if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
{{- m.tool_call_id }}{% endif %}{{ m.content }};{% endfor %}{% if tools %}{% endif %}"""
"""As Mistral's."""
EITHER = """{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.name }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}{% else %}
{{- call.function.arguments | tojson }}{% endif %}{% endfor %}{{ m.content }};{% endfor %}{{ tools }}"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            JOINING,
            'user:u;assistant:Let me see;CALL clock {"a": "\u00e9"};tool:12;assistant:ok;'
            'CALL clock {"a": "\u00e9"};tool:12;',
        ),
        (EITHER, 'u;clock{"a": "\u00e9"}Let me see;12;ok;clock{"a": "\u00e9"};12;'),
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "u;Let me see;12;ok;;12;"),
    ],
    ids=["joining", "either", "knows no calls"],
)
def test_calls_of_three_turns_are_given_as_the_template_takes_them(source: str, expected: str) -> None:
    said = {**CALLED[0], "content": "Let me see"}
    conversation = [{"role": "user", "content": "u"}, said, CALLED[1], {"role": "assistant", "content": "ok"}, *CALLED]
    assert ChatTemplate(source, {}).render(conversation).removesuffix("None") == expected


@pytest.mark.parametrize("arguments", ['{"a"', "London"])
def test_arguments_that_do_not_parse_reach_a_template_that_takes_text(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert ChatTemplate(JOINING, {}).render([message]) == f"CALL clock {arguments};"


def test_ids_of_calls_have_nine_letters_and_digits_where_the_template_wants_them() -> None:
    template = ChatTemplate(NINE, {})
    assert template.has_short_ids and not ChatTemplate(EITHER, {}).has_short_ids
    text = template.render([{"role": "user", "content": "u"}, *CALLED])
    assert re.fullmatch(r'u;clock\{"a": "\u00e9"\}(\w{9});\n?(\1)12;', text), text
    assert short_id("call_1") == short_id("call_1") != short_id("call_2")
    assert short_id("aB3dE6gH9") == "aB3dE6gH9"
    assert all(SHORT_ID.fullmatch(short_id(text)) for text in ("", "x" * 500, "\u00e9", "1234567890"))


ALTERNATING = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}{{ m.role }}:{{ m.content }};{% endfor %}"""
NO_SYSTEM = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{- m.content }};{% endfor %}"""


@pytest.mark.parametrize(
    ("source", "roles", "expected"),
    [
        (ALTERNATING, "user user assistant", "user:0\n\n1;assistant:2;"),
        (ALTERNATING, "system user assistant user user", "user:0\n\n1;assistant:2;user:3\n\n4;"),
        (ALTERNATING, "system", "user:0;"),
        (NO_SYSTEM, "system user assistant", "0\n\n1;2;"),
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "system user user", "0;1;2;"),
    ],
)
def test_a_template_that_refuses_the_roles_is_given_them_in_a_milder_form(
    source: str, roles: str, expected: str
) -> None:
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles.split())]
    assert ChatTemplate(source, {}).render(messages) == expected


def test_a_template_that_refuses_the_milder_forms_too_is_heard() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate(ALTERNATING, {}).render([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
