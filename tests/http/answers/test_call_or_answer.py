"""Tools combined with an output format, and a single call where one is asked for: whole, streamed, in every format.

With random logits only the grammar makes calls and answers valid; with a scripted model the parser finds its calls.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from runtime.core import TextPiece
from runtime.text.tools.call_or_answer import CallOrAnswerParser
from runtime.text.tools.formats import GENERIC, HERMES, LLAMA3, TOOL_FORMATS, ToolFormat
from runtime.text.tools.one_call import OneCallText
from runtime.text.tools.parser import ToolCallParser, ToolPiece
from runtime.text_model import TextModel
from serve.app import create_app
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.fake_text_model import EOS_ID, NAME, fake_text_model

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
ARGUMENTS: Json = {
    "type": "object",
    "properties": {"zone": {"enum": ["utc", "cet"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
# In a format without tags this looks like a call of a function until the age comes.
PERSON: Json = {
    "type": "object",
    "properties": {"name": {"enum": ["clock", "tom"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
BRIEF = "{% if tools %}{% endif %}{{ messages[0].content }}:"
"""A template that knows tools and does not waste tokens on them."""
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "clock", "parameters": ARGUMENTS}},
    {"type": "function", "function": {"name": "sun/rise", "parameters": ARGUMENTS}},
]
CALL_STARTS = byte_tokenizer().encode("<{")
FORMS: list[tuple[Json, str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}, "person"),
    ({"guided_json": PERSON}, "person"),
    ({"structured_outputs": {"json": PERSON}}, "person"),
    ({"guided_regex": "[ab]{2}/[0-9]"}, "[ab]{2}/[0-9]"),
    ({"guided_choice": ["left/right", '"up"']}, 'left/right|"up"'),
    ({"guided_grammar": 'start: call "!"\ncall: /[a-c]/ arguments0\narguments0: %json {"const": 1}'}, "[a-c]1!"),
    ({"grammar": 'root ::= "x" [0-9] calls\ncalls ::= ";"'}, "x[0-9];"),
]


@pytest.fixture(scope="module", params=TOOL_FORMATS)
def app(request: pytest.FixtureRequest) -> Iterator[FlaskClient]:
    """A model that says anything, for each format."""
    model = fake_text_model(num_slots=8, capacity=512, tool_format=request.param, template=BRIEF)
    model.start()
    yield create_app(model).test_client()
    model.close()


def ask(client: FlaskClient, **fields: Any) -> Json:
    """The choice of a reply, which is the same in one piece and streamed."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "go"}], "tools": TOOLS, "max_tokens": 400}
    response = client.post(CHAT, json={**body, **fields})
    assert response.status_code == 200, response.text
    choice: Json = response.get_json()["choices"][0]
    events = client.post(CHAT, json={**body, **fields, "stream": True}).get_data(as_text=True).split("\n\n")[:-2]
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    deltas = [chunk["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    message = choice["message"]
    assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
    assert arguments_of(calls) == {
        idx: call["function"]["arguments"] for idx, call in enumerate(message.get("tool_calls", ()))
    }
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    return choice


def arguments_of(calls: list[Json]) -> dict[int, str]:
    """The arguments of streamed calls, by their index."""
    found: dict[int, str] = {}
    for call in calls:
        found[call["index"]] = found.get(call["index"], "") + call["function"]["arguments"]
    return found


def check_calls(message: Json) -> int:
    """That a message is nothing but calls that follow their schema; how many."""
    assert message["content"] is None
    for call in message["tool_calls"]:
        assert call["function"]["name"] in ("clock", "sun/rise")
        Draft202012Validator(ARGUMENTS).validate(json.loads(call["function"]["arguments"]))
    return len(message["tool_calls"])


@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=[next(iter(form)) for form, _ in FORMS])
def test_an_answer_is_calls_or_has_the_form(app: FlaskClient, form: Json, pattern: str) -> None:
    for bias in (15, -15):  # of what calls begin with
        starts = dict.fromkeys(map(str, CALL_STARTS), bias)
        choice = ask(app, **form, seed=1, logit_bias=starts, parallel_tool_calls=False)
        message = choice["message"]
        if choice["finish_reason"] == "tool_calls":
            check_calls(message)
        else:
            assert choice["finish_reason"] == "stop" and "tool_calls" not in message
            check_form(message["content"], pattern)
        if pattern != "person":
            assert choice["finish_reason"] == ("tool_calls" if bias > 0 else "stop")


def check_form(text: str, pattern: str) -> None:
    schema = PERSON if pattern == "person" else {"type": "string", "pattern": f"^({pattern})$"}
    Draft202012Validator(schema).validate(json.loads(text) if pattern == "person" else text)


def test_both_kinds_of_answer_come(app: FlaskClient) -> None:
    reasons = [ask(app, **FORMS[0][0], seed=seed, parallel_tool_calls=False)["finish_reason"] for seed in range(6)]
    assert set(reasons) == {"stop", "tool_calls"}


def test_calls_can_be_forced_or_forbidden_all_the_same(app: FlaskClient) -> None:
    forced = ask(app, **FORMS[0][0], tool_choice="required", parallel_tool_calls=False, seed=1)
    assert check_calls(forced["message"]) == 1
    message = ask(app, **FORMS[0][0], tool_choice="none", seed=1)["message"]
    assert "tool_calls" not in message
    check_form(message["content"], "person")
    body = {"model": NAME, "messages": [{"role": "user", "content": "go"}], "tools": TOOLS, **FORMS[0][0]}
    reply = app.post(CHAT, json={**body, "tool_choice": "required", "max_tokens": 9})
    assert reply.headers["X-Headrace-Ignored"] == "response_format"


def test_one_call_beside_a_form(app: FlaskClient) -> None:
    bias = dict.fromkeys(map(str, CALL_STARTS), 15) | {str(EOS_ID): -100}  # calls, for as long as others may follow
    fields: Json = {"guided_regex": "x{3}", "seed": 1, "logit_bias": bias}
    assert len(ask(app, **fields, max_tokens=150)["message"]["tool_calls"]) > 1
    choice = ask(app, **fields, parallel_tool_calls=False)
    assert check_calls(choice["message"]) == 1 and choice["finish_reason"] == "tool_calls"


def test_an_answer_that_is_cut_short_is_what_it_has_begun_to_be(app: FlaskClient) -> None:
    for max_tokens in (1, 9, 25):
        for seed in range(2):
            choice = ask(app, **FORMS[0][0], temperature=2, seed=seed, max_tokens=max_tokens)
            assert choice["finish_reason"] == "length"
            assert choice["message"]["content"] or choice["message"]["tool_calls"]


SLOW = {"properties": {"a": {"multipleOf": 1e9}}}
SLOW_TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SLOW}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: calls"}, "guided_grammar"),
        ({"grammar": 'root ::= "a'}, "grammar"),
        ({"grammar": "root ::= " + '"a" ' * 1000}, "grammar"),
        ({"guided_json": {"type": "strin"}}, "guided_json"),
        ({"guided_json": {"const": "x" * 100_000}}, "guided_json"),
        ({"guided_json": {}, "tools": [SLOW_TOOL]}, "tools[0].function.parameters"),
    ],
)
def test_a_grammar_that_does_not_compile_is_refused_together_with_others_too(
    app: FlaskClient, fields: Json, param: str
) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "go"}], "tools": TOOLS, "max_tokens": 9, **fields}
    error = app.post(CHAT, json=body).get_json()["error"]
    assert error["param"] == param and error["message"].startswith(param)


