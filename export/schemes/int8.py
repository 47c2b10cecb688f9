"""Weights and activations in int8, with static scales from calibration text."""

from export.schemes.forms import Channels, Int8Products
from export.schemes.gate import BATCH, BATCH_TOKENS, Gate, chunks_rounded
from export.schemes.scheme import Calibration, Scheme, Storage
from export.schemes.weight_only import INT8_BLOCKS

W8A8 = Scheme(
    name="w8a8",
    summary="8-bit weights and activations, calibrated: the fastest on a CPU with VNNI",
    calibration=Calibration.INT8,
    ort=Storage(
        compute="float32",
        linear=Int8Products(fallback=INT8_BLOCKS),
        embedding=INT8_BLOCKS,
        gates=(
            Gate("kl", 0.03, "the perplexity limit's worth of nats, three times over: the text is short"),
            Gate("top1_agreement", 0.93, "near ties flip; SmolLM2-135M keeps 96 %, wider models more", at_most=False),
            Gate(
                "perplexity_increase", 0.015, "the promise is 1 %, and 1,000 tokens measure it within half a per cent"
            ),
            BATCH,
            BATCH_TOKENS,
            chunks_rounded(0.03),
        ),
    ),
    # The ort dialect's integers and scales, with half precision around them: SmolLM2-135M shows 0.005 nats, 96 % and
    # +0.7 % where the ort dialect shows 0.006, 96 % and +0.6 %, so the limits are those. The LM head decides the token:
    # its activations stay wide.
    standard=Storage(
        compute="float16",
        linear=Int8Products(fallback=Channels()),
        overrides={"lm_head": Channels()},
        gates=(
            Gate("kl", 0.03, "the perplexity limit's worth of nats, three times over: the text is short"),
            Gate(
                "top1_agreement", 0.93, "near ties flip; SmolLM2-135M keeps 96 %, as in the ort dialect", at_most=False
            ),
            Gate(
                "perplexity_increase", 0.015, "the promise is 1 %, and 1,000 tokens measure it within half a per cent"
            ),
            chunks_rounded(0.03),
        ),
    ),
)
