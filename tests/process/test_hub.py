"""A hub id is resolved by the real library: from a cache laid out its way, and from a small HTTP server.

The library reads its settings when it is imported, so every case runs in a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from runtime.artifact.manifest import open_artifact
from tests.support.hub_server import hub_environment, hub_server
from tests.support.tiny.checkpoint import config_of, write_checkpoint

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"
FILES: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": save({"a": np.arange(6, dtype=np.float32)}),
    "pytorch_model.bin": b"never asked for",
    "modeling_tiny.py": b"raise SystemExit('never asked for')",
    "consolidated.safetensors": b"never asked for",
}
OPEN = """
import sys
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint
try:
    checkpoint = open_checkpoint(sys.argv[1], revision=sys.argv[2] or None)
    sys.stdout.write(f"{checkpoint.source} {checkpoint.config} {checkpoint.load('a').sum():g} {checkpoint.commit}")
except InvalidCheckpoint as error:
    sys.stdout.write(f"refused: {error}")
"""


def open_model(home: Path, *, revision: str = "", **settings: str) -> str:
    """What `open_checkpoint` says in a fresh process whose hub cache is under `home`."""
    command = [sys.executable, "-c", OPEN, REPO, revision]
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


def write_cache(home: Path, *, revision: str = "main", files: Mapping[str, bytes] = FILES) -> None:
    """The hub's cache with one snapshot, as documented: blobs, refs, snapshots of links."""
    repo = home / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / revision).write_text(COMMIT)
    for number, name in enumerate(sorted(files.keys() & {"config.json", "tokenizer.json", "model.safetensors"})):
        blob = repo / "blobs" / f"{number:040x}"
        blob.write_bytes(files[name])
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)


def test_a_cached_snapshot_opens_offline(tmp_path: Path) -> None:
    write_cache(tmp_path)
    assert open_model(tmp_path, HF_HUB_OFFLINE="1") == f"{REPO} {{'model_type': 'llama'}} 15 {COMMIT}"


def test_an_export_records_the_commit_it_is_of(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", config_of("llama", num_hidden_layers=1))
    write_cache(tmp_path, files={file.name: file.read_bytes() for file in model.iterdir()})
    command = [sys.executable, "-m", "headrace", "export", REPO, "--out", str(tmp_path / "artifact")]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path, timeout=120)
    artifact = open_artifact(tmp_path / "artifact")
    assert (artifact.manifest.source, artifact.manifest.name, artifact.manifest.commit) == (REPO, "tiny", COMMIT)
    assert (artifact.receipt["source"], artifact.receipt["commit"]) == (REPO, COMMIT)


def test_a_revision_is_part_of_the_source(tmp_path: Path) -> None:
    write_cache(tmp_path, revision="v2")
    printed = open_model(tmp_path, revision="v2", HF_HUB_OFFLINE="1")
    assert printed == f"{REPO}@v2 {{'model_type': 'llama'}} 15 {COMMIT}"


def test_offline_without_a_snapshot_says_what_to_do(tmp_path: Path) -> None:
    printed = open_model(tmp_path, HF_HUB_OFFLINE="1")
    assert printed.startswith(f"refused: {REPO} is not in the hub's cache, and HF_HUB_OFFLINE forbids")


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path) -> None:
    printed = open_model(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert printed.startswith(f"refused: {REPO}")
    assert "http://127.0.0.1:9 cannot be reached; check the network" in printed
    assert "\n" not in printed


def test_only_weights_config_and_text_are_downloaded(tmp_path: Path) -> None:
    with hub_server("models", REPO, COMMIT, FILES) as (endpoint, asked):
        printed = open_model(tmp_path, HF_ENDPOINT=endpoint)
    assert printed == f"{REPO} {{'model_type': 'llama'}} 15 {COMMIT}"
    downloaded = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
    assert downloaded == {"config.json", "tokenizer.json", "model.safetensors"}


def test_a_gated_model_asks_for_a_token(tmp_path: Path) -> None:
    with hub_server("models", REPO, COMMIT, FILES, error=(403, "GatedRepo")) as (endpoint, _):
        printed = open_model(tmp_path, HF_ENDPOINT=endpoint)
    advice = f"accept its terms at {endpoint}/{REPO} and set HF_TOKEN to your access token"
    assert printed == f"refused: {REPO} is gated: {advice}"


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    with hub_server("models", REPO, COMMIT, FILES, error=(401, "RepoNotFound")) as (endpoint, _):
        printed = open_model(tmp_path, HF_ENDPOINT=endpoint)
    assert printed.startswith(f"refused: {REPO} is neither a local directory nor a model on {endpoint}")


def test_a_revision_that_does_not_exist(tmp_path: Path) -> None:
    with hub_server("models", REPO, COMMIT, FILES, error=(404, "RevisionNotFound")) as (endpoint, _):
        printed = open_model(tmp_path, revision="v9", HF_ENDPOINT=endpoint)
    assert printed == f"refused: {REPO}@v9: the model has no such branch, tag or commit"
