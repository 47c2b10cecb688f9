"""A dataset of the hub as calibration text: from a cache laid out the library's way, and from a small HTTP server.

The library reads its settings when it is imported, so every case runs in a process of its own.
"""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from export.calibration.hub_dataset import MAX_DOWNLOAD_BYTES, _chosen, _Listed, is_dataset_id
from runtime.errors import InvalidSetting
from tests.support.hub_server import hub_environment, hub_server

ROOT = Path(__file__).parents[2]
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
REPO = "someone/chats"
LOAD = """
import json, sys
from export.calibration.dataset import load_calibration_set
from runtime.errors import InvalidSetting
from tests.unit.calibration.texts import decoded, texts_of
try:
    found = load_calibration_set(sys.argv[1], texts_of(), num_samples=4, length=64)
    sys.stdout.write(json.dumps({"provenance": found.provenance, "texts": decoded(found)}))
except InvalidSetting as error:
    sys.stdout.write(f"refused: {error}")
"""


def parquet_bytes(word: str) -> bytes:
    out = io.BytesIO()
    messages = [{"role": "user", "content": f"{word} " * 12}]
    parquet.write_table(pyarrow.table({"id": list(range(40)), "messages": [messages] * 40}), out)
    return out.getvalue()


FILES: Mapping[str, bytes] = {
    "README.md": b"never asked for",
    "data/test-00000.parquet": parquet_bytes("tested"),
    "data/train-00000.parquet": parquet_bytes("trained"),
    "loader.py": b"raise SystemExit('never asked for')",
}


def load(home: Path, source: str, **settings: str) -> str:
    """What `load_calibration_set` gives in a fresh process whose hub cache is under `home`."""
    command = [sys.executable, "-c", LOAD, source]
    result = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=hub_environment(home, **settings),
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def write_cache(home: Path) -> None:
    """The hub's cache with one snapshot of the dataset, as documented: blobs, refs, snapshots of links."""
    repo = home / "hub" / f"datasets--{REPO.replace('/', '--')}"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for number, (name, data) in enumerate(FILES.items()):
        blob = repo / "blobs" / f"{number:040x}"
        blob.write_bytes(data)
        link = repo / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


def test_a_cached_snapshot_is_read_offline_and_its_training_split_taken(tmp_path: Path) -> None:
    write_cache(tmp_path)
    found = json.loads(load(tmp_path, REPO, HF_HUB_OFFLINE="1"))
    assert found["provenance"]["commit"] == COMMIT
    assert list(found["provenance"]["files"]) == ["data/train-00000.parquet"]
    assert all("trained" in text and "tested" not in text for text in found["texts"])


def test_a_pattern_chooses_among_the_files(tmp_path: Path) -> None:
    write_cache(tmp_path)
    found = json.loads(load(tmp_path, f"{REPO}:data/test-*", HF_HUB_OFFLINE="1"))
    assert list(found["provenance"]["files"]) == ["data/test-00000.parquet"]
    printed = load(tmp_path, f"{REPO}:nothing/*", HF_HUB_OFFLINE="1")
    assert printed.startswith(
        f"refused: --calibration-text {REPO}:nothing/*: the dataset has no .parquet, .jsonl, .txt file that"
    )


def test_offline_without_a_snapshot_says_what_to_do(tmp_path: Path) -> None:
    printed = load(tmp_path, REPO, HF_HUB_OFFLINE="1")
    assert printed.startswith(f"refused: {REPO} is not in the hub's cache, and HF_HUB_OFFLINE forbids")
    assert printed.endswith("or give a local file")


def test_an_unreachable_hub_says_so(tmp_path: Path) -> None:
    printed = load(tmp_path, REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert printed.startswith(f"refused: {REPO} ")
    assert "http://127.0.0.1:9" in printed
    assert "\n" not in printed


def test_only_the_files_that_are_read_are_downloaded(tmp_path: Path) -> None:
    with hub_server("datasets", REPO, COMMIT, FILES) as (endpoint, asked):
        found = json.loads(load(tmp_path, REPO, HF_ENDPOINT=endpoint))
    assert found["provenance"]["commit"] == COMMIT
    assert all("trained" in text for text in found["texts"])
    assert {path.rpartition("/")[2] for path in asked if "/resolve/" in path} == {"train-00000.parquet"}


ERRORS = {
    (403, "GatedRepo"): "is gated: accept its terms at {endpoint}/datasets/someone/chats and set HF_TOKEN",
    (401, "RepoNotFound"): "is neither a local directory nor a dataset on {endpoint}",
    (404, "RevisionNotFound"): "the dataset has no such branch, tag or commit",
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_the_hub_refuses_is_one_line(tmp_path: Path, error: tuple[int, str]) -> None:
    with hub_server("datasets", REPO, COMMIT, FILES, error=error) as (endpoint, _):
        printed = load(tmp_path, f"{REPO}@v9", HF_ENDPOINT=endpoint)
    assert printed.startswith(f"refused: {REPO}@v9")
    assert ERRORS[error].format(endpoint=endpoint) in printed
    assert "\n" not in printed


def test_shards_beyond_the_limit_are_left_alone() -> None:
    third = MAX_DOWNLOAD_BYTES // 3 + 1
    shards = [_Listed(f"train-{number}.parquet", third) for number in range(5)]
    assert _chosen(shards, REPO, None) == ["train-0.parquet", "train-1.parquet"]
    with pytest.raises(InvalidSetting, match="at most 512 MB are downloaded; choose a smaller file with"):
        _chosen([_Listed("train.parquet", MAX_DOWNLOAD_BYTES + 1)], REPO, None)


def test_what_looks_like_a_dataset() -> None:
    assert all(map(is_dataset_id, ["a/b", "a/b@main", "a/b:train-*", "a/b@v1:data/x.parquet"]))
    assert not any(map(is_dataset_id, ["a", "built-in", "/a/b", "a/b/c", "./a"]))
