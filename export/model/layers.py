"""Linear layers and norms of a decoder, and where they stand in it; part of the description (description.py)."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Site(NamedTuple):
    """The place of a linear layer: decoder layer and kind. For statistics, also `k` and `v` of the KV cache."""

    layer: int
    kind: str

    @property
    def expert(self) -> int | None:
        """The number of the expert whose layer it is."""
        number = self.kind.rpartition(".")[2]
        return int(number) if number.isdigit() else None

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


class NormKind(Enum):
    """Root mean square norm (arXiv:1910.07467), or layer norm (arXiv:1607.06450)."""

    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm over the last axis.

    name: of its tensors, without `.weight` and `.bias`; size: number of channels
    adds_one: the checkpoint stores w, and the model multiplies by 1 + w
    has_weight: False if the norm has no tensor and multiplies by 1
    """

    name: str
    size: int
    epsilon: float
    kind: NormKind = NormKind.RMS
    has_bias: bool = False
    adds_one: bool = False
    has_weight: bool = True


class Part(NamedTuple):
    """One matrix of the checkpoint, `[num_rows, num_inputs]`; `name` is without `.weight`."""

    name: str
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One matrix product, `[N, K]` with N outputs. Matrices of the checkpoint with the same input are stacked.

    site.kind: unique in a block
    role: qkv, gate, o, mix_in, mix_out, gate_up, up, down, router or lm_head; schemes choose a form by it
    reads: the norm whose output is its input; None if the input comes from attention, from the activation, or from the
        residual stream without a norm
    writes_stream: whether its output is added to the residual stream
    """

    site: Site
    role: str
    parts: tuple[Part, ...]
    num_inputs: int
    has_bias: bool = False
    reads: Norm | None = None
    writes_stream: bool = False

    @property
    def num_outputs(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """`[N, K]`."""
        return self.num_outputs, self.num_inputs

    @property
    def is_quantizable(self) -> bool:
        """False for a router and the gates of a shared expert or a recurrence: few weights that decide much."""
        return self.role != "router"

    @property
    def weight_names(self) -> list[str]:
        return [f"{part.name}.weight" for part in self.parts]

    @property
    def bias_names(self) -> list[str]:
        return [f"{part.name}.bias" for part in self.parts]
