"""`headrace doctor`: what is installed, which GPU there is, which backends work, and what the others want.

Each backend's demands are functions of an Environment, so that tests can ask about machines that are not here.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from runtime.artifact.plan_files import TARGETS
from runtime.backends.environment import CudaDevice, Environment
from runtime.errors import HeadraceError, InvalidSetting
from runtime.machine.sizes import format_bytes
from runtime.settings import DEVICES

# Linux drivers that CUDA's major releases need at least (CUDA release notes, table of minor version compatibility).
DRIVER_OF_CUDA = {12: (525, "525.60.13"), 13: (580, "580.65.06")}
ORT_CUDA = 13
"""The CUDA that onnxruntime-gpu 1.31 and tensorrt-rtx 1.7 are built for."""
ORT_RANGE = (1, 31)
JETSON_TENSORRT = {"5": "8.5", "6": "10.3"}
"""What JetPack ships; JetPack 7 takes the wheels for servers with Arm processors."""


class Problem(NamedTuple):
    """What keeps a backend from working, and what to type, or do, about it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Verdict:
    """Whether a backend works here; `note` says with what."""

    name: str
    problems: tuple[Problem, ...]
    note: str = ""

    @property
    def works(self) -> bool:
        return not self.problems


def examine(env: Environment) -> list[Verdict]:
    """A verdict for each backend, in the order `--device auto` tries them."""
    return [_tensorrt(env), _cuda(env), _cpu(env)]


def _tensorrt(env: Environment) -> Verdict:
    problems = [*_no_gpu(env)]
    if env.jetson is not None and env.jetson.jetpack == "5":
        problems.append(Problem("JetPack 5 ships TensorRT 8.5, 10.3 is the first that will do", "flash JetPack 6"))
    loaded, refusals = [], []
    for target in TARGETS:
        try:
            library = env.open_trt(target)
            loaded.append(f"{target} {library.version} ({library.dialect} graphs)")
        except HeadraceError as error:
            refusals.append(str(error))
    if not loaded:
        problems.append(Problem("; ".join(refusals), _tensorrt_fix(env)))
    problems += _no_cuda_python(env)
    if "tensorrt-rtx" in env.packages and len(loaded) == 1 and loaded[0].startswith("tensorrt-rtx"):
        problems += _driver_for(env, "tensorrt-rtx", ORT_CUDA)
    if not problems and isinstance(env.cuda_device, str):
        problems.append(Problem(env.cuda_device, "look at dmesg and nvidia-smi; the driver may need a restart"))
    return Verdict("tensorrt", tuple(problems), ", ".join(loaded))


def _cuda(env: Environment) -> Verdict:
    problems = [*_no_gpu(env)]
    version = env.packages.get("onnxruntime-gpu")
    install = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'onnxruntime-gpu[cuda,cudnn] ~= 1.31.0'"
    if env.jetson is not None and env.jetson.jetpack in ("5", "6"):
        problems.append(
            Problem(f"onnxruntime-gpu has no wheels for JetPack {env.jetson.jetpack}", "use --device tensorrt, or cpu")
        )
    elif version is None:
        problems.append(Problem("onnxruntime-gpu is not installed", install))
    elif _numbers(version)[:2] < ORT_RANGE:
        problems.append(Problem(f"onnxruntime-gpu {version} is too old, 1.31 is the first that will do", install))
    elif "onnxruntime" in env.packages:
        problems.append(
            Problem("onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files", install)
        )
    if version is not None:
        problems += _driver_for(env, "onnxruntime-gpu", ORT_CUDA)
    problems += _no_cuda_python(env)
    return Verdict("cuda", tuple(problems), f"onnxruntime-gpu {version}" if version else "")


def _cpu(env: Environment) -> Verdict:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        if name in env.packages:
            return Verdict("cpu", (), f"{name} {env.packages[name]}")
    return Verdict("cpu", (Problem("onnxruntime is not installed", "pip install 'onnxruntime ~= 1.32.0'"),))


def _no_gpu(env: Environment) -> Iterator[Problem]:
    if not env.has_nvidia_device:
        yield Problem("no NVIDIA driver is loaded", "install the driver, 580 or newer, if there is an NVIDIA GPU")


