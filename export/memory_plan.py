"""How much memory a calibrated export will take at its highest, from the model's dimensions alone.

Each phase is the sum of what its code holds at once; the highest phase is the prediction. The factors were counted on
the code with tracemalloc and held against the peaks that the operating system saw (benchmarks/calibration_memory.py).
Neither the number of samples nor that of layers matters beyond the float copies named here: text is streamed.

Knows nothing about files; reads no weights.
"""

import sys
from math import prod
from typing import NamedTuple

from export.calibrate import CHUNK_BYTES, token_bytes
from export.config import ModelConfig
from export.int8_rounding import OUTPUTS_AT_ONCE
from export.int8_search import MAX_COMPENSATED
from export.range_search import MAX_OUTPUTS
from export.search_pass import NUM_SEQUENCES
from export.sensitivity import LENGTH, NUM_SEQUENCES as NUM_MEASURED
from export.verify import BATCH, WINDOW
from runtime.errors import InvalidSetting
from runtime.kv_budget import available_memory, format_bytes, kv_bytes_per_token

# The interpreter with its libraries, OpenBLAS's buffers, and what the allocator keeps between phases.
_PROCESS = 170e6
# Of `token_bytes`, which calibrate.py keeps on the safe side: what a pass through a layer really held.
_LIVE_SHARE = 0.75

# Bytes for each weight of a layer, or each pair of channels, while it is worked on.
_STACKED = 6.0  # float32, and half of it again while projections are stacked
_JUDGED = 52.0  # ten candidates in float32 and the one being rounded, see range_search.py
_NEAREST = 12.0  # rounded to nearest, and widened again
_GRAM = 48.0  # two Gram matrices in float32, five in float64 while one is inverted
_SWEPT = 14.0  # an output's target, its errors and its integers, beside the factor
_FACTOR = 32.0
_RUN = 3.0  # int8 weights mapped from the file, as unsigned integers, and packed for the kernel


class Phase(NamedTuple):
    """A part of the export, and the most bytes that the process holds in it."""

    name: str
    size: int


def phases(config: ModelConfig, *, num_samples: int, length: int) -> list[Phase]:
    """Peak of each phase of a w8a8 export that calibrates on `num_samples` sequences of `length` tokens."""
    hidden, vocab = config.hidden_size, config.vocab_size
    attention = config.num_heads * config.head_dim
    matrices = {
        "qkv": (attention + 2 * config.num_kv_heads * config.head_dim, hidden),
        "o": (hidden, attention),
        "gate_up": (2 * config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
    }
    head = vocab * hidden
    layer = sum(map(prod, matrices.values()))
    stacked = (_STACKED - 4) * max(map(prod, matrices.values()))
    live = _LIVE_SHARE * token_bytes(config)

    at_once = min(num_samples * length, max(length, CHUNK_BYTES // token_bytes(config)))
    statistics = max(4 * head + 4 * at_once * hidden, 4 * layer + stacked + at_once * live)

    searched = min(num_samples, NUM_SEQUENCES) * length
    searched = min(searched, max(1, 2 * CHUNK_BYTES // token_bytes(config)))
    inputs = 4 * searched * (3 * hidden + attention + config.intermediate_size)
    running = 4 * layer + stacked + searched * live
    judged = max(_JUDGED * min(n, MAX_OUTPUTS) * k for n, k in matrices.values())
    judged_head = 8 * head + _JUDGED * min(vocab, MAX_OUTPUTS) * hidden
    search = max(running, 4 * layer + inputs + judged, judged_head)

    measured = min(num_samples, NUM_MEASURED) * min(length, LENGTH)
    streams = 4 * measured * hidden * (1 + len(matrices) * config.num_layers)
    logits = 4 * measured * vocab
    layers = 4 * layer + stacked + measured * live + _NEAREST * max(map(prod, matrices.values()))
    costs = streams + max(layers, 4 * head + 6 * logits, (4 + _NEAREST) * head + logits)

    rounded = max(_compensated(n, k, searched) for n, k in matrices.values())
    rounded_head = max(8 * head + inputs, 5 * head + _compensated(vocab, hidden, searched))
    rounding = max(2 * 4 * layer + running, 2 * 4 * layer + inputs + rounded, rounded_head)

    cache = BATCH * WINDOW * kv_bytes_per_token(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype="float32"
    )
    weights = layer * config.num_layers + 2 * head
    found = {
        "statistics": statistics,
        "search": search,
        "sensitivity": costs,
        "rounding": rounding,
        "verification": max(_RUN * weights + cache, 4 * layer + stacked + 4 * head),
    }
    return [Phase(name, int(size + _PROCESS)) for name, size in found.items()]


def _compensated(n: int, k: int, num_tokens: int) -> float:
    """Rounding a layer of k inputs against its Gram matrices: filling them, inverting one, sweeping the columns."""
    if k > MAX_COMPENSATED:
        return _NEAREST * n * k
    return max(8 * k * k + 10 * num_tokens * k, _GRAM * k * k, _FACTOR * k * k + _SWEPT * min(n, OUTPUTS_AT_ONCE) * k)


def check_memory(config: ModelConfig, *, num_samples: int, length: int, is_ignored: bool = False) -> None:
    """Say on standard error what the export will take; InvalidSetting, with the numbers, if that is not free."""
    highest = max(phases(config, num_samples=num_samples, length=length), key=lambda phase: phase.size)
    free = available_memory()
    words = f"needs about {format_bytes(highest.size)} of memory ({highest.name}), {format_bytes(free)} are free"
    if highest.size > free and not is_ignored:
        raise InvalidSetting(
            f"calibration {words}; free some, take another machine and use its result with --calibration, "
            "or try it all the same with --ignore-memory"
        )
    sys.stderr.write(f"calibration {words}\n")
