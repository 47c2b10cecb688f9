"""Typed access to GGUF metadata: a file can store any type under any key, so each getter checks its type.

Arrays of numbers are numpy arrays, as header.py reads them, or lists.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from export.checkpoint.config_fields import shown
from runtime.errors import InvalidCheckpoint, UnsupportedModel

MAX_NUMBER = 1e30
"""No number in a model is larger."""

AGAIN = "convert the model again"


class GgufMetadata:
    """The values of one file by key. Every getter raises InvalidCheckpoint for a value of another type."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """`where` names the file in errors."""
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str) -> str | None:
        """A string; None if the key is missing."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def integer(self, key: str) -> int | None:
        """An integer; None if the key is missing."""
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._wrong(key, "an integer", value)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer, or an array that has one for each layer, all equal."""
        value = self.values.get(key, default)
        if isinstance(value, list | np.ndarray):
            distinct = {item for item in value if isinstance(item, int | np.integer)}
            if len(distinct) > 1:
                raise UnsupportedModel(
                    f"{self.where}: {key} differs between layers ({shown(sorted(map(int, distinct)))}); only equal "
                    "layers are supported"
                )
            value = int(distinct.pop()) if distinct else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, "a positive integer", value)
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
            raise self._wrong(key, "a finite number", value)
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def texts(self, key: str) -> list[str]:
        """An array of strings; empty if the key is missing."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "an array of strings", value)
        return value

    def numbers(self, key: str) -> Sequence[float]:
        """An array of finite numbers; empty if the key is missing."""
        value = self.values.get(key, [])
        array = np.asarray(value) if isinstance(value, list | np.ndarray) else np.asarray("no array")
        if array.ndim == 1 and not array.size:
            return []
        if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise self._wrong(key, "an array of finite numbers", value)
        numbers: list[float] = array.tolist()
        return numbers

    def _wrong(self, key: str, wanted: str, value: object) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self.where}: {key} must be {wanted}, got {shown(value)}; {AGAIN}")
