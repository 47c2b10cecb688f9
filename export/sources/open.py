"""Decides which reader a model name needs. Knows the four kinds of source, not how they are read."""

import re
from collections.abc import Sequence
from pathlib import Path

from export.checkpoint.lora.adapter import Lora
from export.checkpoint.lora.merged import MergedCheckpoint
from export.checkpoint.protocol import Checkpoint
from export.checkpoint.text_part import text_part
from runtime.errors import InvalidCheckpoint, InvalidSetting

DEFAULT_MODEL = "smollm2-135m-instruct"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(model: str | Path, *, revision: str | None = None, loras: Sequence[Lora] = ()) -> Checkpoint:
    """Open the default model's name, a directory, a .gguf file or a hub id (`owner/name`), tried in that order.

    revision: branch, tag or commit of a hub id; loras: adapters to merge into the weights
    InvalidCheckpoint if `model` is none of the four or cannot be read, InvalidSetting for a revision of another source.
    Also the errors of `MergedCheckpoint`.
    """
    base = _open(str(model), revision)
    return MergedCheckpoint(base, loras) if loras else base


def _open(model: str, revision: str | None) -> Checkpoint:
    path = Path(model).expanduser()
    is_hub_id = model != DEFAULT_MODEL and not path.exists() and _HUB_ID.fullmatch(model) is not None
    if revision is not None and not is_hub_id:
        raise InvalidSetting(f"revision {revision!r}: only a hub id (owner/name) has revisions, and {model!r} is none")
    if model == DEFAULT_MODEL:
        from export.checkpoint.gguf.file import GgufCheckpoint
        from export.sources.default_model import default_model_file

        return GgufCheckpoint(default_model_file(), source=DEFAULT_MODEL)
    if model and path.is_dir():
        from export.checkpoint.quantized.checkpoint import open_directory

        return text_part(open_directory(path))
    if path.is_file() and path.suffix == ".gguf":
        from export.checkpoint.gguf.file import GgufCheckpoint

        return GgufCheckpoint(path)
    if is_hub_id:
        from export.sources.hub import open_hub_model

        return text_part(open_hub_model(model, revision=revision))
    what = "is a file that does not end in .gguf" if path.is_file() else "does not exist"
    raise InvalidCheckpoint(
        f"{model!r} {what}; give {DEFAULT_MODEL}, a Hugging Face model directory, a .gguf file, "
        "or a hub id like HuggingFaceTB/SmolLM2-135M-Instruct"
    )
