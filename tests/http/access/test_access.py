"""Access: API keys, limits, CORS and request ids."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from runtime.errors import InvalidSetting
from runtime.session.session import Batch
from serve.access.api_keys import KeyRing, make_key, new_key, read_keys
from serve.access.middleware import OPEN_ROUTES, Access
from serve.app import create_app
from serve.settings import ServerSettings
from tests.http.access.keys import ALICE, BOB, CAROL, bearer, run_key
from tests.support.fake_text_model import NAME, fake_text_model

COMPLETION = {"model": NAME, "prompt": "once", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def client() -> Iterator[FlaskClient]:
    """Alice may all she likes, Bob three requests a minute, Carol 20 tokens."""
    keys = KeyRing(
        [
            make_key("alice", ALICE, may_read_metrics=True),
            make_key("bob", BOB, requests_per_minute=3),
            make_key("carol", CAROL, tokens_per_minute=20),
        ]
    )
    model = fake_text_model()
    model.start()
    settings = ServerSettings(cors_origin=("https://chat.example",))
    yield create_app(model, settings, access=Access(keys)).test_client()
    model.close()


def complete(client: FlaskClient, secret: str, **fields: Any) -> Any:
    return client.post("/v1/completions", json=COMPLETION | fields, headers=bearer(secret), buffered=True)


@pytest.mark.parametrize("headers", [{}, bearer("hr-mallory"), bearer(""), {"Authorization": f"Basic {ALICE}"}])
def test_everything_that_tells_or_costs_something_needs_a_key(client: FlaskClient, headers: dict[str, str]) -> None:
    rules = {rule.rule for rule in client.application.url_map.iter_rules()}
    for route in [*sorted(rules - OPEN_ROUTES), "/nowhere"]:
        for method in ("GET", "POST"):
            answer = client.open(route.replace("<path:model_name>", NAME), method=method, headers=headers)
            assert answer.status_code == 401, route
            assert answer.get_json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer" and answer.headers["X-Request-Id"]
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_a_key_opens(client: FlaskClient) -> None:
    answer = complete(client, ALICE)
    assert answer.status_code == 200
    assert not [name for name, _ in answer.headers if name.startswith("x-ratelimit")]
    assert client.get("/metrics", headers=bearer(ALICE)).status_code == 200


def test_figures_of_all_keys_are_for_a_key_that_may_read_them(client: FlaskClient) -> None:
    """What others' prompts are long follows from the differences of sums."""
    refused = client.get("/metrics", headers=bearer(BOB))
    assert refused.status_code == 403 and "--metrics" in refused.get_json()["error"]["message"]
    running = client.post(
        "/v1/completions", json=COMPLETION | {"stream": True, "max_tokens": 200}, headers=bearer(ALICE)
    )
    seen = {
        secret: client.get("/status", headers=bearer(secret)).get_json()["models"][0] for secret in (ALICE, BOB, CAROL)
    }
    running.close()
    assert seen[ALICE]["kv_tokens_used"] >= len("once")
    assert seen[BOB]["kv_tokens_used"] == seen[CAROL]["kv_tokens_used"] == 0
    assert seen[BOB]["running"] == 1, "how many there are is told"


@pytest.mark.parametrize("is_broken", [False, True])
def test_open_routes_name_models_and_errors_to_those_with_a_key(*, is_broken: bool) -> None:
    def run(_: Batch) -> None:
        if is_broken:
            raise RuntimeError("a secret path")

    model = fake_text_model(on_run=run)
    model.start()
    client = create_app(model, access=Access(KeyRing([make_key("alice", ALICE)]))).test_client()
    complete(client, ALICE)
    for path in ("/readyz", "/healthz", "/health"):
        open_answer, own = client.get(path), client.get(path, headers=bearer(ALICE))
        assert open_answer.status_code == own.status_code == (503 if is_broken else 200)
        assert "secret" not in open_answer.text and NAME not in open_answer.text
        assert client.get(path, headers=bearer("hr-wrong")).text == open_answer.text
        told = {"healthz": '"ok"', "health": '"ok"', "readyz": NAME}[path[1:]]
        assert ("secret path" if is_broken else told) in own.text
    model.close()


def test_requests_beyond_the_limit_are_told_when_to_come_back(client: FlaskClient) -> None:
    for left in (2, 1, 0):
        answer = complete(client, BOB)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert 0 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    refused = complete(client, BOB)
    assert refused.status_code == 429 and refused.get_json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    # What costs nothing is not limited, and nobody else is.
    assert client.get("/v1/models", headers=bearer(BOB)).status_code == 200
    assert complete(client, ALICE).status_code == 200


def test_tokens_are_booked_when_the_answer_has_ended(client: FlaskClient) -> None:
    first = complete(client, CAROL)
    # The headers go out before the answer: the prompt's four tokens are booked by then.
    assert first.headers["x-ratelimit-remaining-tokens"] in ("16", "8")
    assert complete(client, CAROL).status_code == 200
    refused = complete(client, CAROL)
    assert refused.status_code == 429 and "20 tokens" in refused.get_json()["error"]["message"]
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


