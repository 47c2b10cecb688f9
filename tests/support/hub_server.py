"""A small HTTP server with the routes of the hub's API that a download uses, and a process that asks only it."""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def hub_environment(home: Path, **settings: str) -> dict[str, str]:
    """The environment of a process whose hub cache is under `home`, without the hub settings of this machine."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return environment | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | settings


@contextmanager
def hub_server(
    kind: str, repo: str, commit: str, files: Mapping[str, bytes], *, error: tuple[int, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve one repository, or one error for every path; yields the address and the paths that were asked for.

    kind: models or datasets; error: HTTP status and the hub's error code
    """
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            path = self.path.partition("?")[0]
            name = path.partition(f"/resolve/{commit}/")[2]
            status, body, headers = 200, b"", {}
            if error is not None:
                status, headers = error[0], {"X-Error-Code": error[1], "X-Error-Message": "no"}
            elif path.startswith(f"/api/{kind}/{repo}/tree/"):
                tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
                body = json.dumps(tree).encode()
            elif path.startswith(f"/api/{kind}/{repo}"):
                siblings = [{"rfilename": n, "size": len(b)} for n, b in files.items()]
                body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
            elif name in files:
                body, headers = files[name], {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": commit}
            else:
                status = 404
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
