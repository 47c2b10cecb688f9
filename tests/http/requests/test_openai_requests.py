"""Request bodies: what is refused, with which message, and that no body at all makes the server fail."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.app import create_app
from serve.fields.reading import Field, FieldClass
from serve.fields.requests import CHAT_FIELDS, COMPLETION_FIELDS, read_chat, read_completion
from serve.settings import ServerSettings
from tests.support.fake_text_model import NAME, fake_text_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMPLETION = {"model": NAME, "prompt": "hi", "max_tokens": 2}
CONVERSATION = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
MAX_BODY = 50_000


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    model = fake_text_model()
    model.start()
    yield create_app(model, ServerSettings(max_body=MAX_BODY)).test_client()
    model.close()


def refusal(client: FlaskClient, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    response = client.post(path, data=text, content_type="application/json")
    assert response.status_code == status, response.text
    error = response.get_json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and error["type"] == "invalid_request_error"
    return dict(error)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def called(**function: Any) -> dict[str, Any]:
    """An assistant's message with one call."""
    return {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{}", **function}}]}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


# Fields common to both calls: name, value, and words the message must have.
BAD_FIELDS = [
    ("temperature", "hot", "a number"),
    ("temperature", True, "a number"),
    ("temperature", 2.5, "2.5"),
    ("temperature", 10**400, "finite"),
    ("top_p", -0.1, "-0.1"),
    ("top_p", 1.1, "at most 1"),
    ("repetition_penalty", 5e-324, "at least 0.01"),
    ("top_k", 1.5, "an integer"),
    ("top_k", -2, "top_k must be at least -1"),
    ("min_p", [1], "a list of 1"),
    ("seed", True, "an integer"),
    ("seed", 2**63, "an integer"),
    ("n", 0, "at least 1"),
    ("n", 17, "at most 16"),
    ("n", False, "an integer"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", -3, "-1 for no limit"),
    ("max_tokens", "10", '"10"'),
    ("stream", 1, "true or false"),
    ("stream", "true", "true or false"),
    ("stop", ["a"] * 17, "at most 16"),
    ("stop", [1], "a string"),
    ("stop", "\ud800", "surrogates"),
    ("stop_token_ids", ["1"], "an integer"),
    ("stop_token_ids", [258], "258"),
    ("stop_token_ids", 5, "a list"),
    ("ignore_eos", 0, "true or false"),
    ("logit_bias", [1], "an object"),
    ("best_of", 2, "equal n (1)"),
    ("logit_bias", {"x": 1}, '"x"'),
    ("logit_bias", {"-1": 1}, '"-1"'),
    ("logit_bias", {"1": "a"}, "a number"),
    ("logit_bias", {"1": 101}, "101"),
    ("logit_bias", {"100000": 1}, "100000"),
    ("stream_options", {"include_usage": 1}, "true or false"),
    ("extra_body", [1], "an object"),
    ("stream_options", True, "an object"),
    ("model", 5, "a string"),
    ("response_format", "json_object", "an object"),
    ("response_format", {}, "type is required"),
    ("response_format", {"type": "json"}, '"json_schema"'),
    ("response_format", {"type": "json_schema"}, "json_schema is required"),
    ("response_format", {"type": "text", "json_schema": {"name": "n", "schema": {}}}, "not text"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "name": 5}}, "name must be a string"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": []}}, "an object"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "x"}}}, "type: x"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": 1}}, "true or"),
    ("structured_outputs", [], "an object"),
    ("structured_outputs", {}, "exactly one of json"),
    ("structured_outputs", {"json_object": False}, "exactly one of json"),
    ("structured_outputs", {"regex": "a", "choice": ["a"]}, "exactly one of json"),
    ("structured_outputs", {"regex": ""}, "not empty"),
    ("structured_outputs", {"regex": 5}, "a string"),
    ("structured_outputs", {"regex": "("}, "invalid regex"),
    ("structured_outputs", {"regex": "\ud800"}, "surrogates"),
    ("structured_outputs", {"choice": []}, "1 to 5000 strings"),
    ("structured_outputs", {"choice": "a"}, "a list"),
    ("structured_outputs", {"choice": ["a", 1]}, "a string"),
    ("structured_outputs", {"json": "{"}, "JSON text"),
    ("structured_outputs", {"json": 5}, "an object"),
    ("structured_outputs", {"json": {"not": {}}}, "not"),
    ("structured_outputs", {"grammar": "start: x"}, "x"),
    ("structured_outputs", {"whitespace_pattern": " "}, "whitespace_pattern"),
]
BAD_COMPLETION_FIELDS = [
    ("prompt", "", "empty"),
    ("prompt", [], "none empty"),
    ("prompt", [""], "empty"),
    ("prompt", [[]], "empty"),
    ("prompt", [1, "a"], "an integer"),
    ("prompt", ["a", 1], "a string"),
    ("prompt", [True], "an integer"),
    ("prompt", [-1], "-1"),
    ("prompt", [258], "258"),
    ("prompt", [1.5], "a string"),
    ("prompt", {"text": "a"}, "an object"),
    ("prompt", "half \udc00", "surrogates"),
    ("logprobs", True, "an integer"),
    ("logprobs", 21, "at most 20"),
    ("suffix", "end", "not supported"),
    ("messages", [{"role": "user", "content": "a"}], "use /v1/chat/completions"),
]
BAD_CHAT_FIELDS = [
    ("messages", [], "1 to"),
    ("messages", "hi", "a list"),
    ("messages", ["hi"], "messages[0] must be an object"),
    ("messages", [{"content": "hi"}], "messages[0].role is required"),
    ("messages", [{"role": "user"}], "messages[0].content is required"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content must be a string"),
    ("messages", [{"role": "robot", "content": "5"}], "messages[0].role"),
    ("messages", [{"role": "tool", "content": "5"}], "tool_call_id is required"),
    ("messages", [{"role": "tool", "content": "5", "tool_call_id": 5}], "tool_call_id must be a string"),
    ("messages", [{"role": "system", "content": None}], "content is required"),
    ("messages", [{"role": "user", "content": "\ud83d"}], "surrogates"),
    ("messages", [{"role": "user", "content": []}], "empty list"),
    ("messages", [{"role": "user", "content": [5]}], "content[0] must be an object"),
    ("messages", [{"role": "user", "content": [{"type": 5, "text": "a"}]}], "type must be a string"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "content[0].text is required"),
    ("messages", [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}], '"thinking"'),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
    ("messages", [{"role": "user", "content": [{"type": "input_audio", "text": "a"}]}], '"input_audio"'),
    ("messages", [{"role": "user", "content": "a", "tool_calls": [CALL]}], "role assistant"),
    ("messages", [{"role": "assistant", "tool_calls": {}}], "tool_calls must be a list"),
    ("messages", [{"role": "assistant", "tool_calls": [5]}], "tool_calls[0] must be an object"),
    ("messages", [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}], "tool_calls[0].type"),
    ("messages", [{"role": "assistant", "tool_calls": [{**CALL, "function": []}]}], "function must be an object"),
    ("messages", [called(name="")], "1 to 256 characters"),
    ("messages", [called(name="a" * 257)], "1 to 256 characters"),
    ("messages", [called(arguments='["x"]')], "arguments must be a JSON object"),
    ("messages", [called(arguments="[]")], "arguments must be a JSON object"),
    ("messages", [called(arguments=5)], "arguments must be a string"),
    ("messages", [called(arguments={"a": "\ud800"})], "surrogates"),
    ("logprobs", 1, "true or false"),
    ("top_logprobs", 3, "logprobs to be true"),
    ("max_completion_tokens", 0, "at least 1"),
    ("tools", {}, "a list of at most 128 tools"),
    ("tools", [5], "tools[0] must be an object"),
    ("tools", [{"type": "function"}], "tools[0].function is required"),
    ("tools", [{"type": "custom", "function": {"name": "f"}}], "tools[0].type"),
    ("tools", [{"type": "function", "function": 5}], "tools[0].function must be an object"),
    ("tools", [tool(name=None)], "tools[0].function.name is required"),
    ("tools", [tool(name='f" | "')], "letters"),
    ("tools", [tool(), tool()], "two functions"),
    ("tools", [tool(parameters={"type": "string"})], "JSON schema"),
    ("tools", [tool(parameters=[])], "JSON schema"),
    ("tools", [tool(parameters={"title": "\ud800"})], "surrogates"),
    ("tools", [tool(name="a" * 129)], "letters"),
    ("tools", [tool(description=1)], "a string"),
    ("tools", [tool(strict="yes")], "true or false"),
    ("tools", [tool()] * 129, "at most 128"),
    ("tool_choice", "required", "needs tools"),
    ("tool_choice", "any", "needs tools"),
    ("tool_choice", "f", '"required"'),
    ("tool_choice", {"type": "any"}, "needs tools"),
    ("tool_choice", {"type": "file_search"}, "tool_choice.type"),
    ("tool_choice", {"type": "allowed_tools"}, "at least one"),
    ("tool_choice", {"type": "allowed_tools", "tools": ["f"]}, "an object"),
    ("tool_choice", {"type": "allowed_tools", "allowed_tools": {}}, "tools is required"),
    ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function"}]}, "function is required"),
    ("tool_choice", 1, '"required"'),
    ("tool_choice", {"type": "function"}, "function is required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "needs tools"),
    ("parallel_tool_calls", "yes", "true or false"),
    ("functions", [{"name": "f"}], "newer word"),
    ("function_call", {"name": "f"}, "newer word"),
    ("modalities", ["text", "audio"], "text only"),
    ("prompt", "hi", "use messages"),
]
CASES = [
    *((COMPLETIONS, COMPLETION, *row) for row in (*BAD_FIELDS, *BAD_COMPLETION_FIELDS)),
    *((CHAT, CONVERSATION, *row) for row in (*BAD_FIELDS, *BAD_CHAT_FIELDS)),
]


