"""How far an exported model may be from its reference: one row a precision, each limit with its reason."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from runtime.errors import InvalidSetting


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit on one measured figure; `at_most` False means at least."""

    figure: str
    limit: float
    reason: str
    at_most: bool = True

    def check(self, value: float) -> dict[str, Any]:
        """The receipt's row: figure, value, limit, reason and whether it passed. What is not finite never passes."""
        is_inside = value <= self.limit if self.at_most else value >= self.limit
        passed = bool(is_inside) and math.isfinite(value)
        return {**asdict(self), "value": value if math.isfinite(value) else str(value), "passed": passed}


_BATCH = Gate("batch_logit_error", 1e-3, "a row's products do not depend on its neighbours: usually exactly 0")
_BATCH_ROUNDED = Gate(
    "batch_logit_error",
    3.0,
    "a single row may take another kernel; where a sum then rounds an 8-bit activation the other way, an outlier"
    " channel carries it to the logits. A row that reads its neighbour's cache is off by ten and more",
)
_BATCH_TOKENS = Gate(
    "batch_token_agreement", 1.0, "a prompt gets the same greedy tokens alone and in a batch", at_most=False
)
_CHUNKS = Gate("chunk_logit_error", 1e-3, "chunks and single tokens only reorder float32 sums")


def _chunks_rounded(limit: float) -> Gate:
    return Gate(
        "chunk_kl",
        limit,
        "a reordered sum can round an 8-bit activation the other way: no more than quantization itself costs",
    )


GATES: Mapping[str, tuple[Gate, ...]] = {
    "fp32": (
        Gate(
            "max_logit_error",
            1e-3,
            "float32 sums in another order; a wrong scale or position costs whole units",
        ),
        Gate("kl", 1e-6, "follows from the logit error: both distributions are the same to five digits"),
        Gate(
            "greedy_agreement",
            1.0,
            "equal tokens, but for ties closer than twice the logit error",
            at_most=False,
        ),
        _BATCH,
        _CHUNKS,
        _BATCH_TOKENS,
    ),
    "fp16": (
        Gate("kl", 1e-3, "half precision has 11 bits: 5e-4 relative, a few times that after some thirty layers"),
        Gate("top1_agreement", 0.97, "near ties flip; a broken layer leaves less than half", at_most=False),
        Gate("perplexity_increase", 0.005, "below what any reader could notice"),
        Gate("chunk_kl", 1e-3, "sums in another order, rounded to 11 bits"),
    ),
    "w8a16": (
        Gate("kl", 0.02, "8-bit blocks of 32 keep seven bits a weight; five times what SmolLM2-135M shows"),
        Gate("top1_agreement", 0.93, "near ties flip; SmolLM2-135M keeps 97 %", at_most=False),
        Gate("perplexity_increase", 0.015, "published 8-bit weight-only results stay below 1 %"),
        _BATCH,
        _BATCH_TOKENS,
        _chunks_rounded(0.02),
    ),
    "w4a16": (
        Gate("kl", 0.1, "twice what SmolLM2-135M shows, which is as small as models get; to nearest it was 0.14"),
        Gate("top1_agreement", 0.82, "SmolLM2-135M keeps 88 %, to nearest 79 %; wider models more", at_most=False),
        Gate("perplexity_increase", 0.06, "SmolLM2-135M shows 3.3 %, and 2,000 tokens measure it within one per cent"),
        _BATCH_ROUNDED,
        _chunks_rounded(0.1),
    ),
    "w8a8": (
        Gate("kl", 0.03, "the perplexity limit's worth of nats, three times over: the text is short"),
        Gate("top1_agreement", 0.93, "near ties flip; SmolLM2-135M keeps 96 %, wider models more", at_most=False),
        Gate("perplexity_increase", 0.015, "the promise is 1 %, and 1,000 tokens measure it within half a per cent"),
        _BATCH,
        _BATCH_TOKENS,
        _chunks_rounded(0.03),
    ),
}


def _parity(limit: float, reason: str) -> tuple[Gate, ...]:
    """In the four ways of parity.py."""
    return tuple(Gate(f"{way}_error", limit, reason) for way in ("prefill", "decode", "chunked", "ragged"))


_REORDERED = "the same float32 sums as the ort dialect's in another order; a wrong mask or slot costs whole units"

