"""A local Hugging Face directory: config.json, safetensors in one file or in shards, and the text files.

Knows the directory's layout and the safetensors format, not what the tensors mean. Only safetensors are read:
a pickle (`pytorch_model.bin`) runs code when it is loaded, so it never is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from export.checkpoint import TensorInfo
from export.tensor_file import read_float32
from runtime.errors import InvalidCheckpoint, UnsupportedModel

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
AGAIN = "download or copy it again"

STORED_TYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
)
"""The safetensors types that are weights as they stand; others are quantized or are no weights."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies."""

    file: Path
    offset: int
    num_bytes: int
    info: TensorInfo


class SafetensorsCheckpoint:
    """A Checkpoint over a directory: headers are read at once, a tensor when it is asked for."""

    def __init__(self, path: Path, *, source: str | None = None) -> None:
        """Open `path`; `source` is what the user called it, the directory's name if they gave a path.

        Raises InvalidCheckpoint for files that are missing, truncated or inconsistent. One that is quantized already
        is for quantized_checkpoint.py.
        """
        self._path = path
        self._source = source or path.resolve().name
        self._config = read_json_object(path / CONFIG)
        self._places = _find_tensors(path)
        self._tensors = MappingProxyType({name: place.info for name, place in self._places.items()})

    @property
    def source(self) -> str:
        return self._source

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def load(self, name: str) -> NDArray[np.float32]:
        place = self._places.get(name)
        if place is None:
            raise InvalidCheckpoint(f"{self._path} has no tensor {name!r}; it has {len(self._places)} others")
        stored = STORED_TYPES.get(place.info.dtype)
        if stored is None:
            raise UnsupportedModel(
                f"{place.file}: tensor {name!r} is stored as {place.info.dtype}; "
                f"only {', '.join(STORED_TYPES)} are read"
            )
        return read_float32(
            place.file,
            offset=place.offset,
            num_bytes=place.num_bytes,
            shape=place.info.shape,
            block_bytes=stored.itemsize,
            decode=lambda raw: raw.view(stored).astype(np.float32, copy=False),
        )

    def load_words(self, name: str) -> NDArray[np.int32]:
        """Read one tensor of 32-bit integers, in which quantization tools pack smaller ones."""
        place = self._places.get(name)
        if place is None or place.info.dtype != "I32":
            stored = "is not there" if place is None else f"is stored as {place.info.dtype}"
            raise InvalidCheckpoint(f"{self._path}: tensor {name!r} {stored}; 32-bit integers (I32) are wanted")
        try:
            with place.file.open("rb") as handle:
                handle.seek(place.offset)
                words = np.fromfile(handle, "<i4", place.num_bytes // 4)
        except OSError as error:
            raise InvalidCheckpoint(f"{place.file} cannot be read: {error.strerror or error}") from error
        if words.size != place.num_bytes // 4:
            raise InvalidCheckpoint(f"{place.file} is truncated in tensor {name!r}; {AGAIN}")
        return words.reshape(place.info.shape)

    def text_files(self) -> Mapping[str, str]:
        files = {name: read_text(self._path / name) for name in TEXT_FILES if (self._path / name).is_file()}
        if "chat_template.jinja" not in files and "tokenizer_config.json" in files:
            template = _embedded_template(read_json_object(self._path / "tokenizer_config.json"))
            if template is not None:
                files["chat_template.jinja"] = template
        return files


def read_text(file: Path) -> str:
    """Read a UTF-8 file, or raise InvalidCheckpoint."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidCheckpoint(
            f"{file.parent} has no {file.name}; a Hugging Face model directory has {CONFIG} and {SINGLE} (or {INDEX})"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error}; {AGAIN}") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, or raise InvalidCheckpoint."""
    try:
        value = json.loads(read_text(file))
    except ValueError as error:
        raise InvalidCheckpoint(f"{file} is not JSON: {error}; {AGAIN}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{file} holds a {type(value).__name__}, not a JSON object; {AGAIN}")
    return value


def _embedded_template(tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template as older checkpoints keep it: a string, or a list of named ones with a default."""
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _find_tensors(path: Path) -> dict[str, _Place]:
    if (path / SINGLE).is_file():
        return _read_header(path / SINGLE)
    if not (path / INDEX).is_file():
        raise InvalidCheckpoint(_why_no_weights(path))
    weight_map = read_json_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidCheckpoint(f"{path / INDEX} has no weight_map from tensor names to file names; {AGAIN}")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise InvalidCheckpoint(f"{path / INDEX} names a file outside the directory: {outside[0]!r}")
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise InvalidCheckpoint(
            f"{path} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:3])}; download them"
        )
    headers = {shard: _read_header(path / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise InvalidCheckpoint(f"{path / INDEX} says that {shard} holds {name!r}, and it does not; {AGAIN}")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _why_no_weights(path: Path) -> str:
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return (
            f"{path} has only pickled weights (*.bin, *.pt), which can run code and are never loaded; "
            "convert them with transformers (AutoModelForCausalLM.from_pretrained, then save_pretrained)"
        )
    if (path / "adapter_model.safetensors").is_file():
        return f"{path} holds an adapter, not a model; merge it into its base model"
    return f"{path} has neither {SINGLE} nor {INDEX}; a Hugging Face model directory has one of them"


def _read_header(file: Path) -> dict[str, _Place]:
    """Tensor name to place. The library checks sizes, overlaps and file length, but does not tell offsets."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as handle:
            header_len = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(header_len))
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{file} is not a whole safetensors file: {error}; {AGAIN}") from error
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            info = TensorInfo(tuple(entry["shape"]), entry["dtype"])
            places[name] = _Place(file, 8 + header_len + begin, end - begin, info)
    return places
