"""What a machine could do, measured, and what a decode step must do, counted: the two halves of a roofline.

Bandwidth is bytes over seconds of reading a buffer far larger than the caches, with as many threads as the model
uses (numpy's reductions release the interpreter lock). The arithmetic peak is a float32 matrix product of numpy's
BLAS, which takes every core: with fewer threads the model's share of it reads low. Knows nothing of sessions.
"""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.artifact import WEIGHTS, Artifact
from runtime.inspect_artifact import bytes_per_token, num_parameters

BUFFER_BYTES = 256 << 20
GEMM_SIZE = 1536
REPEATS = 5
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


class Machine(NamedTuple):
    """Where a benchmark ran."""

    cpu: str
    cores: int
    instruction_sets: str
    read_gb_s: float
    gemm_gflop_s: float


def describe_machine(threads: int | None = None) -> Machine:
    """Name the processor and measure its two peaks, reading with so many threads; takes about two seconds."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((named.get("flags") or named.get("Features") or "").split())
    return Machine(
        cpu=named.get("model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        instruction_sets=" ".join(name for name in _INSTRUCTION_SETS if name in flags),
        read_gb_s=read_bandwidth(threads) / 1e9,
        gemm_gflop_s=gemm_peak() / 1e9,
    )


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes a second that so many threads (None: one a core) read together, the best of a few passes."""
    num_threads = threads or len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(BUFFER_BYTES // 8, np.int64), num_threads)

    def read(part: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> int:
        return int(np.bitwise_or.reduce(part))

    best = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(REPEATS):
            started_s = time.perf_counter()
            list(pool.map(read, parts))
            best = min(best, time.perf_counter() - started_s)
    return BUFFER_BYTES / best


def gemm_peak() -> float:
    """Floating-point operations a second of a large float32 product, the best of a few."""
    a = np.ones((GEMM_SIZE, GEMM_SIZE), np.float32)
    best = float("inf")
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started_s)
    return 2 * GEMM_SIZE**3 / best


class StepCost(NamedTuple):
    """The least a decode step has to move and compute."""

    weight_bytes: int
    kv_bytes: int
    flop: int


def decode_cost(artifact: Artifact, *, batch: int, context: int) -> StepCost:
    """Bytes and operations of one step of `batch` rows with `context` cached tokens each.

    Every weight is read once, however many rows share it; of an untied embedding only the rows asked for, which is
    next to nothing. Every valid K and V is read once. Two operations a weight and row, and four a cached element.
    """
    dims = artifact.manifest.dims
    parameters = num_parameters(artifact)
    used = parameters if artifact.manifest.is_tied else parameters - dims.vocab_size * dims.hidden_size
    weight_bytes = artifact.manifest.files[WEIGHTS].size * used // parameters
    attention = 4 * dims.num_layers * dims.num_heads * dims.head_dim * context
    return StepCost(
        weight_bytes=weight_bytes,
        kv_bytes=batch * context * bytes_per_token(artifact),
        flop=batch * (2 * used + attention),
    )