@pytest.mark.parametrize(("path", "good", "name", "value", "words"), CASES)
def test_bad_field(client: FlaskClient, path: str, good: dict[str, Any], name: str, value: Any, words: str) -> None:
    error = refusal(client, path, {**good, name: value})
    assert words in error["message"]
    assert error["param"].startswith(name)


@pytest.mark.parametrize(("path", "good"), [(COMPLETIONS, COMPLETION), (CHAT, CONVERSATION)])
def test_required_fields(client: FlaskClient, path: str, good: dict[str, Any]) -> None:
    for name in good.keys() - {"max_tokens"}:
        for without in ({k: v for k, v in good.items() if k != name}, {**good, name: None}):
            error = refusal(client, path, without)
            assert error["message"] == f"{name} is required" and error["param"] == name


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ('{"model": NaN}', "NaN"),
        ('{"temperature": -Infinity}', "Infinity"),
        (b'{"model": "\xff"}', "not valid JSON"),
        ('{"model": "fake", "prompt": ' + "[" * 20_000 + "]" * 20_000 + "}", "nested too deeply"),
        ('{"model": "fake", "prompt": ' + "[" * 500 + "]" * 500 + "}", "prompt must be"),
        ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"model": "fake", "prompt": "a", "temperature": 1e999}', "finite"),
    ],
)
def test_bad_json(client: FlaskClient, body: str | bytes, words: str) -> None:
    assert words in refusal(client, COMPLETIONS, body)["message"]


