"""The document at /openapi.json is valid and complete, and describes requests, replies and refusals as they are."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_schema_validator import OAS32Validator
from openapi_spec_validator import validate

from runtime.core import RANGES
from serve.api.openapi import document
from serve.api.tokenize import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from serve.app import create_app
from serve.fields.reading import FieldClass
from serve.fields.requests import CHAT_FIELDS, COMPLETION_FIELDS
from serve.fields.sampling import SAMPLING_NAMES
from tests.support.fake_text_model import NAME, fake_text_model

Json = dict[str, Any]
DOCUMENT = document()
COMPLETION = {"model": NAME, "prompt": "once", "max_tokens": 4}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
BODIES: dict[str, Json] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": {"prompt": "once"},
    "/detokenize": {"tokens": [1, 2]},
}


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    model = fake_text_model()
    model.start()
    yield create_app(model).test_client()
    model.close()


def check(schema: Json, value: Any) -> None:
    """Validate a value; references point into the document."""
    OAS32Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def takes(name: str, value: Any) -> bool:
    """Whether the document's schema of this name takes the value."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return bool(OAS32Validator(schema).is_valid(value))


def test_the_served_document_is_valid(client: FlaskClient) -> None:
    served = client.get("/openapi.json").get_json()
    assert served == DOCUMENT
    validate(served)
    ids = [operation["operationId"] for path in served["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[a-z0-9_]+", name) for name in ids)


def test_every_route_is_in_it_and_no_other(client: FlaskClient) -> None:
    described = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    served = {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in client.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert described == served


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("CompletionRequest", COMPLETION_FIELDS),
        ("ChatCompletionRequest", CHAT_FIELDS),
        ("TokenizeRequest", TOKENIZE_FIELDS),
        ("DetokenizeRequest", DETOKENIZE_FIELDS),
    ],
)
def test_every_field_is_in_it(name: str, table: Any) -> None:
    schema = DOCUMENT["components"]["schemas"][name]
    assert set(schema["properties"]) == {field.name for field in table}
    assert set(schema.get("required", [])) == {field.name for field in table if field.is_required}


def test_ranges_are_those_of_the_checks(client: FlaskClient) -> None:
    properties = DOCUMENT["components"]["schemas"]["CompletionRequest"]["properties"]
    own = {"top_k": -1, "top_p": 0, "seed": 1 - 2**63}  # -1 is no limit, 0 the smallest nucleus
    assert {name: properties[name]["minimum"] for name in own} == own
    ranges = {name: bounds for name, bounds in RANGES.items() if name in SAMPLING_NAMES - own.keys()}
    assert len(ranges) >= 5
    for name, bounds in ranges.items():
        lowest = properties[name].get("minimum", properties[name].get("exclusiveMinimum"))
        assert lowest == max(bounds.low, 1 - 2**63)
        if bounds.high is not None:
            assert properties[name]["maximum"] == min(bounds.high, 2**63 - 1)
            assert client.post("/v1/completions", json=COMPLETION | {name: bounds.high + 1}).status_code == 400


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{NAME}", "/healthz", "/readyz", "/status"])
def test_replies_to_questions_are_as_described(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    described = DOCUMENT["paths"][path.replace(NAME, "{model_name}")]["get"]["responses"]
    check(described[str(answer.status_code)]["content"]["application/json"]["schema"], answer.get_json())


@pytest.mark.parametrize(
    "fields", [{}, {"n": 2}, {"logprobs": 3}, {"logprobs": True, "top_logprobs": 3}, {"temperature": 0}]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_answers_and_their_streams_are_as_described(client: FlaskClient, path: str, fields: Json) -> None:
    operation = DOCUMENT["paths"][path]["post"]
    body = BODIES[path] | fields
    answer = client.post(path, json=body)
    check(operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"], answer.get_json())
    stream = client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    if answer.status_code == 200:
        item = operation["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
        chunk = item["properties"]["data"]["description"].split()[1]
        for event in stream.get_data(as_text=True).split("\n\n")[:-2]:
            check({"$ref": f"#/components/schemas/{chunk}"}, json.loads(event.removeprefix("data: ")))


@pytest.mark.parametrize("path", list(BODIES))
def test_good_bodies_are_described_and_refusals_too(client: FlaskClient, path: str) -> None:
    operation = DOCUMENT["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    check(schema, BODIES[path])
    for body in ({}, BODIES[path] | {"other": 1}, BODIES[path] | {"model": "none"}):
        answer = client.post(path, json=body)
        check(
            operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"], answer.get_json()
        )
    wrong_type = client.post(path, data="{}", content_type="text/plain")
    assert str(wrong_type.status_code) in operation["responses"]


SMALL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 30),
    st.floats(-3, 3),
    st.text(max_size=3),
    st.lists(st.integers(0, 5), max_size=2),
)


@pytest.mark.parametrize(
    ("path", "name", "table"),
    [
        ("/v1/completions", "CompletionRequest", COMPLETION_FIELDS),
        ("/v1/chat/completions", "ChatCompletionRequest", CHAT_FIELDS),
    ],
)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_the_document_refuses_the_server_refuses(
    client: FlaskClient, path: str, name: str, table: Any, data: st.DataObject
) -> None:
    """And what the server takes, the document takes. The other way is not promised: some fields exclude each other."""
    names = [*sorted(row.name for row in table if row.kind is FieldClass.SUPPORTED), "metadata", "mirostat", "other"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), SMALL, max_size=2))
    body = BODIES[path] | changes
    status = client.post(path, json=body).status_code
    assert status in (200, 400, 404) or (status == 504 and "timeout" in changes)
    if status == 200:
        assert takes(name, body), body


def test_tokenize_and_back(client: FlaskClient) -> None:
    text = "caf\u00e9 \U0001f30a"
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).get_json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == len(text.encode())
    assert answer["max_model_len"] == 256
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).get_json() == {"prompt": text}
    chat = client.post("/tokenize", json={"model": NAME, "messages": CHAT["messages"]}).get_json()
    shown = client.post("/detokenize", json={"tokens": chat["tokens"]}).get_json()["prompt"]
    assert shown == "user: hi\nassistant: "
    assert client.post("/detokenize", json={"tokens": [257]}).get_json() == {"prompt": "<|end|>"}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "either prompt or messages"),
        ("/tokenize", {"messages": CHAT["messages"], "add_special_tokens": True}, "needs prompt"),
        ("/detokenize", {"tokens": [1, 258]}, "258"),
        ("/detokenize", {"tokens": [-1]}, "-1"),
    ],
)
def test_bad_bodies_of_tokenize_are_refused(client: FlaskClient, path: str, body: Json, words: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and words in answer.get_json()["error"]["message"]


def test_a_model_says_what_it_is(client: FlaskClient) -> None:
    (model,) = client.get("/v1/models").get_json()["data"]
    assert model["precision"] == "fp32" and model["context_length"] == 256 and model["receipt"]["passed"]
