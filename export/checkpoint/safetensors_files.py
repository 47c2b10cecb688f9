"""Finds the tensors of a Hugging Face directory: one safetensors file, or shards with or without an index.

Reads headers, not weights. Refuses a directory that is ambiguous or incomplete.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint.config_fields import shown_names
from export.checkpoint.protocol import TensorInfo
from export.checkpoint.texts.reading import AGAIN, LFS_POINTER, read_json_object, refuse_lfs_pointer
from runtime.errors import InvalidCheckpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_SHARDS = 10_000
"""The largest published models have some 200."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
"""Bits of an element, by the name of its type in a header."""

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a tensor in a file."""

    file: Path
    offset: int
    num_bytes: int
    info: TensorInfo

    def rows(self, start: int, stop: int) -> "Place":
        """Place of rows `start` to `stop` of the tensor."""
        num_rows, *rest = self.info.shape
        row_bytes = self.num_bytes // max(1, num_rows)
        info = TensorInfo((stop - start, *rest), self.info.dtype)
        return Place(self.file, self.offset + start * row_bytes, (stop - start) * row_bytes, info)


def find_tensors(path: Path) -> dict[str, Place]:
    """Every tensor of the directory, by its name in a language model without a multimodal prefix.

    Raises InvalidCheckpoint for files that are missing, truncated, ambiguous, or hold a tensor twice.
    """
    weight_map = _weight_map(path)
    files = sorted(set(weight_map.values())) if weight_map is not None else _files_without_index(path)
    headers = {file: read_header(path / file) for file in files}
    for name, file in (weight_map or {}).items():
        if name not in headers[file]:
            raise InvalidCheckpoint(f"{path / INDEX} says that {file} holds {name!r}, and it does not; {AGAIN}")
    places: dict[str, Place] = {}
    for file, header in headers.items():
        for name, place in header.items():
            plain = plain_name(name)
            if plain in places:
                other = places[plain].file.name
                raise InvalidCheckpoint(f"{path} holds {plain!r} twice: in {other} and in {file}; remove one of them")
            places[plain] = place
    return places


def plain_name(name: str) -> str:
    """A tensor's name without the prefix that it has inside a multimodal model.

    Text models that were cut out of one keep either of two forms: `language_model.model.layers.0...` with
    `language_model.lm_head`, or `model.language_model.layers.0...`.
    """
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


def _weight_map(path: Path) -> dict[str, str] | None:
    """The index's map from tensor names to files of this directory; None if there is no index."""
    if not (path / INDEX).is_file():
        return None
    weight_map = read_json_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InvalidCheckpoint(f"{path / INDEX} has no weight_map from tensor names to file names; {AGAIN}")
    files = sorted(set(weight_map.values()))
    if not files:
        raise InvalidCheckpoint(f"{path / INDEX} has an empty weight_map; {AGAIN}")
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise InvalidCheckpoint(f"{path / INDEX} names a file outside the directory: {outside[0]!r}")
    if (path / SINGLE).is_file() and SINGLE not in files:
        raise InvalidCheckpoint(
            f"{path} has both {SINGLE} and {INDEX}, which names other files ({shown_names(files)}): one of the two is "
            "left over from another save; remove that one"
        )
    _refuse_missing(path, files)
    return weight_map


def _files_without_index(path: Path) -> list[str]:
    """model.safetensors, or the only whole set of shards, or the only file."""
    if (path / SINGLE).is_file():
        return [SINGLE]
    files = sorted(
        file.name for file in path.glob("*.safetensors") if file.is_file() and not file.name.startswith("adapter_")
    )
    shards = [match for file in files if (match := _SHARD.fullmatch(file))]
    sets = {(match[1], match[3]) for match in shards}
    if len(sets) == 1 and len(shards) == len(files):
        ((name, total),) = sets
        width, count = len(shards[0][2]), int(total)
        if not len(files) <= count <= MAX_SHARDS:
            raise InvalidCheckpoint(
                f"{path} has {len(files)} shards, and the name {files[0]} does not fit that; {AGAIN}"
            )
        wanted = [f"{name}-{number:0{width}}-of-{total}.safetensors" for number in range(1, count + 1)]
        _refuse_missing(path, wanted)
        return wanted
    if len(files) == 1:
        return files
    if files:
        raise InvalidCheckpoint(
            f"{path} has neither {SINGLE} nor {INDEX}, and several files that could be meant ({shown_names(files)}); "
            f"download {INDEX} too, or remove the files that are not of this model"
        )
    raise InvalidCheckpoint(_why_no_weights(path))


def _refuse_missing(path: Path, files: Iterable[str]) -> None:
    wanted = list(files)
    missing = [file for file in wanted if not (path / file).is_file()]
    if missing:
        raise InvalidCheckpoint(
            f"{path} lacks {len(missing)} of {len(wanted)} shards: {shown_names(missing)}; download them"
        )


def _why_no_weights(path: Path) -> str:
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return (
            f"{path} has only pickled weights (*.bin, *.pt), which can run code and are never loaded; "
            "convert them with transformers (AutoModelForCausalLM.from_pretrained, then save_pretrained)"
        )
    if (path / "adapter_model.safetensors").is_file():
        return f"{path} holds an adapter, not a model; export its base model with --lora {path}"
    return f"{path} has neither {SINGLE} nor {INDEX}; a Hugging Face model directory has one of them"


def read_header(file: Path) -> dict[str, Place]:
    """Tensor name to place. The library checks sizes, overlaps and file length, but returns no offsets."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as handle:
            refuse_lfs_pointer(handle.read(len(LFS_POINTER)), file)
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as handle:
            header_len = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(header_len))
    except (SafetensorError, OSError, ValueError) as error:
        reason = _damage(file) or error
        raise InvalidCheckpoint(f"{file} is not a whole safetensors file: {reason}; {AGAIN}") from error
    places = {}
    for name, entry in header.items():
        if not name.isprintable():
            raise InvalidCheckpoint(f"{file} is damaged: it holds a tensor called {name!r}; {AGAIN}")
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            info = TensorInfo(tuple(entry["shape"]), entry["dtype"])
            places[name] = Place(file, 8 + header_len + begin, end - begin, info)
    return places


def _damage(file: Path) -> str | None:
    """What is wrong with a file that the library refuses: the first tensor that does not fit its place, or a length.

    The library's own message does not name the tensor. None if that message has to do.
    """
    try:
        with file.open("rb") as handle:
            start = handle.read(8)
            header_len = int.from_bytes(start, "little")
            size = file.stat().st_size
            if len(start) < 8 or header_len > size - 8:
                begins = f", and it begins with {start!r}" if size else ""
                return f"its header would end at byte {8 + header_len:,}, and the file has {size:,}{begins}"
            header = json.loads(handle.read(header_len))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            bits = _BITS.get(entry["dtype"])
            wanted = None if bits is None else math.prod(entry["shape"]) * bits // 8
            if wanted is not None and wanted != end - begin:
                return (
                    f"tensor {name!r} of the type {entry['dtype']} and the shape {entry['shape']} takes {wanted:,} "
                    f"bytes, and its place has {end - begin:,}"
                )
        total = 8 + header_len + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return f"its tensors end at byte {total:,}, and the file has {size:,}" if total != size else None
