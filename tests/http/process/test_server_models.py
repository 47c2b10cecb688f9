"""Several models in one server process: loading, choosing, reloading under load."""

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from runtime.errors import HeadraceError, InvalidArtifact, InvalidSetting
from runtime.settings import EngineSettings
from runtime.text_model import MemoryUse
from serve.cli import build_parser, like_before, open_artifacts, stamp_of
from tests.support.server_process import PATIENCE_S, READY, ROOT, eventually, running_server, spawn


def test_the_server_answers_while_a_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = spawn("--port", str(port), "--load-s", "2.5")
    url = f"http://127.0.0.1:{port}"
    try:

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/healthz").status_code == 200
            except httpx.ConnectError:
                return False

        eventually(answers, "the process answers")
        ready = httpx.get(f"{url}/readyz")
        assert ready.status_code == 503 and "fake is loading" in ready.json()["reason"]
        assert httpx.get(f"{url}/v1/models").json()["data"] == []
        body = {"model": "fake", "prompt": "a"}
        early = httpx.post(f"{url}/v1/completions", json=body)
        assert early.status_code == 503 and "still loading" in early.json()["error"]["message"]
        assert "headrace_kv_slots" in httpx.get(f"{url}/metrics").text
        eventually(lambda: httpx.get(f"{url}/readyz").status_code == 200, "the model is loaded")
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0


