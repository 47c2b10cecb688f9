"""What keeps CUDA from working on a machine, for every backend that needs it: no GPU, driver or cuda-python."""

from collections.abc import Iterator

from runtime.backends.backend import Problem
from runtime.backends.environment import Environment, version_numbers

# Linux drivers that CUDA's major releases need at least (CUDA release notes, table of minor version compatibility).
_DRIVER_OF_CUDA = {12: (525, "525.60.13"), 13: (580, "580.65.06")}
CUDA_OF_WHEELS = 13
"""The CUDA that onnxruntime-gpu 1.31 and tensorrt-rtx 1.7 are built for."""


def no_gpu(env: Environment) -> Problem | None:
    """That there is no GPU with a driver; None if there is one."""
    if env.has_nvidia_device:
        return None
    return Problem("no NVIDIA driver is loaded", "install the driver, 580 or newer, if there is an NVIDIA GPU")


def python_problems(env: Environment) -> Iterator[Problem]:
    """cuda-python is missing, or is for a newer driver."""
    if "cuda-python" not in env.packages and "cuda-bindings" not in env.packages:
        yield Problem("cuda-python is not installed", f"pip install '{_cuda_python(env)}'")
    else:
        yield from driver_problems(env, "cuda-python", env.major_of("cuda-bindings") or env.major_of("cuda-python"))


def driver_problems(env: Environment, package: str, cuda_major: int | None) -> Iterator[Problem]:
    """A driver that is too old for the CUDA a package is built for. A Jetson's comes with its JetPack."""
    needed = _DRIVER_OF_CUDA.get(cuda_major or 0)
    if env.driver is None or env.jetson is not None or needed is None:
        return
    if version_numbers(env.driver)[0] < needed[0]:
        yield Problem(
            f"driver {env.driver} is too old: {package} is built for CUDA {cuda_major}, which needs {needed[1]}",
            f"install driver {needed[1]} or newer",
        )


def _cuda_python(env: Environment) -> str:
    """The range of cuda-python that the driver, or the JetPack, can take."""
    if env.jetson is not None and env.jetson.jetpack == "6":
        return "cuda-python >= 12.6, < 13"
    is_old = env.driver is not None and version_numbers(env.driver)[0] < _DRIVER_OF_CUDA[13][0]
    return "cuda-python >= 12.9, < 13" if is_old else "cuda-python >= 12.9, < 14"
