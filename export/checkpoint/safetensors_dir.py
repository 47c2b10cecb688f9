"""Reads a Hugging Face directory: config.json, safetensors in one file or in shards, and the text files.

Knows the safetensors format, not what the tensors mean; `safetensors_files.py` finds them. A pickle
(`pytorch_model.bin`) is never loaded, because it could run code.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.safetensors_files import Place, find_tensors
from export.checkpoint.texts.directory import read_directory_texts
from export.checkpoint.texts.reading import AGAIN, read_json_object, read_text
from export.storage.tensor_file import read_float32
from runtime.errors import InvalidCheckpoint, UnsupportedModel

CONFIG = "config.json"

STORED_TYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
)
"""The safetensors types that are plain weights; others are quantized, or not weights."""

RAW_TYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        **STORED_TYPES,
        **{name: np.dtype(code) for name, code in (("I8", "i1"), ("U8", "u1"), ("I32", "<i4"), ("I64", "<i8"))},
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    }
)
"""And those in which tools store quantized weights."""


class SafetensorsCheckpoint(Checkpoint):
    """A Checkpoint over a directory: headers are read at once, a tensor when it is asked for."""

    def __init__(self, path: Path, *, source: str | None = None, commit: str | None = None) -> None:
        """Open `path`; `source` is the user's name for it (default: the directory's), `commit` that of the hub.

        Raises InvalidCheckpoint for files that are missing, truncated or inconsistent. Weights that are quantized
        already are for `quantized/checkpoint.py`.
        """
        self._path, self._commit = path, commit
        self._source = source or path.resolve().name
        self._config = read_json_object(path / CONFIG)
        self._places = find_tensors(path)
        self._tensors = MappingProxyType({name: place.info for name, place in self._places.items()})
        self._texts: Mapping[str, str] | None = None

    @property
    def source(self) -> str:
        return self._source

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def commit(self) -> str | None:
        return self._commit

    def load(self, name: str) -> NDArray[np.float32]:
        return read_floats(self._place(name), name)

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        place = self._place(name)
        return read_floats(place.rows(start, stop), name, first_row=start)

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        return self.row_pieces(name, self._place(name).info.shape[0])

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise InvalidCheckpoint(f"{self._path} has no tensor {name!r}; it has {len(self._places)} others")
        return self._places[name]

    def file_of(self, name: str) -> str | None:
        place = self._places.get(name)
        return None if place is None else place.file.name

    def load_stored(self, name: str, *types: str, row: int | None = None) -> NDArray[Any]:
        """Read one tensor as its stored type, for tools that keep weights in integers or narrow floats.

        types: the safetensors types that it may have; row: of the first axis, if only one is wanted
        InvalidCheckpoint for another type, a missing tensor or an end of the file inside it.
        """
        place = self._places.get(name)
        if place is None or place.info.dtype not in types:
            stored = "is not there" if place is None else f"is stored as {place.info.dtype}"
            raise InvalidCheckpoint(f"{self._path}: tensor {name!r} {stored}; it must be {' or '.join(types)}")
        dtype = RAW_TYPES[place.info.dtype]
        place = place if row is None else place.rows(row, row + 1)
        try:
            with place.file.open("rb") as handle:
                handle.seek(place.offset)
                values = np.fromfile(handle, dtype, place.num_bytes // dtype.itemsize)
        except OSError as error:
            raise InvalidCheckpoint(f"{place.file} cannot be read: {error.strerror or error}") from error
        if values.size != place.num_bytes // dtype.itemsize:
            raise InvalidCheckpoint(f"{place.file} is truncated in tensor {name!r}; {AGAIN}")
        return values.reshape(place.info.shape if row is None else place.info.shape[1:])

    def text_file(self, name: str) -> str | None:
        """The text of a file beside the weights; None if there is none."""
        return read_text(self._path / name) if (self._path / name).is_file() else None

    def text_files(self) -> Mapping[str, str]:
        if self._texts is None:
            self._texts = read_directory_texts(self._path)
        return self._texts


def read_floats(place: Place, name: str, *, first_row: int = 0) -> NDArray[np.float32]:
    """Read a tensor as float32. `name` and the number of its first row are for errors.

    UnsupportedModel for another type than STORED_TYPES, InvalidCheckpoint for a damaged file, NaN or infinity.
    """
    stored = STORED_TYPES.get(place.info.dtype)
    if stored is None:
        raise UnsupportedModel(
            f"{place.file}: tensor {name!r} is stored as {place.info.dtype}; only {', '.join(STORED_TYPES)} are read"
        )
    return read_float32(
        place.file,
        name=name,
        offset=place.offset,
        num_bytes=place.num_bytes,
        shape=place.info.shape,
        block_bytes=stored.itemsize,
        decode=lambda raw: raw.view(stored).astype(np.float32, copy=False),
        first_row=first_row,
    )