def test_each_request_gets_the_model_it_names() -> None:
    with running_server("--models", "one", "two") as server:
        assert READY.match(server.process.stdout.readline() if server.process.stdout else "")
        assert [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["one", "two"]
        for name in ("one", "two"):
            body = {"model": name, "prompt": "a", "max_tokens": 3, "ignore_eos": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body)
            assert answer.json()["model"] == name
        missing = httpx.post(f"{server.url}/v1/completions", json={"model": "three", "prompt": "a"})
        assert missing.status_code == 404 and '"one", "two"' in missing.json()["error"]["message"]
        text = httpx.get(f"{server.url}/metrics").text
        for name in ("one", "two"):
            assert f'headrace_requests_finished_total{{model="{name}",reason="length"}} 1.0' in text
        assert text.count("# TYPE headrace_generated_tokens_total counter") == 1


class Hammer(threading.Thread):
    """Sends one request after another until it is told to stop; keeps every answer."""

    def __init__(self, url: str, *, is_stream: bool) -> None:
        super().__init__()
        self.outcomes: list[Any] = []
        self.is_done = threading.Event()
        self._url = f"{url}/v1/completions"
        self._body = {"model": "fake", "prompt": "a", "max_tokens": 30, "ignore_eos": True, "stream": is_stream}
        self.start()

    def run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self.is_done.is_set():
                answer = client.post(self._url, json=self._body)
                is_whole = '"finish_reason":"length"' in answer.text
                self.outcomes.append(answer.status_code if is_whole else answer.text)


def test_a_reload_drops_no_request() -> None:
    with running_server("--step-s", "0.002", "--load-s", "0.2", "--num-slots", "8") as server:
        hammers = [Hammer(server.url, is_stream=number % 2 == 0) for number in range(6)]
        created = [httpx.get(f"{server.url}/v1/models").json()["data"][0]["created"]]
        for _ in range(3):
            done = sum(len(hammer.outcomes) for hammer in hammers)
            server.signal(signal.SIGHUP)
            eventually(lambda: sum(len(hammer.outcomes) for hammer in hammers) > done + 40, "requests go on")  # noqa: B023
        for hammer in hammers:
            hammer.is_done.set()
        for hammer in hammers:
            hammer.join(PATIENCE_S)
        outcomes = [outcome for hammer in hammers for outcome in hammer.outcomes]
        assert len(outcomes) > 120 and set(outcomes) == {200}
        eventually(
            lambda: httpx.get(f"{server.url}/v1/models").json()["data"][0]["created"] > created[0], "the model is new"
        )
        assert server.metric("headrace_requests_running") == 0
        server.signal(signal.SIGTERM)
        code, _, err = server.wait()
        assert code == 0 and err.count("reload: fake was replaced") >= 2


def test_a_reload_that_fails_leaves_the_old_model() -> None:
    with running_server("--fail-reload", "--log-format", "json") as server:
        server.signal(signal.SIGHUP)
        assert server.process.stderr is not None
        assert '"reload: fake stays as it was: this is not an artifact' in server.process.stderr.readline()
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_a_reload_takes_new_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    main = [sys.executable, "headrace.py", "key", "--file", str(file)]
    old = subprocess.run([*main, "old"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    with running_server("--api-keys", str(file)) as server:

        def status(secret: str) -> int:
            return httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code

        assert (status(old), status("hr-none")) == (200, 401)
        new = subprocess.run([*main, "new"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        file.write_text("\n".join(line for line in file.read_text().splitlines() if line.startswith("new ")))
        assert status(new) == 401
        server.signal(signal.SIGHUP)
        eventually(lambda: status(new) == 200, "the new key opens")
        assert status(old) == 401
        file.write_text("")
        server.signal(signal.SIGHUP)
        eventually(lambda: status(new) == 401, "without keys nobody is let in")


def test_a_model_whose_files_are_the_same_stays(tmp_path: Path) -> None:
    stamp = tmp_path / "stamp"
    stamp.write_text("1")
    with running_server("--stamp", str(stamp)) as server:
        assert server.process.stderr is not None
        for text, words in (("1", "fake is unchanged"), ("2", "fake was replaced"), ("2", "fake is unchanged")):
            stamp.write_text(text)
            server.signal(signal.SIGHUP)
            assert words in server.process.stderr.readline()
        stamp.unlink()


def test_an_artifact_has_changed_when_it_was_written_anew_or_has_another_engine(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    stamps = [stamp_of(tmp_path), stamp_of(tmp_path)]
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "a.plan").write_text("plan")
    stamps.append(stamp_of(tmp_path))
    (tmp_path / "manifest.json").write_text("{ }")
    stamps.append(stamp_of(tmp_path))
    assert stamps[0] == stamps[1] and stamps[1] != stamps[2] != stamps[3]
    with pytest.raises(InvalidArtifact, match="is not an artifact any more"):
        stamp_of(tmp_path / "gone")


def test_a_reload_gets_the_memory_of_the_first_load() -> None:
    before = MemoryUse(kv_bytes=10**9, prefix_cache_bytes=10**8)
    assert like_before(EngineSettings(), before) == EngineSettings(kv_memory=10**9, prefix_cache=10**8)
    given = EngineSettings(kv_memory=5, prefix_cache=0)
    assert like_before(given, before) == given


def test_a_terminal_that_is_closed_takes_its_server_along() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fake_server", "--port", "0"],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    os.close(slave)
    assert process.stdout is not None and READY.match(process.stdout.readline())
    os.close(master)
    # The kernel sends it only to the session that owns the terminal; the test's process does instead.
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give an artifact directory"),
        (["--model", "name"], "--model must be NAME=PATH"),
        (["--model", "a=x", "--model", "a=y"], "two models are named 'a'"),
        (["--model", "a=x", "--name", "b"], "--name is for the artifact"),
        (["/no/such/artifact"], "is not a directory"),
    ],
)
def test_bad_models_are_said_in_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(HeadraceError, match=words) as caught:
        open_artifacts(build_parser().parse_args(argv))
    assert "\n" not in str(caught.value)


def test_open_files_are_checked_before_anything_is_loaded() -> None:
    process = spawn("--max-connections", str(10**8))
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2 and "--max-connections" in err and err.count("\n") == 1
    with pytest.raises(InvalidSetting, match="--max-connections"):
        read_settings("--max-connections", "3")


def read_settings(*argv: str) -> Any:
    from runtime.settings import from_namespace
    from serve.settings import ServerSettings

    return from_namespace(ServerSettings, build_parser().parse_args(["x", *argv]))