def _no_cuda_python(env: Environment) -> Iterator[Problem]:
    """cuda-python is missing, or is for a newer driver."""
    if "cuda-python" not in env.packages and "cuda-bindings" not in env.packages:
        yield Problem("cuda-python is not installed", f"pip install '{_cuda_python(env)}'")
    else:
        yield from _driver_for(env, "cuda-python", env.major_of("cuda-bindings") or env.major_of("cuda-python"))


def _driver_for(env: Environment, package: str, cuda_major: int | None) -> Iterator[Problem]:
    """A driver that is too old for the CUDA a package is built for. A Jetson's comes with its JetPack."""
    needed = DRIVER_OF_CUDA.get(cuda_major or 0)
    if env.driver is None or env.jetson is not None or needed is None:
        return
    if _numbers(env.driver)[0] < needed[0]:
        yield Problem(
            f"driver {env.driver} is too old: {package} is built for CUDA {cuda_major}, which needs {needed[1]}",
            f"install driver {needed[1]} or newer",
        )


def _tensorrt_fix(env: Environment) -> str:
    if env.jetson is not None and env.jetson.jetpack in JETSON_TENSORRT:
        return "apt install python3-libnvinfer, and a virtual environment made with --system-site-packages"
    if env.jetson is not None:
        return "pip install 'headrace[tensorrt]'"
    return "pip install 'headrace[rtx]'"


def _cuda_python(env: Environment) -> str:
    """The range of cuda-python that the driver, or the JetPack, can take."""
    if env.jetson is not None and env.jetson.jetpack == "6":
        return "cuda-python >= 12.6, < 13"
    is_old = env.driver is not None and _numbers(env.driver)[0] < DRIVER_OF_CUDA[13][0]
    return "cuda-python >= 12.9, < 13" if is_old else "cuda-python >= 12.9, < 14"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def report(env: Environment) -> dict[str, Any]:
    """All of it, as JSON has it."""
    device = env.cuda_device
    return {
        "machine": env.machine,
        "python": env.python,
        "jetson": None if env.jetson is None else env.jetson._asdict(),
        "driver": env.driver,
        "gpus": list(env.gpus),
        "cuda_device": device._asdict() if isinstance(device, CudaDevice) else None,
        "packages": dict(env.packages),
        "backends": [{"works": verdict.works, **_plain(verdict)} for verdict in examine(env)],
    }


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "problems": [problem._asdict() for problem in verdict.problems]}


def lines(env: Environment) -> Iterator[str]:
    """All of it, for people."""
    yield f"machine   {env.machine}, Python {env.python}"
    if env.jetson is not None:
        yield f"Jetson    {env.jetson.model}, L4T {env.jetson.l4t}, JetPack {env.jetson.jetpack}"
    device = env.cuda_device
    if isinstance(device, CudaDevice):
        yield f"GPU       {device.name}, {device.capability}, {format_bytes(device.free_bytes)} free"
    else:
        yield f"GPU       {', '.join(env.gpus) or 'none found'}"
    yield f"driver    {env.driver or 'none loaded'}"
    yield f"packages  {', '.join(f'{name} {version}' for name, version in env.packages.items()) or 'none'}"
    for verdict in examine(env):
        note = f": {verdict.note}" if verdict.note else ""
        yield f"{verdict.name:10}{'works' if verdict.works else 'does not work'}{note}"
        for problem in verdict.problems:
            yield f"          {problem.what}"
            yield f"          -> {problem.fix}"


def main(argv: list[str], env: Environment | None = None) -> int:
    """Print the report; 2 if the backend named by --require does not work."""
    parser = argparse.ArgumentParser(prog="headrace doctor", description="What can run models here, and what cannot.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--require", metavar="DEVICE", help=f"fail unless it works: {', '.join(DEVICES[1:])}")
    args = parser.parse_args(argv)
    if args.require is not None and args.require not in DEVICES[1:]:
        raise InvalidSetting(f"--require must be one of {', '.join(DEVICES[1:])}, got {args.require!r}")
    env = env or Environment()
    text = json.dumps(report(env), indent=2) if args.json else "\n".join(lines(env))
    sys.stdout.write(f"{text}\n")
    works = {verdict.name: verdict.works for verdict in examine(env)}
    return 0 if args.require is None or works[args.require] else 2
