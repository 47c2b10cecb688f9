"""Predicts the peak memory of a calibrated export from the model's dimensions. Reads no weights.

Each phase is the sum of the arrays that its code holds at once; the largest phase is the prediction. The factors were
measured with tracemalloc, and the predictions with the operating system's figures (benchmarks/calibration_memory.py).
The number of samples hardly matters, because text is streamed and searches use some of it.

Not counted, because none of them decides the peak of any of 13 shapes of model from 64 to 5,120 hidden channels: the
range search, copies of smoothed weights, rounding to nearest, and GPTQ's pass over the columns.
"""

import sys
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from export.model.description import ModelConfig
from export.pipeline.estimates import layer_bytes, weight_bytes
from export.quantize.int4.rounding import MOST_BYTES, NUM_PIECES, PIECE
from export.quantize.int8.ranges import MAX_OUTPUTS
from export.quantize.int8.sensitivity import FOLD as MEASURED_FOLD
from export.quantize.int8.sensitivity import LENGTH as MEASURED_LENGTH
from export.quantize.int8.sensitivity import NUM_SEQUENCES as NUM_MEASURED
from export.quantize.int8.sensitivity import TOGETHER
from export.quantize.rounding.gptq import MAX_GPTQ_INPUTS
from export.quantize.statistics.activation_stats import NUM_FOLDS
from export.quantize.statistics.collect import CHUNK_BYTES, token_bytes
from export.quantize.statistics.parallel import num_workers
from export.quantize.statistics.search_pass import MOST_BYTES as MOST_SEARCHED
from export.quantize.statistics.search_pass import NUM_SEQUENCES, input_bytes
from export.schemes.scheme import CalibrationNeed, Scheme
from export.verify.graph_run import BATCH, MAX_PROMPT, NUM_GREEDY, WINDOW
from runtime.artifact.manifest import kind_of
from runtime.errors import InvalidSetting
from runtime.machine.available_memory import available_memory
from runtime.machine.sizes import format_bytes, kv_bytes_per_token
from runtime.session.scoring import CHUNK

# Bytes of the interpreter with its libraries and the allocator's reserve, and of a worker's BLAS buffer and arena.
_PROCESS, _WORKER = 110e6, 55e6
# Measured share of `token_bytes`, which is an upper bound.
_LIVE = 0.75

# Bytes per weight
_LOADED = 8  # float32, and a rotated, smoothed or stacked copy
# Bytes per pair of input channels
_GRAM = 8  # the Gram matrix, and the sum that is added to it
_FACTOR = 8  # the Gram matrix in another order
# Bytes per token and input channel
_SEEN = 4  # the input, rounded and weighted
_DRIFT = 12  # the difference from the exact input, the weighted input, and the product of one with the weight
# Bytes per weight of a target: the lost output and two copies in another order
_TARGET = 16
# Bytes per output and input that a range search compares: one rounded copy for each strength and held-out fold
_SMOOTHED = 4 * 20
# Bytes per logit
_COMPARED = 24  # both models' logits, their logarithms, and the terms of the divergence
# Memory of a running graph, as a multiple of its weights: the kernel has its own copy of int8 and of packed blocks.
_RUN = {CalibrationNeed.INT8: 1.3, CalibrationNeed.BLOCKS: 2.5}
# Bytes per element of the embedding in a TensorRT graph, which ONNX Runtime executes without fusions
_HALF_TABLE = 6  # half precision, and float32 for the product
_HEAD = 9  # the same with an untied LM head: int8, and float32 for the product


class Phase(NamedTuple):
    """A phase of the export, and the process's peak memory in it, in bytes."""

    name: str
    size: int


class _Sizes:
    """Sizes that the phases share: number of weights, bytes of the largest block, bytes per token."""

    def __init__(self, config: ModelConfig, workers: int) -> None:
        self.hidden, self.vocab, self.workers = config.hidden_size, config.vocab_size, workers
        blocks = ([linear for linear in block.linears if linear.is_quantizable] for block in config.blocks)
        linears = max(blocks, key=lambda linears: sum(prod(linear.shape) for linear in linears))
        sizes = [prod(linear.shape) for linear in linears]
        self.num_inputs = [linear.num_inputs for linear in linears]
        self.weights = sum(sizes)
        self.largest = max(sizes)
        self.layer = 4 * self.weights + _LOADED * self.largest
        self.head = config.vocab_size * self.hidden
        self.inputs = int(4 * sum(linear.num_inputs * config.share_of_tokens(linear.site) for linear in linears))
        self.token = token_bytes(config)
        self.live = _LIVE * self.token


def _gptq(num_inputs: int, tokens: int) -> float:
    """Bytes for filling the Gram matrix of one layer's input and factorizing it."""
    k = num_inputs if num_inputs <= MAX_GPTQ_INPUTS else 0
    return max(_GRAM * k * k + _SEEN * tokens * k, _FACTOR * k * k)


