"""How much memory a calibrated export will take at its highest, from the model's dimensions alone.

Each phase is the sum of what its code holds at once; the highest phase is the prediction. The factors were counted on
the code with tracemalloc and held against what the operating system saw (benchmarks/calibration_memory.py). The number
of samples hardly matters: text is streamed, and searches look at some of it. Reads no weights.
"""

import sys
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from export.model.description import ModelConfig
from export.pipeline.estimates import layer_bytes, weight_bytes
from export.quantize.int4.rounding import MOST_BYTES, NUM_PIECES, PIECE
from export.quantize.int8.ranges import MAX_OUTPUTS
from export.quantize.int8.search import MAX_SIDE_BY_SIDE
from export.quantize.int8.sensitivity import FOLD as MEASURED_FOLD
from export.quantize.int8.sensitivity import LENGTH as MEASURED_LENGTH
from export.quantize.int8.sensitivity import NUM_SEQUENCES as NUM_MEASURED
from export.quantize.rounding.gptq import MAX_GPTQ_INPUTS
from export.quantize.rounding.int8 import OUTPUTS_AT_ONCE
from export.quantize.statistics.activation_stats import NUM_FOLDS
from export.quantize.statistics.collect import CHUNK_BYTES, token_bytes
from export.quantize.statistics.parallel import num_workers
from export.quantize.statistics.search_pass import MOST_BYTES as MOST_SEARCHED
from export.quantize.statistics.search_pass import NUM_SEQUENCES
from export.schemes.scheme import Calibration, Scheme
from export.verify.graph_run import BATCH, MAX_PROMPT, NUM_GREEDY, WINDOW
from runtime.errors import InvalidSetting
from runtime.machine.memory import available_memory
from runtime.machine.sizes import format_bytes, kv_bytes_per_token
from runtime.session.scoring import CHUNK

# The interpreter with its libraries and what the allocator keeps between phases; a worker's BLAS buffer and arena.
_PROCESS, _WORKER = 110e6, 55e6
# Of `token_bytes`, which errs on the safe side: what a pass through a layer was seen to hold.
_LIVE = 0.75

# Bytes for each weight, or each pair of input channels, of what is worked on.
_LOADED = 8  # float32, and again rotated, smoothed or as magnitudes
_JUDGED = 52  # ten candidates in float32 and the one being made, see range_search.py
_SMOOTHED = 8  # the weights times a vector, and what was made on the way
_NEAREST = 16  # smoothed, divided, rounded and widened again
_GRAMS = 8  # two Gram matrices
_INVERTED = 36  # one of them in float64, its factor, the factor's inverse, and the product
_SOLVED = 8  # what is left of them in float32
_SWEPT = 17  # an output's target, what is left of it, its errors and its integers
_SEEN = 14  # an input, rounded in two passes and weighted
_COMPARED = 24  # of a logit: both models', their logarithms, and what the divergence is summed from
# Of a graph's weights, while it runs: as int8 once more for the kernel; blocks are packed as well.
_RUN = {Calibration.INT8: 1.3, Calibration.BLOCKS: 2.5}
_HALF_TABLE = 6  # of a TensorRT graph, which runs as written: mapped in half precision, widened for the product
_HEAD = 9  # that, and an LM head of its own beside it: int8, and widened in its stead


class Phase(NamedTuple):
    """A part of the export, and the most bytes that the process holds in it."""

    name: str
    size: int


class _Sizes:
    """What the phases are made of: weights of each matrix, bytes of a layer and of the tokens that pass it."""

    def __init__(self, config: ModelConfig, workers: int) -> None:
        self.hidden, self.vocab, self.workers = config.hidden_size, config.vocab_size, workers
        # Of the largest block.
        blocks = ([linear for linear in block.linears if linear.is_quantizable] for block in config.blocks)
        linears = max(blocks, key=lambda linears: sum(prod(linear.shape) for linear in linears))
        self.matrices = [linear.shape for linear in linears]
        self.widest = max(map(prod, self.matrices))
        self.weights = sum(map(prod, self.matrices))
        self.layer = 4 * self.weights + _LOADED * self.widest
        self.head = config.vocab_size * self.hidden
        # Of each product, a token.
        self.inputs = int(4 * sum(linear.num_inputs * config.share_of_tokens(linear.site) for linear in linears))
        self.token = token_bytes(config)
        self.live = _LIVE * self.token

    def compensated(self, shape: tuple[int, int], tokens: int) -> float:
        """Rounding one matrix against its Gram matrices: filling them, inverting one, sweeping the columns."""
        n, k = shape
        if k > MAX_GPTQ_INPUTS:
            return _NEAREST * n * k
        swept = _SOLVED * k * k + _SWEPT * min(n, OUTPUTS_AT_ONCE) * k
        return _GRAMS * k * k + max(_SEEN * tokens * k, _INVERTED * k * k, swept)

    def side_by_side(self, sizes: Sequence[float]) -> float:
        """As many at once as there are workers."""
        return sum(sorted(sizes)[-self.workers :])


