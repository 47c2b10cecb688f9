"""The two halves of a roofline: the machine's peaks, measured, and the work of a prompt or decode step, counted.

Bandwidth is bytes over seconds of reading a buffer far larger than the caches, a part in each thread (numpy's
reductions release the interpreter lock). The float32 peak is a matrix product of numpy's BLAS. The int8 peak is the
library of native operators multiplying bytes in registers, with the instructions that its kernels use; unknown where
that library is not built. All run with as many threads as the model, in a process of their own: a BLAS takes its number
of threads at start, and the buffer must not count as the model's memory. Other programs, and neighbours on a shared
machine, only ever make a peak look lower: so the best of many passes counts. Knows nothing of sessions.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.artifact.manifest import Artifact
from runtime.backends.environment import InstalledPackages
from runtime.commands.inspect_artifact import num_parameters
from runtime.machine.cpu_features import cpu_flags, cpu_info
from runtime.native.library import is_built, load_library

MIN_BUFFER_BYTES = 512 << 20
"""Read in about 20 ms on two cores: long enough to time."""
BUFFER_PER_CACHE = 16
"""Buffer over L3 cache: what is left in the cache from the pass before is then at most a sixteenth."""
READ_REPEATS = 16
"""Passes over the buffer. On a virtual machine with neighbours they differ by a factor of two."""
GEMM_SIZE = 1536
"""40 ms on two cores: long enough to time."""
BYTE_ROUNDS = 1 << 20
"""Rounds of the int8 loop: 5 ms with AVX-512."""
REPEATS = 4

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
_PACKAGES = ("headrace", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy")
# The child finds this package wherever the parent did.
_CHILD = (
    "import sys; sys.path[:0] = sys.argv[2:]; import runtime.commands.roofline as r; r.print_peaks(int(sys.argv[1]))"
)


class Machine(NamedTuple):
    """Where a benchmark ran, and on what."""

    cpu: str
    cores: int
    instruction_sets: str
    versions: dict[str, str]


class Peaks(NamedTuple):
    """A machine's best with so many threads: bytes read, float32 and int8 operations, all a second."""

    threads: int
    read: float
    gemm: float
    int8: float | None
    """None: the library of native operators is not built."""

    @classmethod
    def best(cls, of: "Sequence[Peaks]") -> "Peaks":
        """The machine's, out of several measurements."""
        known = [one.int8 for one in of if one.int8 is not None]
        return cls(of[0].threads, max(one.read for one in of), max(one.gemm for one in of), max(known, default=None))


