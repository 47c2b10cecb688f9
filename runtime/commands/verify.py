"""`headrace verify`: hashes, receipt, and the receipt's tokens again on the device that will serve; see replay.py."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from runtime.backends.registry import add_device_flag, open_session
from runtime.errors import GateFailed
from runtime.settings import EngineSettings

if TYPE_CHECKING:
    from runtime.commands.replay import Replay


def main(argv: list[str]) -> int:
    """Verify on one device. GateFailed, with both figures, if it does not choose the receipt's tokens."""
    parser = argparse.ArgumentParser(
        prog="headrace verify", description="Check hashes and receipt, and repeat the receipt's tokens on this device."
    )
    parser.add_argument("artifact", help="directory written by `headrace export`")
    add_device_flag(parser)
    parser.add_argument("--max-batch", type=int, default=8, help="prompts decoded together (default: 8)")
    parser.add_argument("--allow-failed", action="store_true", help="verify an artifact that failed its accuracy gate")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from runtime.artifact.manifest import open_artifact
    from runtime.commands.replay import replay

    artifact = open_artifact(args.artifact, allow_failed=args.allow_failed)
    # The chunk is the scheduler's; here every prompt is cut in two.
    session = open_session(artifact, EngineSettings(device=args.device, max_batch=args.max_batch, prefill_chunk=1))
    try:
        found = replay(artifact, session)
    finally:
        session.close()
    figures: dict[str, Any] = {**asdict(found), "passed": found.passed}
    sys.stdout.write((json.dumps(figures) if args.json else _sentence(found)) + "\n")
    if not found.passed:
        raise GateFailed(
            f"{artifact.path} on {found.device}: {found.prefill:.1%} of first and {found.decode:.1%} of further tokens "
            f"are the receipt's, {found.limit:.1%} must be; do not serve it here, build the engine or export it again"
        )
    return 0


def _sentence(found: "Replay") -> str:
    shares = f"{found.prefill:.1%} of first and {found.decode:.1%} of further tokens, of {found.num_tokens}"
    return f"{found.device}: {shares}, are the receipt's ({found.dialect} graph; at least {found.limit:.1%})"
