"""Shared by the benchmarks of the server: a tiny random model, a server process, and its metrics and memory.

Run the benchmarks that use it as modules: `python -m benchmarks.under_fire`.
"""

import http.client
import json
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from export.pipeline.export_model import ExportOptions, export_model
from runtime.errors import HeadraceError
from tests.support.byte_tokenizer import CONFIG, byte_level_hf
from tests.support.tiny.checkpoint import config_of, write_checkpoint

START_S = 300
"""Longest wait for the server. Hashing and loading a large artifact from a slow disk takes minutes."""
STOP_S = 60
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MAX_LEN = 1024


class Server(NamedTuple):
    """A running server: its address, its model, and the worker's process id."""

    host: str
    port: int
    model: str
    pid: int

    def get(self, path: str) -> bytes:
        """The body of the reply to a GET."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=STOP_S)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        lines = self.get("/metrics").decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def rss_bytes(self) -> int:
        """The worker's resident memory in bytes."""
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return 1024 * int(text.partition("VmRSS:")[2].split()[0])

    def num_threads(self) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(text.partition("Threads:")[2].split()[0])


def tiny_artifact(directory: Path) -> Path:
    """A random model with three layers and a token for each byte, exported to fp32. A step takes a millisecond."""
    checkpoint = write_checkpoint(directory / "checkpoint", config_of("llama", max_position_embeddings=MAX_LEN))
    byte_level_hf().save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"chat_template": TEMPLATE}))
    out = directory / "artifact"
    export_model(ExportOptions(model=str(checkpoint), out=out, precision="fp32", force=True))
    return out


@contextmanager
def served(artifact: Path, errors: Path, flags: Sequence[str] = ()) -> Iterator[Server]:
    """A server on a free loopback port, stopped by its process id. Its standard error goes to the file `errors`.

    Raises HeadraceError if it does not start, or does not exit with 0.
    """
    command = [sys.executable, "-m", "headrace", "serve", str(artifact), "--port", "0", "--allow-failed", *flags]
    with errors.open("w") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
    try:
        assert process.stdout is not None
        is_told, _, _ = select.select([process.stdout], [], [], START_S)
        line = process.stdout.readline() if is_told else ""
        if "http://" not in line:
            raise HeadraceError(f"`{' '.join(command)}` did not start: {errors.read_text()[-500:]}")
        host, _, port = line.split("http://")[1].split()[0].rpartition(":")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        yield Server(host, int(port), line.split()[3], int(children[0]))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code != 0:
        raise HeadraceError(f"the server ended with {code}: {errors.read_text()[-500:]}")