def describe_machine() -> Machine:
    """Name the processor, the instruction sets that matter here, and what is installed. Measures nothing."""
    flags, packages = cpu_flags(), InstalledPackages()
    return Machine(
        cpu=cpu_info().get("model name") or platform.machine(),
        cores=num_cores(),
        instruction_sets=" ".join(name for name in _INSTRUCTION_SETS if name in flags),
        versions={
            "python": platform.python_version(),
            **{name: packages[name] for name in _PACKAGES if name in packages},
        },
    )


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def measure_peaks(threads: int | None = None) -> Peaks:
    """The best of several passes with `threads` threads, by default one a core; takes about a second."""
    threads = threads or num_cores()
    environment = {**os.environ, **dict.fromkeys(_BLAS_THREADS, str(threads))}
    command = [sys.executable, "-c", _CHILD, str(threads), *(path or str(Path.cwd()) for path in sys.path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
    return Peaks(threads, **json.loads(done.stdout))


def print_peaks(threads: int) -> None:
    """Measure here and write one JSON line: what `measure_peaks` runs in its child."""
    peaks = {"read": read_bandwidth(threads), "gemm": gemm_peak(), "int8": int8_peak(threads)}
    sys.stdout.write(json.dumps(peaks) + "\n")


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read together."""
    num_bytes = max(MIN_BUFFER_BYTES, BUFFER_PER_CACHE * _l3_bytes())
    parts = np.array_split(np.ones(num_bytes // 8, np.int64), threads)

    def read(part: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> int:
        return int(np.bitwise_or.reduce(part))

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READ_REPEATS):
            started_s = time.perf_counter()
            list(pool.map(read, parts))
            best = min(best, time.perf_counter() - started_s)
    return num_bytes / best


def _l3_bytes() -> int:
    """Size of the first core's L3 cache, which Linux writes as 32768K; 0 where it does not say."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(file.read_text(encoding="ascii").strip().removesuffix("K")) * 1024 if file.exists() else 0


def gemm_peak() -> float:
    """Floating-point operations a second of a large float32 product, on the threads this process's BLAS has."""
    a = np.ones((GEMM_SIZE, GEMM_SIZE), np.float32)
    best = float("inf")
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started_s)
    return 2 * GEMM_SIZE**3 / best


def int8_peak(threads: int) -> float | None:
    """Operations a second of bytes multiplied and added, on `threads` threads; None without the native library."""
    if not is_built():
        return None
    multiply = load_library().headrace_multiply_bytes
    multiply.restype, multiply.argtypes = ctypes.c_int64, (ctypes.c_size_t, ctypes.POINTER(ctypes.c_int32))

    def run(_: int) -> int:
        return int(multiply(BYTE_ROUNDS, ctypes.byref(ctypes.c_int32())))

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            started_s = time.perf_counter()
            num_operations = sum(pool.map(run, range(threads)))
            best = max(best, num_operations / (time.perf_counter() - started_s))
    return best


class StepCost(NamedTuple):
    """The least that a prompt or a decode step has to move and compute."""

    weight_bytes: int
    kv_bytes: int
    flop: int

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


def prefill_cost(artifact: Artifact, length: int, dialect: str = "ort") -> StepCost:
    """Bytes and operations of a prompt of `length` tokens in one run, up to its last token's logits.

    Every weight is read once, K and V are written once; that attention reads them again from a cache counts nothing.
    Every token takes part in every product but the LM head's, which is for the last one. A token attends to itself
    and to those before it.
    """
    dims = artifact.manifest.dims
    head = dims.vocab_size * dims.hidden_size
    layers = _num_used(artifact) - head
    attention = 4 * len(dims.kv_layers) * dims.num_heads * dims.head_dim * (length * (length + 1) // 2)
    return StepCost(
        weight_bytes=_step_weight_bytes(artifact),
        kv_bytes=length * artifact.kv_bytes_per_token(dialect),
        flop=2 * (layers * length + head) + attention,
    )


def _num_used(artifact: Artifact) -> int:
    """Weights that a token is multiplied with, the LM head among them."""
    manifest = artifact.manifest
    if manifest.num_active is not None:
        return manifest.num_active
    parameters = num_parameters(artifact)
    return parameters if manifest.is_tied else parameters - manifest.dims.vocab_size * manifest.dims.hidden_size


def _step_weight_bytes(artifact: Artifact) -> int:
    """Artifacts that do not say what a step reads count as reading the whole weight file."""
    counted = artifact.manifest.step_weight_bytes
    return artifact.weight_bytes if counted is None else counted


def decode_cost(artifact: Artifact, *, batch: int, context: int, dialect: str = "ort") -> StepCost:
    """Bytes and operations of one step of `batch` rows with `context` cached tokens each.

    Every weight is read once, as stored, however many rows share it; of an untied embedding only the rows asked for,
    which is next to nothing and not counted. Every valid K and V is read once, also where a sliding window would spare
    some. Two operations a weight and row, and four a cached element of each query head (QK and PV products).
    Artifacts that do not say what a step reads count as reading the whole weight file.
    """
    dims, used = artifact.manifest.dims, _num_used(artifact)
    attention = 4 * len(dims.kv_layers) * dims.num_heads * dims.head_dim * context
    return StepCost(
        weight_bytes=_step_weight_bytes(artifact),
        kv_bytes=batch * context * artifact.kv_bytes_per_token(dialect),
        flop=batch * (2 * used + attention),
    )
