"""The table of precisions: what each kind of weight becomes. One row a precision; a layer kind may stay wider."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import onnx_ir as ir

from export.storage.blocks import Blocks
from runtime.errors import InvalidSetting


class Calibrated(Enum):
    """What a precision uses calibration text for."""

    INT8 = "static ranges: linear layers multiply in int8, see int8_model.py"
    BLOCKS = "rounding weights together in blocks, see int4_model.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How an artifact computes and stores.

    compute: type of activations, norms, KV cache and unquantized weights
    calibrated: which calibrated scheme it is; None needs no text
    blocks: of the linear layers; None stores them in `compute`
    overrides: other blocks for one kind of layer: qkv, o, gate_up, down, lm_head, or embedding (which a tied LM head
        shares)
    """

    name: str
    compute: ir.DataType = ir.DataType.FLOAT
    blocks: Blocks | None = None
    overrides: Mapping[str, Blocks] = field(default_factory=dict)
    keeps_imported: bool = False
    """Weights that the checkpoint holds as integers stay those integers; blocks and overrides are for the others."""
    calibrated: Calibrated | None = None

    @property
    def numpy_dtype(self) -> np.dtype[np.floating]:
        return np.dtype(np.float16 if self.compute == ir.DataType.FLOAT16 else np.float32)

    def blocks_of(self, kind: str) -> Blocks | None:
        """The blocks a layer kind is stored in."""
        return self.overrides.get(kind, self.blocks)

    def wide_blocks(self, num_inputs: int) -> Blocks:
        """The blocks of a layer for which 4 bits are too few."""
        return INT8_BLOCKS


INT8_BLOCKS = Blocks(bits=8, block_size=32, symmetric=True)
_INT4 = Blocks(bits=4, block_size=32, symmetric=False)

EXPORTABLE: Mapping[str, Precision] = {
    "fp32": Precision(name="fp32"),
    "fp16": Precision(name="fp16", compute=ir.DataType.FLOAT16),
    "w8a16": Precision(name="w8a16", blocks=INT8_BLOCKS),
    # Wider where 4 bits cost most for their bytes. The LM head sees every error of the layers before it and decides the
    # token, and a tied embedding shares its bytes. q, k and v are 16 % of SmolLM2-135M's layer weights, and in 4 bits
    # alone raise its perplexity by 7.5 % (gate and up, 50 %: 4.5 %; down, 25 %: 5.0 %; o, 9 %: 0.6 %).
    "w4a16": Precision(
        name="w4a16",
        blocks=_INT4,
        overrides={"embedding": INT8_BLOCKS, "lm_head": INT8_BLOCKS, "qkv": INT8_BLOCKS},
        calibrated=Calibrated.BLOCKS,
    ),
    "w8a8": Precision(name="w8a8", blocks=INT8_BLOCKS, calibrated=Calibrated.INT8),
}


IMPORTED = "imported"
"""Asks for what the checkpoint holds: its integers as they are, the rest as floats."""


def precision_named(name: str, *, stored_bits: int | None = None) -> Precision:
    """Look a precision up; `stored_bits` is that of a checkpoint that is quantized already.

    InvalidSetting lists what there is, or says what fits a checkpoint of that many bits.
    """
    if name == IMPORTED:
        if stored_bits is None:
            raise InvalidSetting(
                f"precision {IMPORTED} keeps the integers of a checkpoint that is quantized already (GPTQ, AWQ), and "
                f"this one is not; choose one of {', '.join(EXPORTABLE)}"
            )
        return Precision(name=f"w{stored_bits}a16", keeps_imported=True)
    if name not in EXPORTABLE:
        raise InvalidSetting(f"precision {name!r} cannot be exported; choose one of {', '.join(EXPORTABLE)}")
    precision = EXPORTABLE[name]
    if stored_bits is None or precision.blocks is None:
        return precision
    if precision.blocks.bits != stored_bits:
        raise InvalidSetting(
            f"the checkpoint's weights are {stored_bits}-bit integers already, and {name} would round them once more; "
            f"choose {IMPORTED}, w{stored_bits}a16, or fp32 and fp16, which hold them exactly as well"
        )
    return replace(precision, keeps_imported=True, calibrated=None)
