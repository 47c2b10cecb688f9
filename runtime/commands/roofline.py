"""The two halves of a roofline: the machine's peaks, measured, and the work of a decode step, counted.

Bandwidth is bytes over seconds of reading a buffer far larger than the caches, a part in each thread (numpy's
reductions release the interpreter lock). The arithmetic peak is a float32 matrix product of numpy's BLAS. Both run with
as many threads as the model, in a process of their own: a BLAS takes its number of threads at start, and the buffer
must not count as the model's memory. Knows nothing of sessions.
"""

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.artifact.manifest import Artifact
from runtime.backends.environment import InstalledPackages
from runtime.commands.inspect_artifact import num_parameters
from runtime.machine.cpu_features import cpu_flags, cpu_info

MIN_BUFFER_BYTES = 256 << 20
"""Read in about 10 ms on two cores: long enough to time."""
BUFFER_PER_CACHE = 8
"""Buffer over L3 cache: what is left in the cache from the pass before is then at most an eighth."""
GEMM_SIZE = 1536
"""40 ms on two cores: long enough to time."""
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
    """A machine's best with so many threads: bytes read and floating-point operations, both a second."""

    threads: int
    read: float
    gemm: float


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
    """The best of a few passes with `threads` threads, by default one a core; takes about a second."""
    threads = threads or num_cores()
    environment = {**os.environ, **dict.fromkeys(_BLAS_THREADS, str(threads))}
    command = [sys.executable, "-c", _CHILD, str(threads), *(path or str(Path.cwd()) for path in sys.path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
    return Peaks(threads, **json.loads(done.stdout))


def print_peaks(threads: int) -> None:
    """Measure here and write one JSON line: what `measure_peaks` runs in its child."""
    sys.stdout.write(json.dumps({"read": read_bandwidth(threads), "gemm": gemm_peak()}) + "\n")


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read together."""
    num_bytes = max(MIN_BUFFER_BYTES, BUFFER_PER_CACHE * _l3_bytes())
    parts = np.array_split(np.ones(num_bytes // 8, np.int64), threads)

    def read(part: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> int:
        return int(np.bitwise_or.reduce(part))

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
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


class StepCost(NamedTuple):
    """The least a decode step has to move and compute."""

    weight_bytes: int
    kv_bytes: int
    flop: int


def decode_cost(artifact: Artifact, *, batch: int, context: int) -> StepCost:
    """Bytes and operations of one step of `batch` rows with `context` cached tokens each.

    Every weight is read once, as stored, however many rows share it; of an untied embedding only the rows asked for,
    which is next to nothing and not counted. Every valid K and V is read once, also where a sliding window would spare
    some. Two operations a weight and row, and four a cached element of each query head (QK and PV products).
    Artifacts that do not say what a step reads count as reading the whole weight file.
    """
    manifest, dims = artifact.manifest, artifact.manifest.dims
    parameters = num_parameters(artifact)
    used = parameters if manifest.is_tied else parameters - dims.vocab_size * dims.hidden_size
    attention = 4 * dims.num_layers * dims.num_heads * dims.head_dim * context
    counted = manifest.step_weight_bytes
    return StepCost(
        weight_bytes=artifact.weight_bytes if counted is None else counted,
        kv_bytes=batch * context * artifact.kv_bytes_per_token,
        flop=batch * (2 * used + attention),
    )