def phases(
    config: ModelConfig,
    scheme: Scheme,
    *,
    num_samples: int,
    length: int,
    workers: int | None = None,
    dialects: Sequence[str] = ("ort",),
) -> list[Phase]:
    """Peak of each phase of an export that calibrates on `num_samples` sequences of `length` tokens."""
    sizes = _Sizes(config, workers or num_workers())
    assert scheme.calibration is not None
    found = _PHASES[scheme.calibration]
    overhead = _PROCESS + _WORKER * (sizes.workers if scheme.calibration is Calibration.INT8 else 0)
    verification = _verification(sizes, config, scheme, dialects)
    sizes_of = {**found(sizes, config, num_samples, length), "verification": verification}
    return [Phase(name, int(size + overhead)) for name, size in sizes_of.items()]


def _int8_phases(s: _Sizes, config: ModelConfig, num_samples: int, length: int) -> dict[str, float]:
    chunk = max(length, CHUNK_BYTES // s.token)
    passing = min(num_samples * length, s.workers * chunk) * s.live + 4 * min(num_samples * length, chunk) * s.hidden
    judged = [_JUDGED * min(n, MAX_OUTPUTS) * k for n, k in s.matrices]
    judged_head = _LOADED * s.head + _JUDGED * min(s.vocab, MAX_OUTPUTS) * s.hidden
    statistics = max(_LOADED * s.head, s.layer + max(passing, s.side_by_side(judged), judged_head))

    of_fold = len(range(MEASURED_FOLD, num_samples, NUM_FOLDS)) or num_samples
    measured = min(of_fold, NUM_MEASURED) * min(length, MEASURED_LENGTH)
    streams = 4 * measured * s.hidden * (1 + len(s.matrices) * config.num_layers)
    logits = 4 * measured * s.vocab
    changed = s.side_by_side([_SMOOTHED * prod(shape) + measured * s.live for shape in s.matrices])
    heads = 4 * s.head + max((1 + 4 * s.workers) * logits, _SMOOTHED * s.head + logits)
    costs = streams + max(s.layer + changed, heads)

    tokens = min(num_samples, NUM_SEQUENCES) * length
    tokens = min(tokens, max(1, MOST_SEARCHED // s.token))
    kept = tokens * (s.inputs + 8 * s.hidden)
    each = [s.compensated(shape, tokens) for shape in s.matrices]
    is_narrow = max(k for _, k in s.matrices) <= MAX_SIDE_BY_SIDE
    rounded = s.side_by_side(each) if is_narrow else max(each)
    head = max(_LOADED * s.head, 5 * s.head + s.compensated((s.vocab, s.hidden), tokens))
    rounding = kept + 4 * s.weights + max(s.layer + min(tokens, s.workers * chunk) * s.live, rounded, head)
    return {"statistics": statistics, "sensitivity": costs, "rounding": rounding}


def _int4_phases(s: _Sizes, config: ModelConfig, num_samples: int, length: int) -> dict[str, float]:
    tokens = min(NUM_PIECES * PIECE, num_samples * length, max(PIECE, MOST_BYTES // s.token))
    streams = 8 * tokens * s.hidden
    rounded = max(s.compensated(shape, tokens) for shape in s.matrices)
    working = s.layer + tokens * (s.live + s.inputs)
    return {"rounding": streams + max(4 * s.head, working, s.layer + tokens * 2 * s.inputs + rounded)}


_PHASES = {Calibration.INT8: _int8_phases, Calibration.BLOCKS: _int4_phases}


def _verification(s: _Sizes, config: ModelConfig, scheme: Scheme, dialects: Sequence[str]) -> float:
    """Each graph runs, then the reference computes beside what they leave."""
    per_token = kv_bytes_per_token(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype="float32"
    )
    # What is written: one slot's window, and a prompt with its continuation in each.
    cache = (WINDOW + BATCH * (MAX_PROMPT + NUM_GREEDY)) * per_token
    assert scheme.calibration is not None
    own = config.untied() if scheme.calibration is Calibration.INT8 else config
    reference = 4 * s.weights + 4 * s.head + _COMPARED * CHUNK * s.vocab
    ort = weight_bytes(own, scheme.ort) if "ort" in dialects and scheme.ort is not None else 0
    trt = 0
    if set(dialects) - {"ort"} and scheme.standard is not None:
        table = s.head * (_HALF_TABLE if config.tie_word_embeddings else _HEAD)
        trt = layer_bytes(config, scheme.standard) + table
    # Closed, a graph leaves about its weights' size with the allocator.
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
    """Say on standard error what the export will take; InvalidSetting, with the numbers, if that is not free."""
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
