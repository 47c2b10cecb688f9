"""w8a8: weights and activations in int8, with static scales from calibration text."""

from export.schemes.forms import Channels, Int8Products
from export.schemes.gate import BATCH, BATCH_TOKENS, Gate, chunks_rounded
from export.schemes.scheme import CalibrationNeed, Scheme, Storage
from export.schemes.weight_only import INT8_BLOCKS

_KL = Gate("kl", 0.03, "the perplexity limit's worth of nats, three times over: the text is short")
_PERPLEXITY = Gate(
    "perplexity_increase", 0.015, "the promise is 1 %, and 1,000 tokens measure it within half a per cent"
)

W8A8 = Scheme(
    name="w8a8",
    summary="8-bit weights and activations, calibrated: the fastest on a CPU with VNNI",
    calibration=CalibrationNeed.INT8,
    multiplies_int8=True,
    ort=Storage(
        compute="float32",
        linear=Int8Products(fallback=INT8_BLOCKS),
        embedding=INT8_BLOCKS,
        gates=(
            _KL,
            Gate("top1_agreement", 0.93, "near ties flip; SmolLM2-135M keeps 96 %, wider models more", at_most=False),
            _PERPLEXITY,
            BATCH,
            BATCH_TOKENS,
            chunks_rounded(0.03),
        ),
    ),
    # The ort dialect's integers and scales, and float16 for the rest. The limits are the same, too: SmolLM2-135M has KL
    # 0.005, top-1 agreement 96 % and perplexity +0.7 %, and in the ort dialect 0.006, 96 % and +0.6 %. The LM head
    # decides the token, so its activations stay floats.
    standard=Storage(
        compute="float16",
        linear=Int8Products(fallback=Channels()),
        overrides={"lm_head": Channels()},
        gates=(
            _KL,
            Gate(
                "top1_agreement", 0.93, "near ties flip; SmolLM2-135M keeps 96 %, as in the ort dialect", at_most=False
            ),
            _PERPLEXITY,
            chunks_rounded(0.03),
        ),
    ),
)
