"""`headrace key`: make an API key, show it once, and add its hash to a file."""

import argparse
import os
import sys
from pathlib import Path

from runtime.errors import InvalidSetting
from runtime.settings import flag_name
from serve.access.api_keys import LIMITS, make_key, new_key, read_keys


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace key",
        description="Make an API key for `headrace serve --api-keys FILE`. The key is printed once; the file has only "
        "its hash. SIGHUP makes a running server read the file again. To revoke a key, delete its line.",
    )
    parser.add_argument("name", help="the key's owner, for logs, limits and the prefix cache")
    parser.add_argument(
        "--file", type=Path, default=Path("api_keys.txt"), help="file to add its hash to (default: %(default)s)"
    )
    parser.add_argument("--requests-per-minute", type=int, help="most requests in any minute")
    parser.add_argument("--tokens-per-minute", type=int, help="most tokens of prompts and answers in any minute")
    parser.add_argument("--requests-at-once", type=int, help="most requests that run at the same time")
    parser.add_argument(
        "--priority",
        type=int,
        help="most urgent priority that its requests may ask for, -100 to 100; lower is served earlier",
    )
    parser.add_argument(
        "--metrics", action="store_true", help="may read /metrics, which counts the requests of all keys"
    )
    return parser


def main(argv: list[str]) -> int:
    """Append a key to the file and print it."""
    args = _parser().parse_args(argv)
    limits = {name: getattr(args, name) for name, _, _ in LIMITS.values()}
    for name, low, high in LIMITS.values():
        if (value := limits[name]) is not None and not low <= value <= high:
            raise InvalidSetting(f"{flag_name(name)} must be {low} to {high}, got {value}")
    secret = new_key()
    key = make_key(args.name, secret, may_read_metrics=args.metrics, **limits)
    if args.file.exists() and args.name in {known.name for known in read_keys(args.file)}:
        raise InvalidSetting(f"{args.file} has a key named {args.name!r}; delete its line to replace it")
    try:
        # The hashes are not secret, but the list of users is private.
        with os.fdopen(os.open(args.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "ab+") as file:
            # The last line may lack its line end; two keys on one line would both be invalid.
            file.seek(-1 if file.tell() else 0, os.SEEK_END)
            end = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(end + key.to_line().encode() + b"\n")
    except OSError as error:
        raise InvalidSetting(f"--file {args.file} cannot be written: {error.strerror}") from error
    sys.stderr.write(f"added {args.name} to {args.file}; the key is shown only once:\n")
    sys.stdout.write(secret + "\n")
    return 0