def test_wrong_model(client: FlaskClient) -> None:
    for path, good in ((COMPLETIONS, COMPLETION), (CHAT, CONVERSATION)):
        error = refusal(client, path, {**good, "model": "gpt-9"}, 404)
        assert error["code"] == "model_not_found" and "gpt-9" in error["message"] and NAME in error["message"]


def test_wrong_method_path_type_and_size(client: FlaskClient) -> None:
    answers = [
        (client.get(COMPLETIONS), 405),
        (client.post("/v1/embeddings", json={}), 404),
        (client.post(CHAT, data="{}", content_type="text/plain"), 415),
        (client.post(CHAT, data=b" " * (MAX_BODY + 1), content_type="application/json"), 413),
    ]
    for response, status in answers:
        assert response.status_code == status
        assert response.get_json()["error"]["type"] == "invalid_request_error"
    assert "POST" in answers[0][0].headers["Allow"]


def test_null_is_absent(client: FlaskClient) -> None:
    for path, good, table in (
        (COMPLETIONS, COMPLETION, COMPLETION_FIELDS),
        (CHAT, CONVERSATION, CHAT_FIELDS),
    ):
        nulls = {field.name: None for field in table}
        response = client.post(path, json={**nulls, **good})
        assert response.status_code == 200, response.text


