"""Names that models answer to, and paths as clients write them."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from runtime.errors import InvalidSetting
from serve.api.routes import canonical
from serve.app import create_app
from serve.model_registry import ModelRegistry, ModelSource
from serve.settings import ServerSettings
from tests.support.fake_text_model import NAME, fake_text_model
from tests.support.server_process import spawn

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
CONVERSATION: Json = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    """A model with two further names."""
    model = fake_text_model()
    model.start()
    yield create_app(model, ServerSettings(alias=("gpt-4o", f"org/small={NAME}"))).test_client()
    model.close()


@pytest.fixture(scope="module")
def open_minded() -> Iterator[FlaskClient]:
    """A model that answers to any name."""
    model = fake_text_model()
    model.start()
    yield create_app(model, ServerSettings(any_model_name=True)).test_client()
    model.close()


def test_an_alias_answers_as_the_model(client: FlaskClient) -> None:
    for name in (NAME, "gpt-4o", "org/small"):
        answer = client.post(CHAT, json={**CONVERSATION, "model": name}).get_json()
        assert answer["model"] == NAME
    listed = client.get("/v1/models").get_json()["data"]
    assert [(item["id"], item.get("root")) for item in listed] == [(NAME, None), ("gpt-4o", NAME), ("org/small", NAME)]
    one = client.get("/v1/models/org/small").get_json()
    assert one == listed[2] and one["max_model_len"] == listed[0]["max_model_len"]


def test_other_names_are_not_found_and_told_the_names_there_are(client: FlaskClient) -> None:
    response = client.post(CHAT, json={**CONVERSATION, "model": "gpt-3.5-turbo"})
    error = response.get_json()["error"]
    assert response.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
    for word in ("gpt-3.5-turbo", NAME, "gpt-4o", "org/small", "--alias", "--any-model-name"):
        assert word in error["message"]
    response = client.post(CHAT, json=CONVERSATION)
    assert response.status_code == 400 and response.get_json()["error"]["message"] == "model is required"


def test_any_name_and_none_at_all_are_answered_by_the_first_model(open_minded: FlaskClient) -> None:
    for more in ({"model": "gpt-3.5-turbo"}, {"model": ""}, {"model": None}, {}):
        for path, body in ((CHAT, CONVERSATION), ("/v1/completions", {"prompt": "a", "max_tokens": 1})):
            answer = open_minded.post(path, json={**body, **more}).get_json()
            assert answer["model"] == NAME
    assert open_minded.get("/v1/models/gpt-4").get_json()["id"] == NAME
    error = open_minded.post(CHAT, json={**CONVERSATION, "model": 5}).get_json()["error"]
    assert error["message"] == "model must be a string, got 5"


@pytest.mark.parametrize(
    ("aliases", "words"),
    [
        (["x=none"], "'a' or 'b'; got 'x=none'"),
        (["=a"], "NAME or NAME=MODEL"),
        ([""], "NAME or NAME=MODEL"),
        (["b"], "'b' is taken"),
        (["x", "x=b"], "'x' is taken"),
    ],
)
def test_bad_aliases(aliases: list[str], words: str) -> None:
    source = ModelSource(lambda _: fake_text_model())
    with pytest.raises(InvalidSetting, match=r"--alias") as refused:
        ModelRegistry({"a": source, "b": source}, aliases=aliases)
    assert words in str(refused.value)


def test_a_bad_alias_ends_the_server_with_one_line() -> None:
    process = spawn("--port", "0", "--alias", "x=none")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and errors.count("\n") == 1 and "--alias" in errors


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/chat/completions", CHAT),
        ("/v1/chat/completions/", CHAT),
        ("//v1/chat/completions", CHAT),
        ("/v1//chat/completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("/completions", "/v1/completions"),
        ("/models/", "/v1/models"),
        ("/models/org/small", "/v1/models/org/small"),
        ("/v1/tokenize", "/tokenize"),
        ("/", "/"),
        ("/v1", "/v1"),
        ("//metrics", "//metrics"),
        ("/page//app.js", "/page//app.js"),
        ("/v1/chat", "/v1/chat"),
        ("/x/v1/completions", "/x/v1/completions"),
    ],
)
def test_spellings_of_paths(path: str, route: str) -> None:
    assert canonical(path) == route


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions/", "//v1/chat/completions"])
def test_a_body_is_answered_under_any_of_them(client: FlaskClient, path: str) -> None:
    environ = {"PATH_INFO": path}  # the test client would read the host out of `//`
    response = client.post(environ_overrides=environ, json={**CONVERSATION, "model": NAME}, buffered=True)
    assert response.status_code == 200 and response.get_json()["choices"]
    # Keys, limits, logs and metrics go by the route, so no spelling passes them by.
    metrics = client.get("/metrics").get_data(as_text=True)
    assert set(re.findall(r'headrace_http_responses_total\{route="([^"]*completions[^"]*)"', metrics)) == {CHAT}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/responses", "OpenAI's Responses"),
        ("/v1/messages", "Anthropic's Messages"),
        ("/v1/embeddings", "embeddings"),
        ("/api/chat", "Ollama's API"),
        ("/v1/audio/speech", "speech"),
        ("/nothing\u20ac\n", "POST"),
    ],
)
def test_a_wrong_path_is_told_the_routes(client: FlaskClient, path: str, words: str) -> None:
    response = client.post(path, json={"model": NAME})
    message = response.get_json()["error"]["message"]
    assert response.status_code == 404 and words in message and "\n" not in message
    for route in (f"POST {CHAT}", "POST /v1/completions", "GET /v1/models/NAME", "GET /openapi.json"):
        assert route in message
    assert "OPTIONS" not in message


def test_a_missing_file_of_the_page_is_not_told_about_routes(client: FlaskClient) -> None:
    response = client.get("/page/none.js")
    assert response.status_code == 404 and "routes" not in response.get_json()["error"]["message"]


def test_a_wrong_method_is_told_the_right_one(client: FlaskClient) -> None:
    response = client.get(CHAT)
    assert response.status_code == 405 and "POST" in response.headers["Allow"]
    assert response.get_json()["error"]["message"] == f"the method of {CHAT} must be POST, got GET"
    assert "must be GET, got DELETE" in client.delete("/v1/models").get_json()["error"]["message"]