# On ONNX Runtime, a stand-in for the device; what it cannot show is said where the figures are printed.
TRT_GATES: Mapping[str, tuple[Gate, ...]] = {
    "fp32": (*GATES["fp32"][:3], *_parity(1e-3, _REORDERED)),
    "fp16": (
        *GATES["fp16"],
        *_parity(0.1, "every product is rounded to 11 bits; logits near 40 have steps of 0.03 themselves"),
    ),
    "bf16": (
        Gate("kl", 5e-3, "8 bits a weight's mantissa: 4e-3 relative, eight times half precision's"),
        Gate("top1_agreement", 0.93, "near ties flip, as with 8-bit weights", at_most=False),
        Gate("perplexity_increase", 0.015, "below 8-bit weights' own limit"),
    ),
    "w8a16": (
        Gate("kl", 0.02, "one scale an output channel; the ort dialect's limit, whose blocks are finer"),
        Gate("top1_agreement", 0.93, "near ties flip, no more than in the ort dialect", at_most=False),
        Gate("perplexity_increase", 0.015, "published 8-bit weight-only results stay below 1 %"),
        _chunks_rounded(0.02),
    ),
    "w4a16": (
        Gate("kl", 0.15, "twice what SmolLM2-135M shows, 0.08; its blocks are twice the ort dialect's, without zeros"),
        Gate("top1_agreement", 0.80, "SmolLM2-135M keeps 84 %, to nearest 78 %; wider models more", at_most=False),
        Gate("perplexity_increase", 0.12, "SmolLM2-135M shows 7 %, to nearest 21 %; wider models less"),
        _chunks_rounded(0.15),
    ),
    # The ort dialect's integers and scales, with half precision around them: SmolLM2-135M shows 0.005 nats, 96 % and
    # +0.7 % where the ort dialect shows 0.006, 96 % and +0.6 %, so the limits are those.
    "w8a8": (
        Gate("kl", 0.03, "the perplexity limit's worth of nats, three times over: the text is short"),
        Gate("top1_agreement", 0.93, "near ties flip; SmolLM2-135M keeps 96 %, as in the ort dialect", at_most=False),
        Gate("perplexity_increase", 0.015, "the promise is 1 %, and 1,000 tokens measure it within half a per cent"),
        _chunks_rounded(0.03),
    ),
}


# What an int8 cache may add. Keys and values keep seven bits of each channel's range, and every layer reads them: about
# what 8-bit weights in blocks cost, of which SmolLM2-135M shows a tenth.
_KV_ADDS: Mapping[str, float] = {"kl": 0.005, "perplexity_increase": 0.005, "top1_agreement": -0.02}
_KV_REASON = "; an int8 KV cache may cost as much as a quarter of what 8-bit weights may"

_KV_OF_FLOATS = (
    Gate("kl", 0.005, "keys and values keep seven bits of each channel's range; a wrong scale costs whole nats"),
    Gate("top1_agreement", 0.95, "near ties flip", at_most=False),
    Gate("perplexity_increase", 0.005, "below what any reader could notice, and half of what int8 weights may"),
    _BATCH,
    _BATCH_TOKENS,
    _chunks_rounded(0.005),
)


def gates_of(
    dialect: str, precision: str, *, kv_dtype: str = "float32", limits: Mapping[str, float] | None = None
) -> tuple[Gate, ...]:
    """The limits for one dialect in one precision, with a cache of that type; `limits`: the user's own, by figure."""
    gates = _gates_of(dialect, precision, kv_dtype)
    return tuple(
        replace(gate, limit=limits[gate.figure], reason=f"asked for with --gate; {gate.limit:g} by default")
        if limits and gate.figure in limits
        else gate
        for gate in gates
    )


def check_limits(limits: Mapping[str, float], dialects: Sequence[str], precision: str, kv_dtype: str) -> None:
    """InvalidSetting for a limit on a figure that no gate of this export has."""
    figures = {gate.figure for dialect in dialects for gate in _gates_of(dialect, precision, kv_dtype)}
    if unknown := sorted(set(limits) - figures):
        raise InvalidSetting(
            f"--gate {unknown[0]}: {precision} has no such gate; choose from {', '.join(sorted(figures))}"
        )


def _gates_of(dialect: str, precision: str, kv_dtype: str) -> tuple[Gate, ...]:
    if dialect != "ort":
        return TRT_GATES[precision]
    if kv_dtype != "int8":
        return GATES[precision]
    if precision == "fp32":
        return _KV_OF_FLOATS
    return tuple(
        replace(gate, limit=gate.limit + _KV_ADDS[gate.figure], reason=gate.reason + _KV_REASON)
        if gate.figure in _KV_ADDS
        else gate
        for gate in GATES[precision]
    )


def failure(receipt: Mapping[str, Any]) -> str:
    """What a receipt that did not pass has to say: each figure beyond its limit."""
    failed = [
        {**check, "bound": "at most" if check["at_most"] else "at least"}
        for check in receipt["checks"]
        if not check["passed"]
    ]
    words = "; ".join(
        f"{check['figure']} is {check['value']:.4g}, allowed {check['bound']} {check['limit']:g}"
        if isinstance(check["value"], float)
        else f"{check['figure']} is {check['value']}"
        for check in failed
    )
    return f"{receipt['precision']} is too far from the reference: {words}. Try a wider precision, or --force"
