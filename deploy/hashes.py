"""Pinned requirements with the hashes of all their files, for any processor and Python.

uv (MIT or Apache-2.0) reads the hashes from the package index in a second. pip-tools takes 14 s and knows only the
platform it runs on. pip checks the hashes on the device.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import InvalidSetting


def with_hashes(lines: Sequence[str], *, platform: str, python: str, is_closed: bool) -> str:
    """The text of a requirements file: `lines` (NAME==VERSION), each followed by its hashes.

    platform: in uv's words, like aarch64-manylinux_2_39; python: version on the device, like 3.12
    is_closed: the lines are complete; else their dependencies are added and pinned too
    Raises InvalidSetting if uv is missing, the index cannot be read, or it lacks a version.
    """
    if not lines:
        return ""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-header"]
    command += ["--no-annotate", "--python-platform", platform, "--python-version", python]
    command += ["--no-deps"] if is_closed else []
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        [*command, "-"], input=text, capture_output=True, text=True, check=False, env={**os.environ, **_index()}
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["uv said nothing"]
        raise InvalidSetting(
            f"no hashes of the packages: {said[0]}; is uv installed (pip install 'headrace[bundle]') and the package "
            "index reachable?"
        )
    return done.stdout


def _index() -> dict[str, str]:
    """pip's package index, as a variable for uv, which does not read pip's settings."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    url = os.environ.get("PIP_INDEX_URL") or done.stdout.strip()
    return {"UV_DEFAULT_INDEX": url} if url and "UV_DEFAULT_INDEX" not in os.environ else {}


def write_checksum(archive: Path) -> Path:
    """Write NAME.sha256 beside a file, in the format of `sha256sum --check`; return its path."""
    from runtime.artifact.known_hashes import sha256_of

    file = archive.with_name(f"{archive.name}.sha256")
    file.write_text(f"{sha256_of(archive)}  {archive.name}\n")
    return file
