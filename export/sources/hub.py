"""Downloads a model from the Hugging Face hub into the library's cache, and opens it as a directory.

Knows which files a model needs and what the library's errors mean. Nothing downloaded is run: no pickles and no Python
are downloaded.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.checkpoint.protocol import Checkpoint
from export.checkpoint.quantized.checkpoint import open_directory
from runtime.errors import HeadraceError, InvalidCheckpoint

ALLOW_PATTERNS = (
    "config.json",
    "hf_quant_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
)
"""Files to download. Not `*.safetensors`: some repositories hold every weight twice
(`consolidated.safetensors`)."""


_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_hub_model(repo_id: str, *, revision: str | None = None) -> Checkpoint:
    """Download `owner/name` at a branch, tag or commit (default: main) and open it.

    Files in the cache are not downloaded again; with HF_HUB_OFFLINE=1 nothing is. The library shows progress.
    InvalidCheckpoint, with what to do, if the model does not exist, is gated, or cannot be reached.
    """
    source = repo_id if revision is None else f"{repo_id}@{revision}"
    directory = _download(repo_id, revision, source)
    return open_directory(directory, source=source, commit=commit_of(directory))


def commit_of(snapshot: Path) -> str | None:
    """The commit of a snapshot in the library's cache, whose directory is named after it."""
    return snapshot.name if _COMMIT.fullmatch(snapshot.name) else None


def _download(repo_id: str, revision: str | None, source: str) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(source, repo_id, kind="model", error_class=InvalidCheckpoint):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(ALLOW_PATTERNS)))


@contextmanager
def hub_errors(source: str, repo_id: str, *, kind: str, error_class: type[HeadraceError]) -> Iterator[None]:
    """Turn what the library raises into one line that says what to do. `kind`: model or dataset."""
    from huggingface_hub import constants, errors

    page = constants.ENDPOINT if kind == "model" else f"{constants.ENDPOINT}/{kind}s"
    try:
        yield
    except HeadraceError:
        raise
    except errors.GatedRepoError as error:
        raise error_class(
            f"{source} is gated: accept its terms at {page}/{repo_id} and set HF_TOKEN to your access token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise error_class(
            f"{source} is neither a local directory nor a {kind} on {constants.ENDPOINT}; check the name, "
            "and set HF_TOKEN if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise error_class(f"{source}: the {kind} has no such branch, tag or commit") from error
    except (
        errors.LocalEntryNotFoundError,
        errors.RevisionResolutionError,
        errors.OfflineModeIsEnabled,
    ) as error:
        if constants.HF_HUB_OFFLINE:
            reason = "is not in the hub's cache, and HF_HUB_OFFLINE forbids downloading it; unset that"
        else:
            reason = f"is not in the hub's cache, and {constants.ENDPOINT} cannot be reached; check the network"
        raise error_class(f"{source} {reason}, or give a local {_LOCAL[kind]}") from error
    except errors.HFValidationError as error:
        raise error_class(f"{repo_id!r} is not a valid hub id: {error}") from error
    except Exception as error:  # the transport below the library raises its own kinds, which change with its version
        summary = " ".join(str(error).split())
        raise error_class(f"{source} could not be downloaded from {constants.ENDPOINT}: {summary}") from error


_LOCAL = {"model": "model directory", "dataset": "file"}
