"""`headrace key`: make an API key, show it once, and add its hash to a file."""

import argparse
import os
import sys
from pathlib import Path

from runtime.errors import InvalidSetting
from runtime.settings import check_at_least
from serve.api_keys import make_key, new_key, read_keys


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace key",
        description="Make an API key for `headrace serve --api-keys FILE`. The key is printed once; the file keeps "
        "its hash. SIGHUP makes a running server read the file again; to take a key back, delete its line.",
    )
    parser.add_argument("name", help="whose key it is: in logs, limits and the prefix cache")
    parser.add_argument("--file", type=Path, default=Path("api_keys.txt"), help="(default: %(default)s)")
    parser.add_argument("--requests-per-minute", type=int, help="most requests in any minute")
    parser.add_argument("--tokens-per-minute", type=int, help="most tokens of prompts and answers in a minute")
    return parser


def main(argv: list[str]) -> int:
    """Append a key to the file and print it."""
    args = _parser().parse_args(argv)
    limits = {name: getattr(args, name) for name in ("requests_per_minute", "tokens_per_minute")}
    for name, value in limits.items():
        check_at_least(name, value, 1)
    secret = new_key()
    key = make_key(args.name, secret, **limits)
    if args.file.exists() and args.name in {known.name for known in read_keys(args.file)}:
        raise InvalidSetting(f"{args.file} has a key named {args.name!r}; delete its line to replace it")
    try:
        # Hashes are no secret, but who may call is nobody else's business.
        with os.fdopen(os.open(args.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:
            file.write(key.to_line() + "\n")
    except OSError as error:
        raise InvalidSetting(f"--file {args.file} cannot be written: {error.strerror}") from error
    sys.stderr.write(f"added {args.name} to {args.file}; the key is shown only now:\n")
    sys.stdout.write(secret + "\n")
    return 0
