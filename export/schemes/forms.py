"""The forms in which a weight matrix `[N, K]` is stored. Data alone: what a form becomes in a graph is the graph's."""

from dataclasses import dataclass

COMPUTE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Types that activations can have, by numpy's name, and bytes of one number."""


@dataclass(frozen=True, slots=True)
class Floats:
    """In the compute type."""

    def bytes_per_weight(self, num_inputs: int, compute: str) -> float:
        return COMPUTE_BYTES[compute]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Integers with one scale, and a zero point unless symmetric, for each block of inputs of an output."""

    bits: int
    block_size: int
    symmetric: bool

    def bytes_per_weight(self, num_inputs: int, compute: str) -> float:
        zero_point = 0 if self.symmetric else self.bits / 8
        return self.bits / 8 + (COMPUTE_BYTES[compute] + zero_point) / self.block_size


@dataclass(frozen=True, slots=True)
class Channels:
    """int8, one scale an output channel."""

    def bytes_per_weight(self, num_inputs: int, compute: str) -> float:
        return 1 + COMPUTE_BYTES[compute] / num_inputs

    def as_blocks(self, num_inputs: int) -> Blocks:
        """The same as blocks that are as long as a row."""
        return Blocks(bits=8, block_size=num_inputs, symmetric=True)


@dataclass(frozen=True, slots=True)
class Int8Products:
    """int8, one scale an output channel, and inputs in int8 with one calibrated scale.

    fallback: of a layer without calibrated scales
    """

    fallback: "Blocks | Channels"

    def bytes_per_weight(self, num_inputs: int, compute: str) -> float:
        return 1 + COMPUTE_BYTES[compute] / num_inputs


Form = Floats | Blocks | Channels | Int8Products
