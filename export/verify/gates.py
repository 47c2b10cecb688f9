"""The limits of an export: those of its scheme, of an int8 KV cache, and the user's own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from export.schemes.gate import BATCH, BATCH_TOKENS, Gate, chunks_rounded
from export.schemes.registry import SCHEMES
from runtime.artifact.manifest import kind_of
from runtime.errors import InvalidSetting

# What an int8 cache may add. Keys and values keep seven bits of each channel's range, and every layer reads them: about
# what 8-bit weights in blocks cost, of which SmolLM2-135M shows a tenth.
_KV_ADDS: Mapping[str, float] = {"kl": 0.005, "perplexity_increase": 0.005, "top1_agreement": -0.02}
_KV_REASON = "; an int8 KV cache may cost as much as a quarter of what 8-bit weights may"

_KV_OF_FLOATS = (
    Gate("kl", 0.005, "keys and values keep seven bits of each channel's range; a wrong scale costs whole nats"),
    Gate("top1_agreement", 0.95, "near ties flip", at_most=False),
    Gate("perplexity_increase", 0.005, "below what any reader could notice, and half of what int8 weights may"),
    BATCH,
    BATCH_TOKENS,
    chunks_rounded(0.005),
)

_SAME_BITS = (
    Gate("batch_logit_error", 0.0, "a token's result is the same to the bit in any batch"),
    Gate("chunk_logit_error", 0.0, "a token's result is the same to the bit however its prompt is cut"),
)
"""The native operators add every token's floats in one order, and the engine relies on it (NativeSession)."""


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
    storage = SCHEMES[precision].storage_of(dialect)
    assert storage is not None, (precision, dialect)
    gates = storage.gates
    if kv_dtype == "int8" and kind_of(dialect) == "ort":
        gates = _KV_OF_FLOATS if precision == "fp32" else tuple(map(_with_int8_kv, gates))
    if dialect != "native":
        return gates
    return (*(gate for gate in gates if not gate.figure.startswith(("batch_logit", "chunk_"))), *_SAME_BITS)


def _with_int8_kv(gate: Gate) -> Gate:
    """A scheme's gate where the KV cache is int8 as well."""
    if gate.figure not in _KV_ADDS:
        return gate
    return replace(gate, limit=gate.limit + _KV_ADDS[gate.figure], reason=gate.reason + _KV_REASON)


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
