"""Constraints over HTTP and in batches: valid answers whatever the model would like to say, and nobody else disturbed.

The fake model's logits are random, so every valid answer is the constraint's doing.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator

from runtime.core import Constraint, ConstraintKind, FinishReason, SamplingParams
from runtime.grammar import guide as token_guide
from runtime.text_model import TextModel
from serve.app import create_app
from tests.support.fake_session import prefix_logits
from tests.support.fake_text_model import NAME, VOCAB_SIZE, fake_text_model

Json = dict[str, Any]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PERSON: Json = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMATS: list[tuple[Json, str]] = [
    ({"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}}, r"[a-f]{3}-[0-9]{2}"),
    ({"structured_outputs": {"choice": ["left", "right", "up"]}}, "left|right|up"),
    ({"structured_outputs": {"grammar": 'start: "x" /[0-9]{4}/ ";"'}}, r"x[0-9]{4};"),
    ({"structured_outputs": {"grammar": 'root ::= "x" [0-9] ";"'}}, r"x[0-9];"),
    ({"structured_outputs": {"json": json.dumps({"type": "boolean"})}}, "true|false"),
    ({"structured_outputs": {"json": {"enum": [1, 2]}, "json_object": False}}, "1|2"),
    ({"guided_json": {"enum": [1, 2]}, "grammar": ""}, "1|2"),
    ({"guided_json": json.dumps({"enum": [1, 2]})}, "1|2"),
    ({"guided_regex": "[a-f]{3}-[0-9]{2}", "response_format": {"type": "text"}}, r"[a-f]{3}-[0-9]{2}"),
    ({"guided_choice": ["left", "right"], "guided_regex": ""}, "left|right"),
    ({"guided_grammar": 'start: "x" /[0-9]{4}/ ";"'}, r"x[0-9]{4};"),
    ({"json_schema": {"enum": [1, 2]}}, "1|2"),
    ({"grammar": 'root ::= "x" [0-9] ";"'}, r"x[0-9];"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 7}}}}, "7"),
]


@pytest.fixture(scope="module")
def model() -> Iterator[TextModel]:
    model = fake_text_model(num_slots=8, capacity=512)
    model.start()
    yield model
    model.close()


@pytest.fixture(scope="module")
def client(model: TextModel) -> FlaskClient:
    return create_app(model).test_client()


def ask(client: FlaskClient, path: str, **fields: Any) -> Json:
    start: Json = {"prompt": "go"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "go"}]}
    response = client.post(path, json={"model": NAME, "max_tokens": 300, **start, **fields})
    assert response.status_code == 200, response.text
    choice: Json = response.get_json()["choices"][0]
    return choice


def text_of(choice: Json) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fields", "pattern"), FORMATS)
def test_every_kind_on_both_routes(client: FlaskClient, path: str, fields: Json, pattern: str) -> None:
    for sampling in ({"temperature": 0}, {"temperature": 1.5, "seed": 3, "top_p": 0.9, "top_k": 20, "min_p": 0.01}):
        choice = ask(client, path, **fields, **sampling)
        assert re.fullmatch(pattern, text_of(choice)), text_of(choice)
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_json_whole_and_streamed(client: FlaskClient, path: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    whole = ask(client, path, response_format=wanted, seed=4)
    Draft202012Validator(PERSON).validate(json.loads(text_of(whole)))
    start: Json = {"prompt": "go"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "go"}]}
    body = {"model": NAME, "max_tokens": 300, **start, "response_format": wanted, "seed": 4, "stream": True}
    events = client.post(path, json=body).get_data(as_text=True).split("\n\n")[:-2]
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    streamed = "".join(p.get("text", "") or p.get("delta", {}).get("content", "") for p in pieces)
    assert streamed == text_of(whole) and pieces[-1]["finish_reason"] == "stop"


def test_json_object_is_any_object(client: FlaskClient) -> None:
    choice = ask(client, CHAT, response_format={"type": "json_object"}, temperature=1, seed=1)
    cut = choice["finish_reason"] == "length"
    assert text_of(choice).startswith("{") and (cut or isinstance(json.loads(text_of(choice)), dict))


def test_an_answer_cut_short_says_so(client: FlaskClient) -> None:
    choice = ask(client, CHAT, structured_outputs={"regex": "[0-9]{50}"}, max_tokens=20)
    assert choice["finish_reason"] == "length" and len(text_of(choice)) == 20
    choice = ask(client, CHAT, structured_outputs={"regex": "[0-9]{20}"}, max_tokens=20)
    assert choice["finish_reason"] == "stop"


def test_stop_strings_end_an_answer_early(client: FlaskClient) -> None:
    choice = ask(client, COMPLETIONS, structured_outputs={"regex": "[a-c]{200}"}, stop="b", temperature=0)
    assert choice["finish_reason"] == "stop" and "b" not in text_of(choice) and len(text_of(choice)) < 200


def test_an_end_of_text_that_is_ignored_still_ends_the_form(client: FlaskClient) -> None:
    choice = ask(client, COMPLETIONS, structured_outputs={"regex": "a+"}, ignore_eos=True, max_tokens=400)
    assert re.fullmatch("a+", text_of(choice)) and choice["finish_reason"] == "stop"


def test_log_probabilities_are_the_models_own(model: TextModel) -> None:
    prompt_ids = model.encode("go")
    constraint = Constraint(ConstraintKind.REGEX, "[0-9]{6}", "x")
    params = SamplingParams(max_tokens=50, temperature=0, logprobs=3, constraint=constraint)
    ids = list(prompt_ids)
    for event in model.generate(prompt_ids, params):
        assert event.token_id is not None and event.logprob is not None
        row = prefix_logits(np.array(ids), VOCAB_SIZE).astype(np.float64)
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert event.logprob == pytest.approx(logprobs[event.token_id], abs=1e-5)
        assert event.top_logprobs[0].token_id == int(row.argmax())
        ids.append(event.token_id)
    assert len(ids) == len(prompt_ids) + 6


def test_mixed_requests_in_one_batch_get_what_each_gets_alone(model: TextModel) -> None:
    """Greedy, sampled, penalized; free and in five forms: 24 requests on 8 slots."""
    forms = [
        None,
        Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(PERSON), "x"),
        Constraint(ConstraintKind.REGEX, "([a-z]{3} ){1,9}", "x"),
        Constraint(ConstraintKind.CHOICE, '["one", "two"]', "x"),
        Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}', "x"),
        None,
    ]
    params = [
        SamplingParams(max_tokens=30, constraint=form, **kind)
        for form in forms
        for kind in (
            {"temperature": 0.0},
            {"temperature": 1.0, "seed": 5},
            {"temperature": 0.8, "seed": 6, "top_p": 0.9, "logprobs": 2},
            {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.3, "logit_bias": {65: 4.0}},
        )
    ]

    def tokens(number: int) -> list[tuple[int | None, FinishReason | None]]:
        events = model.generate(model.encode(f"prompt {number}"), params[number])
        return [(event.token_id, event.finish_reason) for event in events]

    alone = [tokens(number) for number in range(len(params))]
    with ThreadPoolExecutor(len(params)) as pool:
        assert list(pool.map(tokens, range(len(params)))) == alone


def test_a_form_too_complex_to_follow_is_the_requests_fault(
    client: FlaskClient, model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_guide, "FREE_S", -1.0)
    body = {"model": NAME, "prompt": "go", "structured_outputs": {"regex": "[a-z]{99}"}}
    response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 400
    error = response.get_json()["error"]
    assert error["param"] == "structured_outputs.regex" and "too complex" in error["message"]
    events = client.post(COMPLETIONS, json={**body, "stream": True}).get_data(as_text=True)
    assert '"param":"structured_outputs.regex"' in events
    assert model.is_ready and client.post(COMPLETIONS, json={"model": NAME, "prompt": "go"}).status_code == 200
