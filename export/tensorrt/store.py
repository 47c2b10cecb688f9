"""Writes and removes the files of an artifact's `engines/`: whole or not at all, and listed in its manifest.

runtime/artifact/plan_files.py reads them.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from export.artifact.writer import file_entry, write_manifest
from export.storage.whole_file import PARTIAL, write_whole
from runtime.artifact.manifest import Artifact, read_manifest
from runtime.artifact.plan_files import ENGINES, PlanInfo, plans_of
from runtime.errors import InvalidSetting


def plan_directory(artifact: Artifact) -> Path:
    """The artifact's `engines/`, made if need be, without what killed builds left there."""
    directory = artifact.path / ENGINES
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise InvalidSetting(f"cannot write to {directory}: {error.strerror}") from error
    for left in leftovers(artifact):
        left.unlink(missing_ok=True)
    return directory


def write_plan_files(artifact: Artifact, info: PlanInfo, plan: bytes) -> Path:
    """Write plan and .json, then list the .json; the plan's path.

    The .json comes first: a plan is never there without it.
    """
    file = artifact.path / ENGINES / f"{info.stem}.plan"
    write_whole(file.with_suffix(".json"), info.to_json().encode())
    write_whole(file, plan)
    list_files(artifact, file.with_suffix(".json"))
    return file


def list_files(artifact: Artifact, *files: Path) -> None:
    """List files of `engines/` in the manifest with their hashes, and remove the entries of deleted files.

    Builds that run at the same time wait for each other here, so that none removes another's entry.
    """
    root = os.open(artifact.path, os.O_RDONLY)
    try:
        fcntl.flock(root, fcntl.LOCK_EX)
        manifest = read_manifest(artifact.path)
        engines = {
            name: entry for name, entry in manifest.engines.items() if (artifact.path / ENGINES / name).is_file()
        }
        engines |= {file.name: file_entry(file) for file in files}
        if engines != manifest.engines:
            write_manifest(artifact.path, replace(manifest, engines=engines))
    finally:
        os.close(root)


def leftovers(artifact: Artifact) -> Iterator[Path]:
    """Half-written files of builds that no longer run."""
    for file in sorted((artifact.path / ENGINES).glob(f"*{PARTIAL}*")):
        pid = file.name.rpartition("-")[2]
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            yield file


def prune(artifact: Artifact, *, everything: bool = False) -> list[Path]:
    """Remove unusable files, or with `everything` all of them and the timing caches. Returns the removed files."""
    directory = artifact.path / ENGINES
    usable = {plan.path.stem for plan in plans_of(artifact, check_hashes=True) if plan.problem is None}
    gone = list(leftovers(artifact))
    for file in sorted(directory.glob("*")):
        is_engine = file.suffix in (".plan", ".json")
        if PARTIAL not in file.name and (everything or (is_engine and file.stem not in usable)):
            gone.append(file)
    for file in gone:
        file.unlink(missing_ok=True)
    list_files(artifact)
    with suppress(OSError):  # not empty
        directory.rmdir()
    return sorted(set(gone))
