"""Rights of an API key: priorities and limits, what a refused request costs, and that a revoked key stops working."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from runtime.core import RequestOptions
from runtime.engine.engine import Engine
from runtime.errors import InvalidSetting
from serve.access.api_keys import KeyRing, make_key, read_keys, reread_keys
from serve.access.middleware import Access
from serve.app import create_app
from serve.settings import ServerSettings
from tests.http.access.keys import ALICE, BOB, CAROL, bearer, run_key
from tests.support.engine_requests import Recorder, add, greedy
from tests.support.fake_session import FakeSession
from tests.support.fake_text_model import NAME, fake_text_model
from tests.support.server_process import eventually

KEYS = [
    make_key("alice", ALICE, priority=-5),
    make_key("bob", BOB, requests_per_minute=2, requests_at_once=1),
    make_key("carol", CAROL, tokens_per_minute=100),
]
GENERATE = {"model": NAME, "prompt": "once", "max_tokens": 4, "ignore_eos": True}
HASH = "0" * 64


@pytest.fixture
def access() -> Access:
    return Access(KeyRing(KEYS))


@pytest.fixture
def client(access: Access) -> Iterator[FlaskClient]:
    model = fake_text_model(max_waiting=1, num_slots=2, step_s=0.002)
    model.start()
    yield create_app(model, access=access).test_client()
    model.close()


def post(client: FlaskClient, secret: str, *, is_read: bool = True, **fields: Any) -> Any:
    return client.post("/v1/completions", json=GENERATE | fields, headers=bearer(secret), buffered=is_read)


REFUSED: list[dict[str, Any]] = [
    {"temperature": 9},
    {"prompt": [10**6]},
    {"max_tokens": 10**6},
    {"n": 16},  # more than the queue holds: 429
    {"model": "none"},
    {"priority": -1},
]


@pytest.mark.parametrize("fields", REFUSED, ids="-".join)
def test_a_refused_request_costs_nothing(client: FlaskClient, fields: dict[str, Any]) -> None:
    for secret in (BOB, CAROL):
        for _ in range(3):
            assert post(client, secret, **fields).status_code in (400, 404, 429)
    eventually(lambda: post(client, ALICE).status_code == 200, "cancelled requests have left the queue")
    answer = post(client, CAROL)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-remaining-tokens"] in ("96", "92"), "the prompt, and the answer if it has ended"
    assert [post(client, BOB).status_code for _ in range(3)] == [200, 200, 429]


def test_a_prompt_that_no_minute_has_room_for_is_blamed_on_its_own_field(client: FlaskClient) -> None:
    chat = {"model": NAME, "messages": [{"role": "user", "content": "x" * 120}], "max_tokens": 4}
    answer = client.post("/v1/chat/completions", json=chat, headers=bearer(CAROL))
    assert answer.status_code == 400 and answer.get_json()["error"]["param"] == "messages"
    assert post(client, CAROL, prompt="x" * 120).get_json()["error"]["param"] == "prompt"


def test_a_key_may_have_a_limit_of_requests_at_once(client: FlaskClient) -> None:
    running = post(client, BOB, is_read=False, stream=True, max_tokens=200)
    next(running.iter_encoded())
    refused = post(client, BOB)
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
    assert "may have 1 at once" in refused.get_json()["error"]["message"]
    assert post(client, ALICE).status_code == 200
    running.close()
    assert post(client, BOB).status_code == 200


def test_urgency_is_a_right(client: FlaskClient) -> None:
    for secret, priority, status in (
        (ALICE, -5, 200),
        (ALICE, 100, 200),
        (ALICE, -6, 400),
        (BOB, 0, 200),
        (BOB, -1, 400),
    ):
        answer = post(client, secret, priority=priority)
        assert answer.status_code == status, (secret, priority)
        if status == 400:
            assert answer.get_json()["error"]["param"] == "priority"
            assert f"got {priority}" in answer.get_json()["error"]["message"]


@pytest.mark.parametrize(("everybody", "status"), [(0, 400), (-10, 200)])
def test_without_keys_the_server_says_who_may_be_urgent(everybody: int, status: int) -> None:
    model = fake_text_model()
    model.start()
    client = create_app(model, ServerSettings(priority=everybody)).test_client()
    assert client.post("/v1/completions", json=GENERATE | {"priority": -10}).status_code == status
    model.close()
    with pytest.raises(InvalidSetting, match="--priority must be -100 to 100, got -101"):
        ServerSettings(priority=-101)


def test_a_slot_goes_to_the_tenant_that_has_the_fewest() -> None:
    engine = Engine(FakeSession(num_slots=2))
    finished: list[str] = []
    recorders: dict[str, Recorder] = {}
    for name, tenant, priority in (
        ("a1", "a", 0), ("a2", "a", 0), ("a3", "a", 0), ("a4", "a", 0), ("b1", "b", 0), ("late", "c", 1)
    ):  # fmt: skip
        recorders[name] = add(engine, name, [1], greedy(3), options=RequestOptions(tenant=tenant, priority=priority))
    while engine.has_work:
        engine.step()
        finished += [name for name, item in recorders.items() if item.is_done and name not in finished]
    assert finished == ["a1", "b1", "a2", "a3", "a4", "late"]


def test_a_key_that_was_taken_back_ends_what_runs(client: FlaskClient, access: Access) -> None:
    running = post(client, BOB, is_read=False, stream=True, max_tokens=200)
    chunks = running.iter_encoded()
    next(chunks)
    others = post(client, ALICE, is_read=False, stream=True, max_tokens=20)
    access.replace_keys(KeyRing(KEYS[:1]))
    last = [json.loads(line[6:]) for line in b"".join(chunks).split(b"\n\n") if line.startswith(b"data: {")][-1]
    assert last["error"]["code"] == "invalid_api_key" and "bob was revoked" in last["error"]["message"]
    assert post(client, BOB).status_code == 401
    assert b'"finish_reason":"length"' in others.get_data()
    access.replace_keys(KeyRing())
    assert post(client, ALICE).status_code == 401


@pytest.mark.parametrize(
    ("text", "names", "num_problems"),
    [
        ("", [], 0),
        ("# nobody any more\n", [], 0),
        (f"alice {HASH}\nbob {HASH[1:]}\n", ["alice"], 1),
        (f"alice {HASH} priority=high\nbob {HASH}\n", ["bob"], 1),
        (f"alice {HASH}bob {HASH}\n", [], 1),
        ("\udcff", [], 1),
        (None, [], 1),
    ],
)
def test_while_the_server_runs_only_what_stands_in_the_file_opens(
    tmp_path: Path, text: str | None, names: list[str], num_problems: int
) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    keys, problems = reread_keys(file)
    assert [key.name for key in keys] == names
    assert len(problems) == num_problems and all("\n" not in problem for problem in problems)


def test_a_key_is_added_behind_a_line_without_an_end(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {HASH}")
    assert run_key("bob", "--file", str(file), "--priority", "-7", "--requests-at-once", "3")[0] == 0
    alice, bob = read_keys(file)
    assert (alice.name, bob.name, bob.priority, bob.requests_at_once) == ("alice", "bob", -7, 3)
    assert run_key("eve", "--file", str(file), "--priority", "-101")[0] == 2
