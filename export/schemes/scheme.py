"""A quantization scheme: how each kind of graph stores weights, the calibration it needs, and its gates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from export.schemes.forms import Blocks, Channels, Floats, Form, Int8Products
from export.schemes.gate import Gate


class CalibrationNeed(Enum):
    """The purpose of a scheme's calibration text."""

    INT8 = "static int8 ranges of each linear layer's input (quantize/int8/)"
    BLOCKS = "rounding blocks of weights with GPTQ (quantize/int4/)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How one kind of graph stores weights and computes.

    compute: type of activations, norms, KV cache and float weights, by numpy's name
    linear: form of the linear layers; overrides: the form of some roles (`Linear.role`)
    embedding: form of the embedding, and of a tied LM head
    eight_bit: form of layers of a 4-bit scheme that keep 8 bits, see quantize/int4/model.py
    gates: limits on the receipt's figures
    """

    compute: str
    gates: tuple[Gate, ...]
    linear: Form = field(default_factory=Floats)
    overrides: Mapping[str, Form] = field(default_factory=dict)
    embedding: Form = field(default_factory=Floats)
    eight_bit: Blocks | Channels | None = None

    def form_of(self, role: str) -> Form:
        """The form of a role's layers. A router stays floats: it has few weights, and chooses between experts."""
        return Floats() if role == "router" else self.overrides.get(role, self.linear)

    def int4_blocks_of(self, role: str) -> Blocks | None:
        """The blocks of a layer that is stored in 4 bits; None for other forms."""
        form = self.form_of(role)
        return form if isinstance(form, Blocks) and form.bits == 4 else None

    def eight_bit_blocks(self, num_inputs: int) -> Blocks:
        """The blocks of a layer that keeps 8 bits."""
        assert self.eight_bit is not None, "a scheme of 4-bit blocks has an 8-bit form"
        return self.eight_bit.as_blocks(num_inputs) if isinstance(self.eight_bit, Channels) else self.eight_bit

    def fallback_of(self, role: str) -> Form:
        """The form of a layer without calibrated scales."""
        form = self.form_of(role)
        return form.fallback if isinstance(form, Int8Products) else form


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One value of --precision.

    summary: for `--help` and the README
    ort, standard: storage of ONNX Runtime's graph and of the standard ones; None if there is no such graph
    keeps_stored: whether a quantized checkpoint's integers are kept
    multiplies_int8: whether inputs are rounded to int8 with stored or calibrated scales
    """

    name: str
    summary: str
    ort: Storage | None
    standard: Storage | None
    calibration: CalibrationNeed | None = None
    keeps_stored: bool = False
    multiplies_int8: bool = False

    def storage_of(self, dialect: str) -> Storage | None:
        """The storage of a dialect's graph."""
        if dialect == "native":  # its kernels compute in float32
            return self.ort if self.ort is not None and self.ort.compute == "float32" else None
        return self.ort if dialect == "ort" else self.standard
