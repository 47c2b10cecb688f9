"""Loads an artifact's graph into ONNX Runtime, on the CPU or on a device's execution provider.

The library is imported here, so that a command without it ends with the extra to install.
"""

import os
from typing import Any, NamedTuple

from runtime.artifact.manifest import Artifact, kind_of
from runtime.backends.environment import version_numbers
from runtime.backends.ort.drop_inputs import without_inputs
from runtime.errors import DeviceUnavailable, InvalidArtifact
from runtime.machine.cpu_features import int8_options
from runtime.machine.cpu_limits import is_limited, model_threads
from runtime.native.library import operators_for

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"

WHOLE_ROWS = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Environment variable that ONNX Runtime reads when it makes attention kernels; it has no other switch for them.

Its tiled kernel is neither batch- nor chunk-invariant. With more threads than rows times heads it splits one row's
cache among threads, and adds the parts in another order than in a larger batch (1e-5 of a logit). And it rounds a row's
single token otherwise beside longer rows. The kernel that this variable selects does neither. One token in 32 rows took
it 0.7 to 0.9 of the time, a chunk of 128 the same, for up to 1,000 tokens. Its scores take rows * heads * chunk *
capacity floats."""

_NUM_ATTENTION_INPUTS = 9
"""query, key, value, past key, past value, lengths, capacity, cos, sin; older releases have no further input."""


CPU_FLOOR = (1, 32)
"""The first release whose attention takes a length for each row on the CPU; the graphs have that input."""


def load_library(floor: tuple[int, int] | None = None) -> Any:
    """The onnxruntime module. DeviceUnavailable, with the extra to install, if there is none, or one before `floor`.

    floor: CPU_FLOOR to run on the CPU, None on a GPU
    """
    try:
        import onnxruntime
    except ImportError as error:
        first_line = str(error).partition("\n")[0]
        raise DeviceUnavailable(
            f"ONNX Runtime cannot be imported ({first_line}): pip install 'headrace[{'cpu' if floor else 'cuda'}]'"
        ) from error
    if floor is not None and version_numbers(onnxruntime.__version__)[:2] < floor:
        raise DeviceUnavailable(
            f"onnxruntime {onnxruntime.__version__} is too old to run these graphs on the CPU, "
            f"{floor[0]}.{floor[1]} is the first that does: pip install 'headrace[cpu]' in an environment without "
            "onnxruntime-gpu"
        )
    return onnxruntime


class CpuThreads(NamedTuple):
    """Threads of a session on the CPU: the number asked of ONNX Runtime (0: its own choice, one a physical core, which
    it binds to cores), how many that likely are, and the most they can be."""

    asked: int
    likely: int
    most: int


def cpu_threads(threads: int | None) -> CpuThreads:
    """The number that --threads gives, or as many as this process may use."""
    if threads is not None or is_limited():
        count = threads or model_threads()
        return CpuThreads(count, count, count)
    return CpuThreads(0, model_threads(), os.cpu_count() or 1)


def load_cpu_graph(
    artifact: Artifact, dialect: str, *, threads: int | None, saves_memory: bool, keeps_rows_whole: bool
) -> Any:
    """An InferenceSession on the CPU. InvalidArtifact if ONNX Runtime refuses the graph.

    The arguments are those of `OrtSession.open`; keeps_rows_whole: use the attention kernel that WHOLE_ROWS selects
    """
    library = load_library(CPU_FLOOR)
    options = _options(library)
    options.intra_op_num_threads = cpu_threads(threads).asked
    if saves_memory:
        # Level "all" widens half-precision weights while loading, and so does constant folding. Widened one at a
        # time, just before its use, each is freed after it, where the default order widens all of them first.
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.execution_order = library.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if kind_of(dialect) != "ort":
        # As written, without int8 kernels and fusions: it is TensorRT that will choose those.
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if dialect == "native":
        options.register_custom_ops_library(str(operators_for(cpu_threads(threads).most)))
    if keeps_rows_whole:
        os.environ[WHOLE_ROWS] = "1"
    try:
        disabled = ["ConstantFolding"] if saves_memory else None
        return _load(library, artifact, str(artifact.model_file(dialect)), options, CPU_PROVIDER, disabled)
    finally:
        os.environ.pop(WHOLE_ROWS, None)


def load_device_graph(artifact: Artifact, provider: str) -> Any:
    """An InferenceSession of the `ort` graph on one execution provider, without attention's last input.

    DeviceUnavailable if this ONNX Runtime lacks the provider or it does not start, InvalidArtifact if the graph is
    refused.
    """
    library = load_library()
    if provider not in library.get_available_providers():
        raise DeviceUnavailable(
            f"onnxruntime {library.__version__} has no {provider}: install 'headrace[cuda]' without 'headrace[cpu]'; "
            "`headrace doctor` says how"
        )
    options = _options(library)  # its int8 options are for what the provider leaves to the CPU
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(artifact.path))
    model = without_inputs(artifact.model_file("ort").read_bytes(), "GroupQueryAttention", _NUM_ATTENTION_INPUTS)
    graph = _load(library, artifact, model, options, provider)
    if provider not in graph.get_providers():
        raise DeviceUnavailable(f"ONNX Runtime's {provider} does not start here; `headrace doctor` says why")
    return graph


def _options(library: Any) -> Any:
    """SessionOptions for this processor."""
    options = library.SessionOptions()
    options.log_severity_level = 3
    for name, value in int8_options().items():
        options.add_session_config_entry(name, value)
    return options


def _load(
    library: Any, artifact: Artifact, model: str | bytes, options: Any, provider: str, disabled: list[str] | None = None
) -> Any:
    try:
        return library.InferenceSession(model, options, providers=[provider], disabled_optimizers=disabled)
    except Exception as error:  # the library's exceptions share no base but Exception
        first_line = str(error).partition("\n")[0]
        raise InvalidArtifact(
            f"ONNX Runtime {library.__version__} cannot load {artifact.path} with {provider}: {first_line}"
        ) from error
