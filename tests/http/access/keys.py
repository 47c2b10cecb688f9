"""API keys for the tests: three secrets, the header that carries one, and `headrace key`."""

import contextlib
import io

from headrace import main

ALICE, BOB, CAROL = "hr-alice", "hr-bob", "hr-carol"


def bearer(secret: str) -> dict[str, str]:
    """The header of a request with this key."""
    return {"Authorization": f"Bearer {secret}"}


def run_key(*argv: str) -> tuple[int, str]:
    """Run `headrace key`; the exit code and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(["key", *argv])
    return code, out.getvalue().strip()
