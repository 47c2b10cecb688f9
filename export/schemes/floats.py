"""Schemes without integers: float32, float16 and bfloat16."""

from export.schemes.gate import BATCH, BATCH_TOKENS, CHUNKS, Gate, parity
from export.schemes.scheme import Scheme, Storage

_FP32_GATES = (
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
    BATCH,
    CHUNKS,
    BATCH_TOKENS,
)

_FP16_GATES = (
    Gate("kl", 1e-3, "half precision has 11 bits: 5e-4 relative, a few times that after some thirty layers"),
    Gate("top1_agreement", 0.97, "near ties flip; a broken layer leaves less than half", at_most=False),
    Gate("perplexity_increase", 0.005, "below what any reader could notice"),
    Gate("chunk_kl", 1e-3, "sums in another order, rounded to 11 bits"),
)

FP32 = Scheme(
    name="fp32",
    summary="float32 throughout",
    ort=Storage(compute="float32", gates=_FP32_GATES),
    standard=Storage(
        compute="float32",
        gates=(
            *_FP32_GATES[:3],
            *parity(
                1e-3,
                "the same float32 sums as the ort dialect's in another order; a wrong mask or slot costs whole units",
            ),
        ),
    ),
)

FP16 = Scheme(
    name="fp16",
    summary="half precision throughout, for GPUs",
    ort=Storage(compute="float16", gates=_FP16_GATES),
    standard=Storage(
        compute="float16",
        gates=(
            *_FP16_GATES,
            *parity(0.1, "every product is rounded to 11 bits; logits near 40 have steps of 0.03 themselves"),
        ),
    ),
)

BF16 = Scheme(
    name="bf16",
    summary="bfloat16 throughout, for TensorRT",
    ort=None,
    standard=Storage(
        compute="bfloat16",
        gates=(
            Gate("kl", 5e-3, "8 bits a weight's mantissa: 4e-3 relative, eight times half precision's"),
            Gate("top1_agreement", 0.93, "near ties flip, as with 8-bit weights", at_most=False),
            Gate("perplexity_increase", 0.015, "below 8-bit weights' own limit"),
        ),
    ),
)