def test_a_prompt_must_fit_in_what_is_left(client: FlaskClient) -> None:
    never = complete(client, CAROL, prompt="x" * 21)
    assert never.status_code == 400 and "21 tokens" in never.get_json()["error"]["message"]
    assert complete(client, CAROL, prompt="x" * 12, max_tokens=1).status_code == 200
    assert complete(client, CAROL, prompt="x" * 12, max_tokens=1).status_code == 429
    assert complete(client, CAROL, prompt="x" * 6, max_tokens=1).status_code == 200


def test_nobody_finds_anothers_prompt_in_the_prefix_cache() -> None:
    """Reuse is seen in the usage and in the time to the first token; it is within a key, and there within a salt."""
    model = fake_text_model(capacity=256, prefix_cache=10**6)
    model.start()
    keys = KeyRing([make_key("alice", ALICE), make_key("bob", BOB)])
    client = create_app(model, access=Access(keys)).test_client()

    def num_cached(secret: str, **fields: Any) -> int:
        answer = complete(client, secret, prompt="the launch code is 7319, tell nobody about it. " * 2, **fields)
        cached: int = answer.get_json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    assert [num_cached(ALICE) for _ in range(2)] == [0, 64]
    assert [num_cached(BOB) for _ in range(2)] == [0, 64]
    # A salt is no way into another's cache: neither a name nor what separates it from the salt.
    for guess in ("alice", "alice\0", "\0", "", "bob"):
        assert num_cached(BOB, cache_salt=guess) == (0 if guess else 64), guess
    assert num_cached(ALICE, cache_salt="team") == 0
    assert num_cached(ALICE, cache_salt="team") == 64
    model.close()


def test_pages_of_other_origins_may_not_read(client: FlaskClient) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = client.options("/v1/chat/completions", headers={"Origin": "https://chat.example", **asked})
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert "Access-Control-Allow-Credentials" not in allowed.headers
    for origin in ("https://evil.example", "https://chat.example.evil", "null", "http://chat.example"):
        refused = client.options("/v1/chat/completions", headers={"Origin": origin, **asked})
        assert "Access-Control-Allow-Origin" not in refused.headers
    answer = client.get("/v1/models", headers={"Origin": "https://chat.example", **bearer(ALICE)})
    assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]


def test_cors_is_off_by_default() -> None:
    model = fake_text_model()
    model.start()
    headers = {"Origin": "http://localhost", "Access-Control-Request-Method": "POST"}
    answer = create_app(model).test_client().options("/v1/completions", headers=headers)
    assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]
    model.close()


@pytest.mark.parametrize(
    "origin",
    [
        *("chat.example", "https://chat.example/", "ftp://chat.example", "null", "", "https://", "https://a@b.example"),
        *(
            "http://localhost:*",
            "https://*.example.com",
            "https://(a|b).example",
            "https://chat.example?",
            "http://[::1",
        ),
        *("http://chat.example:99999", "https://ch\u00e4t.example", "https://chat.example\n", "*.example"),
    ],
)
def test_origins_are_origins(origin: str) -> None:
    with pytest.raises(InvalidSetting, match="--cors-origin"):
        ServerSettings(cors_origin=(origin,))


def test_a_key_is_made_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    _, first = run_key("alice", "--file", str(file))
    limits = ("--requests-per-minute", "5", "--tokens-per-minute", "900", "--metrics")
    _, second = run_key("bob", "--file", str(file), *limits)
    assert first != second and len(first) > 40
    assert first not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    ring = KeyRing(read_keys(file))
    found = ring.find(second)
    assert found is not None
    assert (found.name, found.requests_per_minute, found.tokens_per_minute) == ("bob", 5, 900)
    assert found.may_read_metrics
    assert ring.find(first + "x") is None and ring.find("") is None
    assert run_key("bob", "--file", str(file))[0] == run_key("a b", "--file", str(file))[0] == 2
    assert run_key("eve", "--file", str(file), "--tokens-per-minute", "0")[0] == 2
    assert len(read_keys(file)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no keys"),
        ("# nobody\n", "has no keys"),
        ("alice\n", ":1: a line is NAME SHA256"),
        ("alice hr-the-key-itself\n", ":1: a line is NAME SHA256"),
        ("# x\nalice " + "0" * 64 + " per-day=4\n", ":2: 'per-day=4' is not one of requests-per-minute=N"),
        ("alice " + "0" * 64 + " tokens-per-minute=-1\n", "tokens-per-minute=-1"),
    ],
)
def test_a_bad_file_of_keys_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InvalidSetting) as caught:
        read_keys(file)
    assert words in str(caught.value)


def test_the_hash_is_plain_sha256_so_that_any_tool_can_make_one() -> None:
    secret = new_key()
    assert make_key("a", secret).sha256 == hashlib.sha256(secret.encode()).hexdigest()
