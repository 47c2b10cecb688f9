"""Who may reach the server: names in Host, addresses without keys, origins as they are written."""

from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder, run_wsgi_app

from runtime.errors import InvalidSetting
from serve.access.api_keys import KeyRing, make_key
from serve.access.middleware import Access
from serve.app import create_app
from serve.hosts import ForeignHostError, HostRule, check_exposure, is_loopback, plain_origin
from serve.settings import ServerSettings
from tests.support.fake_text_model import fake_text_model
from tests.support.server_process import PATIENCE_S, spawn

OURS = ("localhost", "localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1", "127.8.9.1:1", "[::1]", "[::1]:8000",
        "[::ffff:127.0.0.1]")  # fmt: skip
FOREIGN = ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "a@localhost",
           "localhost:80:90", "localhost:evil", "localhost evil.example", "localhost,evil.example",
           "%6cocalhost", "127.1", "2130706433", "0x7f.1", "10.0.0.1", "0.0.0.0", "[::2]", "::1", "")  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    model = fake_text_model()
    yield create_app(model).test_client()
    model.close()


@pytest.mark.parametrize("host", OURS)
def test_this_machines_own_names_are_answered(client: FlaskClient, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/healthz"), ("OPTIONS", "/v1/models"), ("POST", "/x")]
)
def test_other_names_are_not(client: FlaskClient, method: str, path: str, host: str) -> None:
    answer = client.open(path, method=method, headers={"Host": host})
    assert answer.status_code == 403
    error = answer.get_json()["error"]
    assert error["code"] == "host_not_allowed" and "--allowed-host" in error["message"]
    assert answer.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("protocol", "target", "host", "status"),
    [
        ("HTTP/1.0", "/v1/models", None, 200),
        ("HTTP/1.1", "/v1/models", None, 400),
        ("HTTP/1.1", "http://localhost:8000/v1/models", "evil.example", 200),
        ("HTTP/1.1", "http://evil.example/v1/models", "localhost", 403),
        ("HTTP/1.1", "HTTP://evil.example", "localhost", 403),
    ],
)
def test_where_the_name_is_found(
    client: FlaskClient, protocol: str, target: str, host: str | None, status: int
) -> None:
    """In Host, which HTTP/1.1 has to have; but a target that is a whole URL overrides it (RFC 9112, section 3.2)."""
    environ = EnvironBuilder(path="/v1/models").get_environ()
    del environ["HTTP_HOST"]
    environ |= {"SERVER_PROTOCOL": protocol, "RAW_URI": target} | ({} if host is None else {"HTTP_HOST": host})
    assert run_wsgi_app(client.application, environ)[1].startswith(str(status))


def test_with_keys_any_name_is_answered_unless_names_were_given() -> None:
    model = fake_text_model()
    access = Access(KeyRing([make_key("alice", "hr-alice")]))
    headers = {"Authorization": "Bearer hr-alice", "Host": "gpu.example"}
    for allowed, host, status in (
        ((), "gpu.example", 200),
        (("GPU.example.",), "gpu.example:443", 200),
        (("gpu.example",), "evil.example", 403),
        (("*",), "evil.example", 200),
    ):
        client = create_app(model, ServerSettings(allowed_host=allowed), access=access).test_client()
        assert client.get("/v1/models", headers=headers | {"Host": host}).status_code == status, (allowed, host)
    model.close()


@pytest.mark.parametrize(
    ("bound", "allowed", "host", "is_ours"),
    [
        ("0.0.0.0", (), "anything.example", True),
        ("0.0.0.0", ("gpu.example",), "evil.example", False),
        ("0.0.0.0", ("gpu.example",), "10.1.2.3:8000", True),
        ("127.0.0.1", ("gpu.example",), "gpu.example", True),
        ("127.0.0.1", ("gpu.example",), "10.1.2.3", False),
        ("::1", (), "[::1]:80", True),
        ("localhost", (), "localhost", True),
    ],
)
def test_a_rule_for_each_address(bound: str, allowed: tuple[str, ...], host: str, is_ours: bool) -> None:
    rule = HostRule(bound, allowed)
    if is_ours:
        rule.check(host, has_keys=False)
    else:
        with pytest.raises(ForeignHostError):
            rule.check(host, has_keys=False)


@pytest.mark.parametrize("host", ["", "gpu.example:80", "http://gpu.example", "*.example", "a b", "gpu.example/"])
def test_allowed_hosts_are_names(host: str) -> None:
    with pytest.raises(InvalidSetting, match="--allowed-host"):
        ServerSettings(allowed_host=(host,))


def test_beyond_this_machine_somebody_has_to_say_who_may_call() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1") and is_loopback("127.9.9.9")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("192.0.2.1")
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(InvalidSetting, match=r"--api-keys FILE .* or --allow-anonymous"):
            check_exposure(host, has_keys=False, allow_anonymous=False)
        check_exposure(host, has_keys=True, allow_anonymous=False)
        check_exposure(host, has_keys=False, allow_anonymous=True)
    check_exposure("127.0.0.1", has_keys=False, allow_anonymous=False)
    with pytest.raises(InvalidSetting, match="--allow-anonymous contradicts --api-keys"):
        ServerSettings(allow_anonymous=True, api_keys="keys")


def test_the_command_refuses_an_open_address_in_one_line() -> None:
    process = spawn("--port", "0", "--host", "0.0.0.0")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("headrace serve: --host 0.0.0.0 can be reached from other machines") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("https://chat.example", "https://chat.example"),
        ("HTTPS://Chat.Example:443", "https://chat.example"),
        ("http://chat.example:080", "http://chat.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_origins_are_compared_as_browsers_write_them(given: str, plain: str) -> None:
    assert plain_origin(given) == plain
    ServerSettings(cors_origin=(given,))


ORIGINS = ("http://localhost:3000", "http://[::1]:3000", "https://chat.example")


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        *((origin, True) for origin in ORIGINS),
        ("http://localhost", False),
        ("http://localhost:30000", False),
        ("http://localhost:3000.evil.example", False),
        ("http://x[::1]:3000", False),
        ("http://::1:3000", False),
        ("https://chat.example.evil", False),
        ("https://chatXexample", False),
        ("https://chat.example\n", False),
        ("null", False),
        ("*", False),
    ],
)
def test_only_whole_origins_are_let_in(origin: str, is_allowed: bool) -> None:
    model = fake_text_model()
    client = create_app(model, ServerSettings(cors_origin=ORIGINS)).test_client()
    answer = client.options(
        "/v1/models", environ_overrides={"HTTP_ORIGIN": origin, "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "GET"}
    )
    assert answer.headers.get("Access-Control-Allow-Origin") == (origin if is_allowed else None)
    assert "Access-Control-Allow-Origin" not in client.get("/v1/models").headers
    model.close()
