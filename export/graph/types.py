"""A scheme's compute type as a numpy and as an onnx_ir type."""

from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 only after this import
import numpy as np
import onnx_ir as ir


def numpy_type(compute: str) -> np.dtype[Any]:
    """TypeError for an unknown name."""
    return np.dtype(compute)


def onnx_type(compute: str) -> ir.DataType:
    """TypeError for an unknown name."""
    return ir.DataType.from_numpy(numpy_type(compute))
