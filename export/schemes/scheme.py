"""A quantization scheme: how each kind of graph stores weights and computes, what calibration it needs, its gates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from export.schemes.forms import Blocks, Channels, Floats, Form, Int8Products
from export.schemes.gate import Gate


class Calibration(Enum):
    """What a scheme uses calibration text for."""

    INT8 = "static ranges: linear layers multiply in int8 (quantize/int8/)"
    BLOCKS = "rounding weights together in blocks (quantize/int4/)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How one kind of graph stores weights and computes.

    compute: type of activations, norms, KV cache and weights that stay floats, by numpy's name
    linear: form of the linear layers; overrides: another for some roles (`Linear.role`)
    embedding: form of the table, which a tied LM head shares
    wide: form of layers for which 4 bits are too few, see quantize/int4/model.py
    gates: limits of the receipt
    """

    compute: str
    gates: tuple[Gate, ...]
    linear: Form = field(default_factory=Floats)
    overrides: Mapping[str, Form] = field(default_factory=dict)
    embedding: Form = field(default_factory=Floats)
    wide: Blocks | Channels | None = None

    def form_of(self, role: str) -> Form:
        """The form of a role's layers. A router stays floats: it decides between experts with few weights."""
        return Floats() if role == "router" else self.overrides.get(role, self.linear)

    def int4_blocks_of(self, role: str) -> Blocks | None:
        """The blocks of a layer that is stored in 4 bits; None if it is not."""
        form = self.form_of(role)
        return form if isinstance(form, Blocks) and form.bits == 4 else None

    def eight_bit_blocks(self, num_inputs: int) -> Blocks:
        """The blocks of a layer for which 4 bits are too few."""
        assert self.wide is not None, "a scheme of 4-bit blocks says what is wider"
        return self.wide.as_blocks(num_inputs) if isinstance(self.wide, Channels) else self.wide

    def fallback_of(self, role: str) -> Form:
        """The form of a layer that calibration left out."""
        form = self.form_of(role)
        return form.fallback if isinstance(form, Int8Products) else form


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One value of --precision.

    summary: for `--help` and the README
    ort, standard: for ONNX Runtime's graph and for the standard ones; None where there is none
    keeps_stored: weights that the checkpoint holds as integers stay those integers
    """

    name: str
    summary: str
    ort: Storage | None
    standard: Storage | None
    calibration: Calibration | None = None
    keeps_stored: bool = False

    def storage_of(self, dialect: str) -> Storage | None:
        """The storage of a dialect's graph."""
        return self.ort if dialect == "ort" else self.standard
