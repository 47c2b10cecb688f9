"""Weight-only schemes: weights in 8 or 4 bits, activations in 16 or more."""

from export.schemes.forms import Blocks, Channels
from export.schemes.gate import BATCH, BATCH_ROUNDED, BATCH_TOKENS, Gate, chunks_rounded
from export.schemes.scheme import CalibrationNeed, Scheme, Storage

INT8_BLOCKS = Blocks(bits=8, block_size=32, symmetric=True)
"""ONNX Runtime's MatMulNBits."""

INT4_SIZES = (64, 128)
"""Sizes of int4 blocks that TensorRT documents. tensorrt-rtx 1.7.1 builds any divisor of the rows (16, 32, 48, 64, 96,
128 and 256 were tried); whether it runs them is unknown. With blocks of 32, SmolLM2-135M's perplexity rises by 5.9 %
(KL 0.063 nats) instead of 7 % (0.08), for 2.1 % more bytes: worth it once a GPU has run them."""

INT4_BLOCKS = Blocks(bits=4, block_size=INT4_SIZES[0], symmetric=True)
"""TensorRT's."""

W8A16 = Scheme(
    name="w8a16",
    summary="8-bit weights, nothing calibrated",
    ort=Storage(
        compute="float32",
        linear=INT8_BLOCKS,
        embedding=INT8_BLOCKS,
        gates=(
            Gate("kl", 0.02, "8-bit blocks of 32 keep seven bits a weight; five times what SmolLM2-135M shows"),
            Gate("top1_agreement", 0.93, "near ties flip; SmolLM2-135M keeps 97 %", at_most=False),
            Gate("perplexity_increase", 0.015, "published 8-bit weight-only results stay below 1 %"),
            BATCH,
            BATCH_TOKENS,
            chunks_rounded(0.02),
        ),
    ),
    standard=Storage(
        compute="float16",
        linear=Channels(),
        gates=(
            Gate("kl", 0.02, "one scale an output channel; the ort dialect's limit, whose blocks are finer"),
            Gate("top1_agreement", 0.93, "near ties flip, no more than in the ort dialect", at_most=False),
            Gate("perplexity_increase", 0.015, "published 8-bit weight-only results stay below 1 %"),
            chunks_rounded(0.02),
        ),
    ),
)

# Layers that lose most in 4 bits have 8. The LM head decides the token, and a tied embedding shares its bytes. q, k and
# v are 16 % of SmolLM2-135M's layer weights; 4 bits in them alone raise perplexity by 7.5 % (gate and up, 50 % of the
# weights: 4.5 %; down, 25 %: 5.0 %; o, 9 %: 0.6 %). The inputs of a recurrence come from 8 bits too (not measured),
# because an error stays in its state.
W4A16 = Scheme(
    name="w4a16",
    summary="4-bit weights, rounded with GPTQ on calibration text; q, k, v, embedding and LM head in 8 bits",
    calibration=CalibrationNeed.BLOCKS,
    ort=Storage(
        compute="float32",
        linear=Blocks(bits=4, block_size=32, symmetric=False),
        overrides={"lm_head": INT8_BLOCKS, "qkv": INT8_BLOCKS, "mix_in": INT8_BLOCKS},
        embedding=INT8_BLOCKS,
        eight_bit=INT8_BLOCKS,
        gates=(
            Gate("kl", 0.1, "twice what SmolLM2-135M shows, which is as small as models get; to nearest it was 0.14"),
            Gate("top1_agreement", 0.82, "SmolLM2-135M keeps 88 %, to nearest 79 %; wider models more", at_most=False),
            Gate(
                "perplexity_increase", 0.06, "SmolLM2-135M shows 3.3 %, and 2,000 tokens measure it within one per cent"
            ),
            BATCH_ROUNDED,
            chunks_rounded(0.1),
        ),
    ),
    standard=Storage(
        compute="float16",
        linear=INT4_BLOCKS,
        overrides={"lm_head": Channels(), "qkv": Channels(), "mix_in": Channels()},
        eight_bit=Channels(),
        gates=(
            Gate(
                "kl", 0.15, "twice what SmolLM2-135M shows, 0.08; its blocks are twice the ort dialect's, without zeros"
            ),
            Gate("top1_agreement", 0.80, "SmolLM2-135M keeps 84 %, to nearest 78 %; wider models more", at_most=False),
            Gate("perplexity_increase", 0.12, "SmolLM2-135M shows 7 %, to nearest 21 %; wider models less"),
            chunks_rounded(0.15),
        ),
    ),
)