def name_and_text(pieces: list[ToolPiece]) -> tuple[str, list[str]]:
    return "".join(piece.text for piece in pieces), [piece.name for piece in pieces if piece.name is not None]


CALL = {form.name: json.dumps({"name": "clock", form.arguments_key: {"zone": "utc"}}) for form in TOOL_FORMATS.values()}
CASES: list[tuple[ToolFormat, str, str, list[str]]] = [
    (HERMES, f"<tool_call>\n{CALL['hermes']}\n</tool_call>", "", ["clock"]),
    (HERMES, CALL["hermes"], CALL["hermes"], []),
    (HERMES, f"<tool_call>{CALL['hermes']}</tool_call>", f"<tool_call>{CALL['hermes']}</tool_call>", []),
    (LLAMA3, CALL["llama3"], "", ["clock"]),
    (LLAMA3, f"{CALL['llama3']}; {CALL['llama3']}", "", ["clock", "clock"]),
    (GENERIC, CALL["json"], "", ["clock"]),
    (GENERIC, '{"name": "clock", "age": 3}', '{"name": "clock", "age": 3}', []),
    (GENERIC, '{"name": "clock"}', '{"name": "clock"}', []),
    (GENERIC, '{"name": "clock", "arg', '{"name": "clock", "arg', []),
    (GENERIC, " text", " text", []),
    (GENERIC, "", "", []),
]


