"""Starts the real server command in a process of its own and talks to it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.support.fake_text_model import NAME

ROOT = Path(__file__).parents[2]
READY = re.compile(r"Headrace is serving (\S+) at (http://\S+:\d+)")
PATIENCE_S = 20.0
"""How long a test waits for something that takes milliseconds on an idle machine."""


class ServerProcess:
    """A running server: its URL, and what it printed once it has ended."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self.url = url

    def signal(self, number: int, *, is_group: bool = False) -> None:
        """Send a signal to the master, or as a terminal does to every process."""
        (os.killpg if is_group else os.kill)(self.process.pid, number)

    def wait(self) -> tuple[int, str, str]:
        """Exit code and the rest of both outputs; the pipes end when no process holds them any more."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))


def spawn(*flags: str, module: str = "tests.support.fake_server") -> "subprocess.Popen[str]":
    """The fake model's server, or another module's, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _first_line(process: "subprocess.Popen[str]") -> str:
    """Byte by byte: what a buffer had read beyond the line would be missing from what `communicate` returns."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n") and (piece := os.read(process.stdout.fileno(), 1)):
        line += piece
    return line.decode()


@contextmanager
def running_server(*flags: str, module: str = "tests.support.fake_server") -> Iterator[ServerProcess]:
    """The fake model's server, or another module's, on a free port."""
    with ready(spawn("--port", "0", *flags, module=module)) as server:
        yield server


@contextmanager
def ready(process: "subprocess.Popen[str]") -> Iterator[ServerProcess]:
    """A server, once it is ready; killed in the end if the test has not stopped it. It must lead its process group."""
    try:
        line = _first_line(process)
        match = READY.match(line)
        assert match, (line, process.communicate(timeout=PATIENCE_S) if not line else "")
        yield ServerProcess(process, match[2])
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)


def eventually(is_true: Callable[[], bool], what: str) -> None:
    """Poll until it is true; fails after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)


def resident_bytes() -> int:
    """Physical memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children_of(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    text = (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text(encoding="ascii")
    return [int(word) for word in text.split()]


class Caller(threading.Thread):
    """One streamed request in the background: its text, and the error event if one came."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__()
        self.num_chunks = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self._url = url
        self._body = {
            "model": NAME,
            "prompt": "a",
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        self.start()

    def run(self) -> None:
        # A server that is killed cuts the stream off: then neither a finish reason nor an error has come.
        with (
            contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
            httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=30) as response,
        ):
            for line in response.iter_lines():
                if line and line != "data: [DONE]":
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["message"]
        else:
            self.num_chunks += 1
            self.finish_reason = event["choices"][0]["finish_reason"]
