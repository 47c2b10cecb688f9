"""The forms in which a weight matrix `[N, K]` can be stored. Graphs decide which operators a form becomes."""

from dataclasses import dataclass

COMPUTE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of each type that a scheme can compute in, by numpy's name."""


@dataclass(frozen=True, slots=True)
class Floats:
    """Floats in the compute type."""

    def bytes_per_weight(self, num_inputs: int, compute: str) -> float:
        return COMPUTE_BYTES[compute]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Integers with a scale, and unless symmetric a zero point, for each block of inputs of an output."""

    bits: int
    block_size: int
    symmetric: bool

    def bytes_per_weight(self, num_inputs: int, compute: str) -> float:
        zero_point = 0 if self.symmetric else self.bits / 8
        return self.bits / 8 + (COMPUTE_BYTES[compute] + zero_point) / self.block_size


@dataclass(frozen=True, slots=True)
class Channels:
    """int8 with one scale per output channel."""

    def bytes_per_weight(self, num_inputs: int, compute: str) -> float:
        return 1 + COMPUTE_BYTES[compute] / num_inputs

    def as_blocks(self, num_inputs: int) -> Blocks:
        """The same form as blocks, each one row."""
        return Blocks(bits=8, block_size=num_inputs, symmetric=True)


@dataclass(frozen=True, slots=True)
class Int8Products:
    """int8 with one scale per output channel, and inputs in int8 with one calibrated scale.

    fallback: form of a layer without calibrated scales
    """

    fallback: "Blocks | Channels"

    def bytes_per_weight(self, num_inputs: int, compute: str) -> float:
        return 1 + COMPUTE_BYTES[compute] / num_inputs


Form = Floats | Blocks | Channels | Int8Products