@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize(("form", "text", "said", "names"), CASES)
@given(data=st.data())
def test_the_beginning_decides_however_it_comes(
    form: ToolFormat, text: str, said: str, names: list[str], data: st.DataObject
) -> None:
    parser = CallOrAnswerParser(form, ["clock", "clocks"])
    pieces, rest = list[ToolPiece](), text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces += parser.push(rest[:size])
        rest = rest[size:]
    assert name_and_text(pieces + parser.finish()) == (said, names)


TURNS = "{% if tools %}{% endif %}{{ messages[0].content }}\nassistant: "
SCRIPT = 'Let me see.\n<tool_call>\n{"name": "clock", "arguments": {"zone": "utc"}}\n</tool_call>'
SCRIPT += '\n<tool_call>\n{"name": "sun/rise", "arguments": {"zone": "cet"}}\n</tool_call> Done.'
BARE = '{"name": "clock", "parameters": {"zone": "utc"}}; {"name": "clock", "parameters": {"zone": "cet"}}'
LIST = '[{"name": "clock", "arguments": {"zone": "utc"}}, {"name": "clock", "arguments": {"zone": "cet"}}]'


@pytest.mark.parametrize(
    ("form", "script", "said"), [("hermes", SCRIPT, "Let me see."), ("llama3", BARE, None), ("json", LIST, None)]
)
@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculating"])
def test_one_call_ends_the_answer_where_several_are_not_wanted(
    form: str, script: str, said: str | None, *, speculate: bool
) -> None:
    model = fake_text_model(capacity=512, script=script, tool_format=form, speculate=speculate, template=TURNS)
    model.start()
    client = create_app(model).test_client()
    parallel, single = ask(client), ask(client, parallel_tool_calls=False)
    assert len(parallel["message"]["tool_calls"]) == 2
    (call,) = single["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"zone": "utc"}
    assert single["message"]["content"] == said and single["finish_reason"] == "tool_calls"
    body = {"model": NAME, "messages": [{"role": "user", "content": "go"}], "tools": TOOLS, "max_tokens": 400}
    usage = client.post(CHAT, json={**body, "parallel_tool_calls": False}).get_json()["usage"]
    assert usage["completion_tokens"] == script.index("}}") + 2, "a byte a token, and none behind the first call"
    several = client.post(CHAT, json={**body, "parallel_tool_calls": False, "n": 3, "seed": 1}).get_json()
    assert [len(choice["message"]["tool_calls"]) for choice in several["choices"]] == [1, 1, 1]
    assert model.stats().num_running == 0
    without = ask(client, parallel_tool_calls=False, tool_choice="none")["message"]
    assert without["content"] == script, "text is text where nothing may be called"
    model.close()


class Pieces:
    """A text stream of the pieces it is given; the last comes at the end."""

    def __init__(self, *texts: str) -> None:
        self._texts = list(texts)

    def push(self, token_id: int) -> TextPiece:
        return TextPiece(self._texts.pop(0), token_id == 9)

    def finish(self, end_id: int | None = None) -> str:
        return self._texts.pop(0)


def test_the_text_ends_with_the_call_inside_a_piece_or_at_the_end() -> None:
    call = '{"name": "clock", "arguments": {}}'

    def stream(*texts: str) -> OneCallText:
        return OneCallText(Pieces(*texts), ToolCallParser(HERMES, ["clock"]))

    assert stream(f"a<tool_call>{call}</tool_call> b").push(0) == TextPiece(f"a<tool_call>{call}", True)
    halves = stream(f"<tool_call>{call[:9]}", call[9:] + "</too", "l_call>")
    assert [halves.push(0) for _ in range(2)] == [(f"<tool_call>{call[:9]}", False), (call[9:], True)]
    assert stream(f"<tool_call>{call} b").finish() == f"<tool_call>{call}"
    assert stream("text").push(9) == TextPiece("text", True), "a stop string ends it as well"
    broken = stream('<tool_call>{"name": "clock", "arguments": {"a": 1}, oops} more')
    assert broken.push(0).is_stopped, "a call that has begun cannot be taken back, and another must not follow"


def test_a_model_may_still_answer_in_text_only(model_that_talks: TextModel) -> None:
    choice = ask(create_app(model_that_talks).test_client(), parallel_tool_calls=False)
    assert choice["message"]["content"] == "No call is needed." and choice["finish_reason"] == "stop"


@pytest.fixture
def model_that_talks() -> Iterator[TextModel]:
    model = fake_text_model(capacity=1024, script="No call is needed.", tool_format="hermes")
    model.start()
    yield model
    model.close()
