"""Another tool's environment and process: made once in a cache, asked in JSON lines.

A peer lives in a virtual environment of its own and runs as a process of its own, which works only while it is asked:
JSON lines in, JSON lines out. Its worker first says {"version": v}. Knows nothing of what is asked.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import HeadraceError

# Set on our side only where somebody tunes numpy; a peer is to choose its threads as it does for everyone.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CPU_TIME = "HEADRACE_CPU_TIME"
END_S = 60
"""Time for a peer to end by itself."""


def run(what: str, *command: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a step of the preparation; HeadraceError with the end of what it said if it fails."""
    sys.stderr.write(f"{what} ...\n")
    parts = [str(part) for part in command]
    done = subprocess.run(parts, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise HeadraceError(f"{what} failed: {(done.stderr or done.stdout).strip()[-2000:]}")


def environment_python(
    venv: Path,
    name: str,
    packages: Sequence[str],
    *,
    unwanted: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Path:
    """The interpreter of a virtual environment, made if it is missing or was left half made.

    unwanted: packages that come along and are removed again; environment: variables while pip installs
    """
    python, mark = venv / "bin" / "python", venv / "complete"
    if not mark.exists():
        run(f"making {name}'s virtual environment", sys.executable, "-m", "venv", "--clear", venv)
        pip = (python, "-m", "pip")
        run(f"installing {name} (minutes)", *pip, "install", "--quiet", *packages, environment=environment)
        if unwanted:
            run(f"removing {', '.join(unwanted)}", *pip, "uninstall", "--quiet", "--yes", *unwanted)
        mark.touch()
    return python


def peer_environment() -> dict[str, str]:
    """This process's environment, without what tunes numpy's threads."""
    return {key: value for key, value in os.environ.items() if key not in _THREAD_VARIABLES}


class PeerProcess:
    """A running worker; asked one thing at a time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.version: str = self._answer()["version"]

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer. HeadraceError if it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HeadraceError(f"the peer ended with exit code {self._process.wait()}; it says why above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running_worker(python: Path, worker: Path, model: Path, *, is_cpu_time: bool = False) -> Iterator[PeerProcess]:
    """The worker with its model loaded; ended by closing its input, killed if that does not end it.

    is_cpu_time: it runs one thread and answers with that thread's seconds of CPU
    """
    process = subprocess.Popen(
        [str(python), str(worker), str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=peer_environment() | {CPU_TIME: str(int(is_cpu_time))},
    )
    try:
        yield PeerProcess(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
