"""Downloads text files of a dataset from the Hugging Face hub into the library's cache.

`owner/name`, `owner/name@REVISION`, and either with `:PATTERN` to choose among its files. Only .parquet, .jsonl and
.txt files are downloaded, and nothing is run. Does not look into them.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from export.calibration.records import FLAG
from export.sources.hub import hub_errors
from runtime.errors import InvalidSetting

SUFFIXES = (".parquet", ".jsonl", ".txt")

MAX_DOWNLOAD_BYTES = 512 * 1000**2
"""Shards beyond this are not downloaded: calibration reads some 65,000 tokens, and one shard of text has millions."""

_DATASET = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^:\s]+))?(:(?P<pattern>\S+))?")


class DatasetFiles(NamedTuple):
    """Local files, their names in the dataset, and the commit."""

    files: list[Path]
    names: list[str]
    commit: str


class _Listed(NamedTuple):
    name: str
    size: int


def is_dataset_id(source: str) -> bool:
    """Whether a name has the form of a dataset id. Does not look whether the dataset exists."""
    return _DATASET.fullmatch(source) is not None


def fetch_dataset(source: str) -> DatasetFiles:
    """Download the needed files of a dataset; with HF_HUB_OFFLINE=1 only look in the cache.

    InvalidSetting, with what to do, if it does not exist, is gated, cannot be reached or holds no file that is read.
    """
    from huggingface_hub import constants, snapshot_download

    match = _DATASET.fullmatch(source)
    assert match is not None
    repo, revision, pattern = match["repo"], match["revision"], match["pattern"]
    with hub_errors(source, repo, kind="dataset", error_class=InvalidSetting):
        if constants.HF_HUB_OFFLINE:
            snapshot = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
            listed = [
                _Listed(file.relative_to(snapshot).as_posix(), file.stat().st_size)
                for file in sorted(snapshot.rglob("*"))
                if file.is_file()
            ]
            names = _chosen(listed, source, pattern)
        else:
            names, commit = _listing(repo, revision, source, pattern)
            snapshot = Path(
                snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=_literal(names))
            )
    return DatasetFiles([snapshot / name for name in names], names, snapshot.name)


def _listing(repo: str, revision: str | None, source: str, pattern: str | None) -> tuple[list[str], str]:
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    listed = [_Listed(entry.rfilename, entry.size or 0) for entry in info.siblings or []]
    return _chosen(listed, source, pattern), str(info.sha)


def _chosen(listed: Iterable[_Listed], source: str, pattern: str | None) -> list[str]:
    """The files that match, the training split if there is one, as many as the download limit allows."""
    readable = sorted(entry for entry in listed if entry.name.endswith(SUFFIXES))
    if pattern is not None:
        readable = [entry for entry in readable if fnmatch(entry.name, pattern)]
    if not readable:
        which = f" that matches {pattern!r}" if pattern is not None else ""
        raise InvalidSetting(f"{FLAG} {source}: the dataset has no {', '.join(SUFFIXES)} file{which}; choose another")
    if pattern is None:
        readable = [entry for entry in readable if "train" in entry.name.lower()] or readable
    taken, total = [], 0
    for entry in readable:
        total += entry.size
        if total > MAX_DOWNLOAD_BYTES:
            break
        taken.append(entry.name)
    if not taken:
        raise InvalidSetting(
            f"{FLAG} {source}: {readable[0].name} has {readable[0].size / 1e6:,.0f} MB, and at most "
            f"{MAX_DOWNLOAD_BYTES / 1e6:,.0f} MB are downloaded; choose a smaller file with {source}:PATTERN"
        )
    return taken


def _literal(names: Iterable[str]) -> list[str]:
    """Names as patterns that match only themselves."""
    return [re.sub(r"([*?[])", r"[\1]", name) for name in names]
