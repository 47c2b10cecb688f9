"""The table of precisions of the `trt` dialects: what each kind of linear layer becomes for TensorRT.

One row a name of `runtime.artifact.manifest.PRECISIONS`; the same name means the same width as in the `ort` dialect, in
the forms TensorRT has kernels for: its networks are strongly typed, and zero points other than 0 are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export.storage.blocks import Blocks
from runtime.errors import InvalidSetting

INT4_SIZES = (64, 128)
"""Inputs that may share an int4 scale: what TensorRT documents. The builder of tensorrt-rtx 1.7.1 takes any divisor of
the rows (16, 32, 48, 64, 96, 128 and 256 were tried) but runs nothing. In SmolLM2-135M blocks of 32 raise perplexity by
5.9 % (KL 0.063 nats) instead of 7 % (0.08), for 2.1 % more bytes: worth it once a GPU has run them."""

INT4_BLOCKS = Blocks(bits=4, block_size=INT4_SIZES[0], symmetric=True)


class Scheme(Enum):
    """How a linear layer is stored and computed; the value is what error messages and receipts call it."""

    WIDE = "compute type"
    INT8 = "int8, activations too"
    INT8_WEIGHTS = "int8 weights, one scale an output channel"
    INT4_WEIGHTS = "int4 weights, one scale a block"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtPrecision:
    """How a TensorRT graph computes and stores.

    compute: type of activations, norms, KV cache, embedding and every weight that stays wide
    scheme: of the linear layers; `overrides` for one kind of them (qkv, o, gate_up, down, lm_head). A tied LM head is
        the embedding and stays wide: TensorRT would widen the whole table at every gather.
    """

    name: str
    compute: ir.DataType
    scheme: Scheme = Scheme.WIDE
    overrides: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return _NUMPY[self.compute]

    def scheme_of(self, kind: str) -> Scheme:
        """What a layer kind is stored as."""
        return self.overrides.get(kind, self.scheme)

    def blocks_of(self, kind: str) -> Blocks | None:
        """The blocks a layer kind is stored in, None if it is not."""
        return INT4_BLOCKS if self.scheme_of(kind) is Scheme.INT4_WEIGHTS else None

    def wide_blocks(self, num_inputs: int) -> Blocks:
        """The form of a layer for which 4 bits are too few: TensorRT's int8 has a scale an output channel."""
        return Blocks(bits=8, block_size=num_inputs, symmetric=True)


_NUMPY: Mapping[ir.DataType, np.dtype[Any]] = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
_HALF = ir.DataType.FLOAT16

TRT_PRECISIONS: Mapping[str, TrtPrecision] = {
    "fp32": TrtPrecision(name="fp32", compute=ir.DataType.FLOAT),
    "fp16": TrtPrecision(name="fp16", compute=_HALF),
    "bf16": TrtPrecision(name="bf16", compute=ir.DataType.BFLOAT16),
    "w8a16": TrtPrecision(name="w8a16", compute=_HALF, scheme=Scheme.INT8_WEIGHTS),
    # As in the ort dialect: the LM head and q, k, v cost most for their bytes.
    "w4a16": TrtPrecision(
        name="w4a16",
        compute=_HALF,
        scheme=Scheme.INT4_WEIGHTS,
        overrides={"lm_head": Scheme.INT8_WEIGHTS, "qkv": Scheme.INT8_WEIGHTS},
    ),
    # The LM head decides the token: its activations stay wide.
    "w8a8": TrtPrecision(name="w8a8", compute=_HALF, scheme=Scheme.INT8, overrides={"lm_head": Scheme.INT8_WEIGHTS}),
}


def trt_precision_named(name: str) -> TrtPrecision:
    """Look a precision up; InvalidSetting lists what there is."""
    if name not in TRT_PRECISIONS:
        raise InvalidSetting(f"precision {name!r} has no TensorRT graph; choose one of {', '.join(TRT_PRECISIONS)}")
    return TRT_PRECISIONS[name]
