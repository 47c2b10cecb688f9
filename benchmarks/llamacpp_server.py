"""llama.cpp's own server: built from the source that llama-cpp-python's package carries, and run.

The build is for this machine's instructions, without the web page (the package lacks parts of it) and without TLS.
Needs cmake and a C++ compiler; about 15 minutes on two cores. Knows nothing of what the server is asked.
"""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.peer_models import made
from benchmarks.peer_process import peer_environment, run
from runtime.errors import HeadraceError

PACKAGE = "llama-cpp-python==0.3.36"
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",
    "BUILD_SHARED_LIBS=OFF",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_APP=OFF",
)
START_S = 300
STOP_S = 30


class Address(NamedTuple):
    """Where a server listens, and what it calls its model."""

    host: str
    port: int
    model: str


def server_binary(cache: Path) -> Path:
    """llama-server, built in the cache if it is not there."""
    build = cache / "llamacpp-build"
    binary = build / "bin" / "llama-server"
    if not (build / "complete").exists():
        cmake = shutil.which("cmake")
        if cmake is None:
            raise HeadraceError("llama.cpp's server is built with cmake, which is not installed")
        source = made(cache / "llamacpp-source", _unpack)
        run("preparing llama.cpp's server", cmake, "-S", source, "-B", build, *(f"-D{option}" for option in OPTIONS))
        jobs = str(len(os.sched_getaffinity(0)))
        run("building llama.cpp's server (15 min)", cmake, "--build", build, "--target", "llama-server", "-j", jobs)
        (build / "complete").touch()
    return binary


def _unpack(out: Path) -> None:
    """The source of llama.cpp, out of the package's."""
    shutil.rmtree(out, ignore_errors=True)
    work = out.with_name(f"{out.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", work)
    run("fetching llama.cpp's source", *pip, PACKAGE)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    next(work.glob("*/vendor/llama.cpp")).rename(out)
    shutil.rmtree(work)


@contextmanager
def llamacpp_server(binary: Path, model: Path, *, slots: int, context: int, log: Path) -> Iterator[Address]:
    """The server with its model loaded, one thread a core; `context` tokens for each of `slots` requests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--model", str(model), "--parallel", str(slots)]
    flags += ["--ctx-size", str(slots * context), "--threads", str(len(os.sched_getaffinity(0)))]
    # No prompt of the load begins like another: keeping old ones would only cost it time.
    flags += ["--cache-ram", "0"]
    with log.open("w") as output:
        process = subprocess.Popen([str(binary), *flags], stdout=output, stderr=output, env=peer_environment())
    try:
        _wait_until_ready(process, port, log)
        yield Address("127.0.0.1", port, model.stem)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    ends_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < ends_s:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=STOP_S)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.1)
    raise HeadraceError(f"llama.cpp's server did not start: {log.read_text(errors='replace')[-500:]}")