def test_neutral_values_of_unsupported_fields_pass() -> None:
    read_chat(
        {
            **CONVERSATION,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "store": False,
            "service_tier": "auto",
            "max_completion_tokens": 2,
        },
    )
    wanted = read_completion({**COMPLETION, "suffix": "", "best_of": 3, "n": 3})
    assert wanted.n == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": -1}, 97),
        ({"max_tokens": -2.0}, 97),
        ({"max_tokens": 5, "max_completion_tokens": 3}, 3),
        ({"max_tokens": 3, "max_completion_tokens": -1}, 3),
        ({"max_new_tokens": 9, "num_predict": 8, "max_output_tokens": 10}, 8),
        ({"max_completion_tokens": 3.0}, 3),
    ],
)
def test_limits_of_tokens(fields: dict[str, Any], expected: int) -> None:
    completion = {key: value for key, value in COMPLETION.items() if key != "max_tokens"}
    conversation = {key: value for key, value in CONVERSATION.items() if key != "max_tokens"}
    for wanted in (read_completion({**completion, **fields}), read_chat({**conversation, **fields})):
        assert wanted.for_choice(0, prompt_len=3, max_len=100).max_tokens == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": -2}, {"seed": -2}),
        ({"stop": ""}, {"stop": ()}),
        ({"stop": ["", "a", ""]}, {"stop": ("a",)}),
        ({"stop": []}, {"stop": ()}),
        ({"logit_bias": []}, {"logit_bias": {}}),
        ({"logit_bias": {}}, {"logit_bias": {}}),
        ({"extra_body": {}}, {"seed": None}),
        ({"extra_body": {"top_k": 3, "seed": 1}, "seed": 2, "top_k": None}, {"top_k": 3, "seed": 2}),
    ],
)
def test_odd_values_of_sampling_fields(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    for wanted in (read_completion({**COMPLETION, **fields}), read_chat({**CONVERSATION, **fields})):
        assert {name: getattr(wanted.params, name) for name in expected} == expected


def test_top_p_0_is_the_likeliest_token_and_top_k_minus_1_all_of_them(client: FlaskClient) -> None:
    def text(**fields: Any) -> str:
        body = {**COMPLETION, "max_tokens": 30, "temperature": 2, "seed": 1, **fields}
        return str(client.post(COMPLETIONS, json=body).get_json()["choices"][0]["text"])

    assert text(top_p=0) == text(temperature=0) != text()
    assert text(top_k=-1) == text(top_k=0) == text() != text(top_k=1)


def test_seed_minus_1_is_another_one_every_time(client: FlaskClient) -> None:
    body = {**CONVERSATION, "max_tokens": 20, "seed": -1}
    answers = {client.post(CHAT, json=body).get_json()["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(answers) == 3


def test_special_tokens_of_a_completion_are_the_clients_choice() -> None:
    assert read_completion(COMPLETION).add_special_tokens
    assert not read_completion({**COMPLETION, "add_special_tokens": False}).add_special_tokens


def test_logprobs_that_are_not_asked_for() -> None:
    assert read_completion({**COMPLETION, "logprobs": False}).params.logprobs is None
    assert read_chat({**CONVERSATION, "top_logprobs": 0}).params.logprobs is None


def test_a_schema_beside_its_type() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for kind in ("json_object", "json_schema"):
        constraint = read_chat({**CONVERSATION, "response_format": {"type": kind, "schema": schema}}).params.constraint
        assert constraint is not None and json.loads(constraint.source) == schema


def test_a_byte_order_mark_is_no_part_of_the_body(client: FlaskClient) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(COMPLETION).encode()
    assert client.post(COMPLETIONS, data=body, content_type="application/json").status_code == 200


def test_every_sampling_field_arrives() -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "logit_bias": {"5": 2},
        "seed": 9,
        "stop": "x",
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
    }
    for wanted in (
        read_completion({**COMPLETION, **sampling, "logprobs": 4}),
        read_chat({**CONVERSATION, **sampling, "logprobs": True, "top_logprobs": 4}),
    ):
        params = wanted.for_choice(0, prompt_len=3, max_len=100)
        arrived = {name: getattr(params, name) for name in sampling}
        expected = sampling | {"logit_bias": {5: 2}, "stop": ("x",), "stop_token_ids": frozenset([3, 4])}
        assert arrived == expected
        assert params.logprobs == 4 and params.max_tokens == 2


KEYS = [
    "function",
    "tool_calls",
    "arguments",
    "parameters",
    "id",
    "role",
    "content",
    "type",
    "text",
    "1",
    "name",
    "json",
    "regex",
    "choice",
    "grammar",
    "json_schema",
    "schema",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 300),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.sampled_from([NAME, "user", "system", "text", "hello", "\ud800", "1", "auto", 2**64, -(2**63)]),
    st.sampled_from(["json_object", "json_schema", "object", "string", "array", "[a-c]+", "start: /a/", "{}"]),
    st.sampled_from(["function", "required", "tool", "assistant"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    ),
    max_leaves=6,
)


def names_to_try(table: Sequence[Field]) -> list[str]:
    """The supported names, and one of each other class: those are many, and test_field_classes.py has them all."""
    return [*sorted(row.name for row in table if row.kind is FieldClass.SUPPORTED), "metadata", "mirostat", "other"]


@pytest.mark.parametrize(
    ("path", "good", "names"),
    [
        (COMPLETIONS, COMPLETION, names_to_try(COMPLETION_FIELDS)),
        (CHAT, CONVERSATION, names_to_try(CHAT_FIELDS)),
    ],
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_body_is_ever_our_fault(
    client: FlaskClient, path: str, good: dict[str, Any], names: list[str], data: st.DataObject
) -> None:
    """A good request with a few fields replaced at random is answered or refused, never a 5xx."""
    changes = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    # Python's dumps writes NaN and Infinity, which the server has to refuse.
    response = client.post(path, data=json.dumps(good | changes), content_type="application/json")
    text = response.get_data(as_text=True)
    assert response.status_code in (200, 400, 404), text
    if response.status_code != 200:
        assert response.get_json()["error"]["message"]
    elif response.mimetype == "text/event-stream":
        assert text.endswith("data: [DONE]\n\n")
    else:
        assert response.get_json()["choices"]


def test_tools_and_what_they_need(client: FlaskClient) -> None:
    body = {**CONVERSATION, "tools": [tool(), tool(name="g")]}
    named = {"type": "function", "function": {"name": "h"}}
    error = refusal(client, CHAT, {**body, "tool_choice": named})
    assert error["param"] == "tool_choice" and "f, g" in error["message"]
    bad = tool(parameters={"properties": {"a": {"type": "strin"}}})
    error = refusal(client, CHAT, {**CONVERSATION, "tools": [bad], "tool_choice": "required"})
    assert error["param"] == "tools[0].function.parameters" and "strin" in error["message"]


NAMED = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("choice", "told", "forced"),
    [
        ("auto", "fg", ""),
        ("any", "fg", "fg"),
        ({"type": "auto"}, "fg", ""),
        ({"type": "any"}, "fg", "fg"),
        ({"type": "required"}, "fg", "fg"),
        (NAMED, "fg", "g"),
        ({"type": "function", "name": "g"}, "fg", "g"),
        ({"type": "tool", "name": "g"}, "fg", "g"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}, "g", ""),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}, "g", "g"),
        ({"type": "allowed_tools", "mode": "any", "tools": [{"type": "function", "name": "g"}, NAMED]}, "g", "g"),
    ],
    ids=json.dumps,
)
def test_choices_of_tools(choice: Any, told: str, forced: str) -> None:
    body = {**CONVERSATION, "tools": [tool(), {"function": {"name": "g"}}], "tool_choice": choice}
    use = read_chat(body).tool_use
    assert use is not None
    assert ("".join(item.name for item in use.tools), "".join(item.name for item in use.forced)) == (told, forced)
    assert use.is_parallel is (forced != "g" or "allowed_tools" in str(choice))


