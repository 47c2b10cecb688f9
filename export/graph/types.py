"""A scheme's compute type, as onnx_ir and as numpy have it."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

_TYPES = {
    "float32": (ir.DataType.FLOAT, np.dtype(np.float32)),
    "float16": (ir.DataType.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}


def onnx_type(compute: str) -> ir.DataType:
    """KeyError for a type that no scheme computes in."""
    return _TYPES[compute][0]


def numpy_type(compute: str) -> np.dtype[Any]:
    """KeyError for a type that no scheme computes in."""
    found: np.dtype[Any] = _TYPES[compute][1]
    return found
