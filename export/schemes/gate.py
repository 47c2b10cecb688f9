"""Gates: limits on figures of the receipt, and those that several schemes share."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit on one measured figure. at_most: whether it is the highest allowed value, else the lowest."""

    figure: str
    limit: float
    reason: str
    at_most: bool = True

    def check(self, value: float) -> dict[str, Any]:
        """The receipt's row: figure, value, limit, reason, and whether it passed. A value must be finite to pass."""
        is_inside = value <= self.limit if self.at_most else value >= self.limit
        passed = bool(is_inside) and math.isfinite(value)
        return {**asdict(self), "value": value if math.isfinite(value) else str(value), "passed": passed}


BATCH = Gate("batch_logit_error", 1e-3, "a row's products do not depend on its neighbours: usually exactly 0")
BATCH_ROUNDED = Gate(
    "batch_logit_error",
    3.0,
    "a single row may take another kernel; where a sum then rounds an 8-bit activation the other way, an outlier"
    " channel carries it to the logits. A row that reads its neighbour's cache is off by ten and more",
)
BATCH_TOKENS = Gate(
    "batch_token_agreement", 1.0, "a prompt gets the same greedy tokens alone and in a batch", at_most=False
)
CHUNKS = Gate("chunk_logit_error", 1e-3, "chunks and single tokens only reorder float32 sums")


def chunks_rounded(limit: float) -> Gate:
    """The chunk gate of a scheme that rounds activations to 8 bits."""
    return Gate(
        "chunk_kl",
        limit,
        "a reordered sum can round an 8-bit activation the other way: no more than quantization itself costs",
    )


def parity(limit: float, reason: str) -> tuple[Gate, ...]:
    """A gate for each of the four ways of running that verify/parity.py compares."""
    return tuple(Gate(f"{way}_error", limit, reason) for way in ("prefill", "decode", "chunked", "ragged"))