def test_a_choice_that_calls_nothing() -> None:
    body = {**CONVERSATION, "tools": [tool()]}
    for choice in ("none", {"type": "none"}):
        assert read_chat({**body, "tool_choice": choice}).tool_use is None


@pytest.mark.parametrize("kind", ["web_search_preview", "custom", "code_interpreter", "mcp"])
def test_other_kinds_of_tools_are_refused_by_name(client: FlaskClient, kind: str) -> None:
    error = refusal(client, CHAT, {**CONVERSATION, "tools": [{"type": kind}]})
    assert error["code"] == "unsupported_parameter" and kind in error["message"] and error["param"] == "tools[0].type"


@pytest.mark.parametrize("kind", [None, "object", ["object", "null"], ["null", "object"]])
def test_parameters_are_an_objects(kind: Any) -> None:
    use = read_chat({**CONVERSATION, "tools": [tool(parameters={"title": "t", "type": kind})]}).tool_use
    assert use is not None and use.tools[0].parameters == {"type": "object", "title": "t"}


def test_two_forms_exclude_each_other(client: FlaskClient) -> None:
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    assert refusal(client, CHAT, {**CONVERSATION, **both})["param"] == "structured_outputs"


def test_a_schema_nested_too_deeply_is_refused(client: FlaskClient) -> None:
    for depth in (200, 400, 900):
        schema = '{"items":' * depth + "{}" + "}" * depth
        body = json.dumps({**COMPLETION, "structured_outputs": {"json": {}}}).replace('"json": {}', f'"json": {schema}')
        refusal(client, COMPLETIONS, body)
