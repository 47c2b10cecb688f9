"""The server as a process: start, signals, exit codes, and nothing left alive."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.support.fake_text_model import NAME
from tests.support.server_process import (
    PATIENCE_S,
    ROOT,
    Caller,
    ServerProcess,
    children_of,
    eventually,
    running_server,
    spawn,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: int) -> None:
    """What runs finishes, what comes is told to come back, the exit code is 0, no process is left."""
    with running_server("--step-s", "0.02") as server:
        caller = Caller(server.url, max_tokens=100)
        eventually(lambda: caller.num_chunks > 0, "the first token")
        # A terminal sends SIGINT to every process of the group.
        server.signal(number, is_group=number != signal.SIGTERM)
        eventually(lambda: httpx.get(f"{server.url}/readyz").status_code == 503, "draining")
        refused = httpx.post(f"{server.url}/v1/completions", json={"model": NAME, "prompt": "b"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "unavailable"
        assert int(refused.headers["Retry-After"]) >= 1
        caller.join(PATIENCE_S)
        assert caller.finish_reason == "length" and caller.error is None
        code, _, err = server.wait()
        assert (code, err) == (0, "")
        assert_nothing_left(server)


def test_a_drain_that_takes_too_long_ends_the_rest() -> None:
    with running_server("--step-s", "0.1", "--drain-timeout", "0.5") as server:
        caller = Caller(server.url, max_tokens=200)
        eventually(lambda: caller.num_chunks > 0, "the first token")
        server.signal(signal.SIGTERM)
        code, _, err = server.wait()
        caller.join(PATIENCE_S)
        assert code == 0 and "gave up on requests after 0.5 s" in err and err.count("\n") == 1
        assert caller.error is not None and "did not finish" in caller.error
        assert_nothing_left(server)


def test_an_idle_server_ends_at_once() -> None:
    with running_server("--drain-timeout", "60") as server:
        server.signal(signal.SIGTERM)
        assert server.wait()[0] == 0


def test_the_port_of_an_idle_server_is_free_when_it_has_ended() -> None:
    with running_server() as server:
        port = int(server.url.rpartition(":")[2])
        server.signal(signal.SIGTERM, is_group=True)
        assert server.process.wait(PATIENCE_S) == 0
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))


def test_a_second_ctrl_c_does_not_wait() -> None:
    with running_server("--step-s", "0.2", "--drain-timeout", "600") as server:
        caller = Caller(server.url, max_tokens=200)
        eventually(lambda: caller.num_chunks > 0, "the first token")
        server.signal(signal.SIGINT)
        eventually(lambda: httpx.get(f"{server.url}/readyz").status_code == 503, "draining")
        server.signal(signal.SIGINT)
        assert server.wait()[0] == 0
        caller.join(PATIENCE_S)
        assert caller.finish_reason is None
        assert_nothing_left(server)


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    process = spawn("--port", "0", "--fail-load")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2 and out == ""
    assert err == "headrace serve: this is not an artifact; export one\n"


def test_a_port_in_use_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = spawn("--port", str(port))
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2 and out == ""
    assert err.startswith(f"headrace serve: cannot listen on 127.0.0.1 port {port}: ") and err.count("\n") == 1


@pytest.mark.parametrize("flags", [("--port", "70000"), ("--host", "no.such.host.invalid"), ("--max-body", "0")])
def test_a_bad_setting_is_said_in_one_line(flags: tuple[str, str]) -> None:
    process = spawn(*flags)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2 and flags[0] in err and err.count("\n") == 1


def test_an_engine_that_fails_fails_every_request() -> None:
    with running_server("--num-slots", "1", "--step-s", "0.02", "--fail-after", "30") as server:
        callers = [Caller(server.url, max_tokens=200) for _ in range(3)]
        for caller in callers:
            caller.join(PATIENCE_S)
            assert caller.error is not None and "the session broke" in caller.error
        for path in ("/readyz", "/healthz"):
            assert httpx.get(server.url + path).status_code == 503
        server.signal(signal.SIGTERM)
        code, _, err = server.wait()
        assert code == 0 and "the session broke" in err


def test_a_worker_that_dies_is_replaced() -> None:
    with running_server() as server:
        assert server.process.stdout is not None
        (worker,) = children_of(server.process.pid)
        os.kill(worker, signal.SIGKILL)
        line = server.process.stdout.readline()
        assert server.url in line
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_a_master_that_dies_takes_the_worker_along() -> None:
    with running_server() as server:
        server.signal(signal.SIGKILL)
        server.process.wait(PATIENCE_S)
        assert_nothing_left(server)


def test_ask_prints_question_answer_and_speed() -> None:
    with running_server("--ask", "why?") as server:
        eventually(lambda: server.metric("headrace_generated_tokens_total") > 0, "the question is answered")
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        server.signal(signal.SIGTERM)
        code, out, err = server.wait()
    assert (code, err) == (0, "")
    assert "> why?" in out and f"{server.url}/v1]" in out and "the first after" in out


def test_access_log() -> None:
    """One JSON object a line, with the client's own request id, and not a word of the prompt."""
    with running_server("--access-log", "--log-format", "json") as server:
        body = {"model": NAME, "prompt": "the secret word", "max_tokens": 3, "ignore_eos": True}
        headers = {"X-Request-Id": "mine-1"}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        assert answer.headers["X-Request-Id"] == "mine-1"
        unfit = httpx.get(f"{server.url}/v1/models", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"]
        server.signal(signal.SIGTERM)
        code, out, err = server.wait()
    assert (code, err) == (0, "") and "secret" not in out
    first, second = map(json.loads, out.splitlines())
    assert first["request_id"] == "mine-1" and first["message"] == "POST /v1/completions"
    assert (first["status"], first["prompt_tokens"], first["completion_tokens"]) == (200, 15, 3)
    assert first["peer"] == second["peer"] == "127.0.0.1"
    assert 0 < first["first_token_seconds"] <= first["seconds"]
    assert second["request_id"] == unfit and unfit != "a b"


def test_prompts_are_logged_when_asked_for() -> None:
    with running_server("--access-log", "--log-prompts") as server:
        # Sent with the line end as it is, which JSON has only between its tokens.
        body = b'{"model": "%s",\n"prompt": "the secret word"}' % NAME.encode()
        httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
        server.signal(signal.SIGTERM)
        _, out, _ = server.wait()
    assert "POST /v1/completions request_id=" in out and "the secret word" in out and out.count("\n") == 1


def test_serving_what_is_not_an_artifact(tmp_path: Path) -> None:
    """The real command, all the way to the real loader in the worker."""
    command = [sys.executable, "headrace.py", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert str(tmp_path) in done.stderr and done.stderr.count("\n") == 1


def test_help_is_instant() -> None:
    """That is: it imports nothing heavy."""
    program = (
        "import sys, serve.cli; text = serve.cli.build_parser().format_help(); "
        "heavy = {'flask', 'gunicorn', 'numpy', 'onnxruntime', 'tokenizers', 'jinja2', 'prometheus_client'}; "
        "assert '--drain-timeout' in text and '--max-batch' in text; sys.exit(repr(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"


def assert_nothing_left(server: ServerProcess) -> None:
    """The process group is empty."""

    def is_gone() -> bool:
        try:
            server.signal(0, is_group=True)
        except ProcessLookupError:
            return True
        return False

    eventually(is_gone, "every process of the server has ended")