def phases(
    config: ModelConfig,
    scheme: Scheme,
    *,
    num_samples: int,
    length: int,
    workers: int | None = None,
    dialects: Sequence[str] = ("ort",),
) -> list[Phase]:
    """Predict the peak of each phase of an export that calibrates on `num_samples` sequences of `length` tokens."""
    sizes = _Sizes(config, workers or num_workers())
    assert scheme.calibration is not None
    found = _PHASES[scheme.calibration]
    overhead = _PROCESS + _WORKER * (sizes.workers if scheme.calibration is CalibrationNeed.INT8 else 0)
    verification = _verification(sizes, config, scheme, dialects)
    sizes_of = {**found(sizes, config, num_samples, length), "verification": verification}
    return [Phase(name, int(size + overhead)) for name, size in sizes_of.items()]


def _int8_phases(s: _Sizes, config: ModelConfig, num_samples: int, length: int) -> dict[str, float]:
    chunk = max(length, CHUNK_BYTES // s.token)
    passing = min(num_samples * length, s.workers * chunk) * s.live + 4 * min(num_samples * length, chunk) * s.hidden
    of_fold = len(range(MEASURED_FOLD, num_samples, NUM_FOLDS)) or num_samples
    measured = min(of_fold, NUM_MEASURED) * min(length, MEASURED_LENGTH)
    streams = 8 * measured * s.hidden * (1 + len(s.num_inputs) * config.num_layers)
    changed = s.workers * min(TOGETHER, len(s.num_inputs)) * measured * s.live
    searched = _SMOOTHED * sum(sorted(s.num_inputs)[-s.workers :]) * MAX_OUTPUTS
    statistics = s.layer + max(passing, searched, streams + changed)
    head = 4 * s.head + streams + _COMPARED * measured * s.vocab

    limit = max(1, MOST_SEARCHED // input_bytes(config))
    tokens = min(min(num_samples, NUM_SEQUENCES) * length, limit)
    kept = tokens * (s.inputs + 8 * s.hidden)
    running = kept + s.layer + min(tokens, s.workers * chunk) * s.live
    rounded = kept + 4 * s.weights + max(_gptq(k, tokens) for k in s.num_inputs)
    rounded_head = s.head + 12 * tokens * s.hidden + _gptq(s.hidden, tokens)
    rounding = max(running + 4 * s.weights, rounded, rounded_head)
    # The embedding is written as a whole.
    return {"statistics": statistics, "sensitivity": head, "rounding": rounding, "graphs": _LOADED * s.head}


def _int4_phases(s: _Sizes, config: ModelConfig, num_samples: int, length: int) -> dict[str, float]:
    tokens = min(NUM_PIECES * PIECE, num_samples * length, max(PIECE, MOST_BYTES // s.token))
    streams = 8 * tokens * s.hidden
    largest = max(s.num_inputs)
    rounded = max(_gptq(largest, tokens), _DRIFT * tokens * largest) + _TARGET * s.largest
    working = s.layer + tokens * (s.live + s.inputs)
    return {"rounding": streams + max(4 * s.head, working, s.layer + tokens * 2 * s.inputs + rounded)}


_PHASES = {CalibrationNeed.INT8: _int8_phases, CalibrationNeed.BLOCKS: _int4_phases}


def _verification(s: _Sizes, config: ModelConfig, scheme: Scheme, dialects: Sequence[str]) -> float:
    """Each graph runs, then the reference runs beside the memory that the allocator keeps."""
    per_token = kv_bytes_per_token(
        num_layers=len(config.attention_blocks),
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype="float32",
    )
    # The KV cache: one slot with a window, and all slots with a prompt and its continuation.
    cache = (WINDOW + BATCH * (MAX_PROMPT + NUM_GREEDY)) * per_token
    assert scheme.calibration is not None
    own = config.untied() if scheme.calibration is CalibrationNeed.INT8 else config
    reference = 4 * s.weights + 4 * s.head + _COMPARED * CHUNK * s.vocab
    ort = weight_bytes(own, scheme.ort) if "ort" in map(kind_of, dialects) and scheme.ort is not None else 0
    trt = 0
    if "trt" in map(kind_of, dialects) and scheme.standard is not None:
        table = s.head * (_HALF_TABLE if config.tie_word_embeddings else _HEAD)
        trt = layer_bytes(config, scheme.standard) + table
    # After a graph is closed, the allocator keeps about its weights' size.
    return trt + max(_RUN[scheme.calibration] * ort + cache, ort + reference)


def check_memory(
    config: ModelConfig,
    scheme: Scheme,
    *,
    num_samples: int,
    length: int,
    is_ignored: bool = False,
    dialects: Sequence[str] = ("ort",),
) -> None:
    """Write the prediction to standard error; InvalidSetting if that much memory is not free."""
    found = phases(config, scheme, num_samples=num_samples, length=length, dialects=dialects)
    highest = max(found, key=lambda phase: phase.size)
    free = available_memory()
    words = f"needs about {format_bytes(highest.size)} of memory ({highest.name}), {format_bytes(free)} are free"
    if highest.size > free and not is_ignored:
        raise InvalidSetting(
            f"calibration {words}; free some, calibrate on another machine and take its result with "
            "--reuse-calibration, or try all the same with --ignore-memory"
        )
    sys.stderr.write(f"calibration {words}\n")
