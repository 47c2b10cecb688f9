"""`headrace doctor` on machines that are described, not here: drivers, packages, Jetsons."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from runtime.backends.backend import Backend
from runtime.backends.cuda.cuda import Cuda
from runtime.backends.environment import Environment
from runtime.backends.ort.cpu import OrtCpu
from runtime.backends.ort.cuda import OrtCuda
from runtime.backends.tensorrt.backend import TensorRt
from runtime.backends.tensorrt.library import TrtLibrary
from runtime.commands.doctor import Verdict, examine, main
from runtime.errors import InvalidSetting
from tests.support.simulated.cuda import SimCuda
from tests.support.simulated.tensorrt import SimTensorRT

DRIVERS = {
    "new": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\nGCC\n",
    "old": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n",
}
EVERYTHING = {
    "onnxruntime-gpu": "1.31.1",
    "tensorrt-rtx": "1.7.1.116",
    "cuda-python": "13.4.4",
    "cuda-bindings": "13.4.4",
}
JETSONS = {
    "5": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 2023\n",
    "6": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n",
    "7": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, DATE: Fri Aug 22 2025\n",
}

Machine = Callable[..., "Described"]


class Described(NamedTuple):
    """A machine that is not here, and the backends as they would find it."""

    env: Environment
    backends: Sequence[Backend]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Makes a machine: a driver, a JetPack, packages; libraries load if they are among the packages."""

    def make(
        *, driver: str | None = None, jetpack: str | None = None, packages: dict[str, str], loads: bool = True
    ) -> Described:
        files = {}
        if driver is not None:
            files["proc/driver/nvidia/version"] = DRIVERS[driver]
            files["proc/driver/nvidia/gpus/0000:01:00.0/information"] = "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ: 1\n"
        if jetpack is not None:
            files["etc/nv_tegra_release"] = JETSONS[jetpack]
            files["proc/device-tree/model"] = "NVIDIA Jetson Orin Nano Developer Kit\0"
            files["dev/nvhost-gpu"] = ""
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        def open_trt(target: str) -> TrtLibrary:
            if target not in packages:
                raise InvalidSetting(f"{target} is not installed: pip install it")
            if not loads:
                raise InvalidSetting(f"{target} 1.2.3 is too old, 10.3 is the first that will do")
            return TrtLibrary(target, SimTensorRT(SimCuda()), packages[target])

        def open_cuda() -> Cuda:
            return Cuda(SimCuda(num_devices=1 if driver == "new" or jetpack else 0))

        env = Environment(tmp_path, packages, "x86_64", "3.11.7", open_cuda)
        return Described(env, (TensorRt(open_cuda, open_trt), OrtCuda(open_cuda), OrtCpu()))

    return make


def verdicts(here: Described) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in examine(*here)}


def told(verdict: Verdict) -> str:
    """What is wrong and what to do, as one text."""
    assert not verdict.works
    return " | ".join(f"{problem.what} -> {problem.fix}" for problem in verdict.problems)


def test_everything_for_a_gpu(machine: Machine) -> None:
    here = machine(driver="new", packages=EVERYTHING)
    found = verdicts(here)
    assert found["tensorrt"].works and found["cuda"].works
    assert "onnxruntime-gpu 1.31.1 is too old for the CPU, 1.32 is the first" in told(found["cpu"])
    assert here.env.driver == "580.95.05" and here.env.gpus == ("NVIDIA GeForce RTX 4090",)
    assert verdicts(here)["tensorrt"].note == "tensorrt-rtx 1.7.1.116 (trt graphs)"


def test_no_driver(machine: Machine) -> None:
    found = verdicts(machine(packages={"onnxruntime": "1.32.0"}))
    assert found["cpu"].works
    assert "no NVIDIA driver is loaded -> install the driver" in told(found["tensorrt"])
    assert "pip install 'headrace[rtx]'" in told(found["tensorrt"])
    assert "no NVIDIA driver is loaded" in told(found["cuda"]) and "pip install 'headrace[cuda]'" in told(found["cuda"])


def test_an_old_driver(machine: Machine) -> None:
    found = verdicts(machine(driver="old", packages=EVERYTHING))
    for name in ("tensorrt", "cuda"):
        assert "driver 535.183.01 is too old" in told(found[name])
        assert "CUDA 13, which needs 580.65.06 -> install driver 580.65.06" in told(found[name])


def test_an_old_driver_takes_an_older_cuda_python(machine: Machine) -> None:
    packages = {"tensorrt": "10.15.1", "onnxruntime": "1.32.0"}
    text = told(verdicts(machine(driver="old", packages=packages))["tensorrt"])
    assert text == "cuda-python is not installed -> pip install 'cuda-python >= 12.9, < 13'"


def test_cuda_python_is_missing(machine: Machine) -> None:
    packages = {name: version for name, version in EVERYTHING.items() if not name.startswith("cuda-")}
    found = verdicts(machine(driver="new", packages=packages))
    for name in ("tensorrt", "cuda"):
        assert told(found[name]) == "cuda-python is not installed -> pip install 'cuda-python >= 12.9, < 14'"


def test_a_tensorrt_that_will_not_do(machine: Machine) -> None:
    packages = {**EVERYTHING, "tensorrt-rtx": "1.2.3"}
    text = told(verdicts(machine(driver="new", packages=packages, loads=False))["tensorrt"])
    assert "tensorrt-rtx 1.2.3 is too old" in text and "tensorrt is not installed" in text
    assert "pip install 'headrace[rtx]'" in text


def test_both_onnx_runtimes(machine: Machine) -> None:
    text = told(verdicts(machine(driver="new", packages={**EVERYTHING, "onnxruntime": "1.32.0"}))["cuda"])
    assert "overwrite each other's files -> pip uninstall -y onnxruntime onnxruntime-gpu" in text


def test_an_onnxruntime_gpu_that_is_too_old(machine: Machine) -> None:
    text = told(verdicts(machine(driver="new", packages={**EVERYTHING, "onnxruntime-gpu": "1.22.0"}))["cuda"])
    assert "onnxruntime-gpu 1.22.0 is too old" in text


@pytest.mark.parametrize("jetpack", JETSONS)
def test_a_jetson_names_its_jetpack(machine: Machine, jetpack: str) -> None:
    here = machine(jetpack=jetpack, packages={"onnxruntime": "1.32.0"})
    assert here.env.jetson is not None and here.env.jetson.jetpack == jetpack
    assert here.env.jetson.model == "NVIDIA Jetson Orin Nano Developer Kit"
    text = told(verdicts(here)["tensorrt"])
    said = {
        "5": "JetPack 5 ships TensorRT 8.5, 10.3 is the first that will do -> flash JetPack 6",
        "6": "apt install python3-libnvinfer",
        "7": "pip install 'headrace[tensorrt]'",
    }
    assert said[jetpack] in text
    assert ("cuda-python >= 12.6, < 13" in text) == (jetpack == "6")


def test_a_jetson_that_works(machine: Machine) -> None:
    packages = {"onnxruntime": "1.32.0", "tensorrt": "10.3.0", "cuda-python": "12.6.2"}
    found = verdicts(machine(jetpack="6", packages=packages))
    assert found["tensorrt"].works and found["cpu"].works
    assert "no wheels for JetPack 6" in told(found["cuda"])


def test_a_gpu_that_cuda_does_not_see(machine: Machine) -> None:
    packages = {"tensorrt": "10.15.1", "cuda-python": "12.9.2", "onnxruntime": "1.32.0"}
    text = told(verdicts(machine(driver="old", packages=packages))["tensorrt"])
    assert "CUDA finds no device (cudaErrorNoDevice)" in text


def test_the_report_for_people_and_for_programs(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    here = machine(driver="new", packages={"onnxruntime": "1.32.0"})
    assert main([], *here) == 0
    text = capsys.readouterr().out
    assert "GPU       Simulated GPU, sm89" in text and "cpu       works: onnxruntime 1.32.0" in text
    assert "tensorrt  does not work" in text and "-> pip install 'headrace[rtx]'" in text
    assert main(["--json"], *here) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["driver"] == "580.95.05" and found["cuda_device"]["capability"] == "sm89"
    assert {backend["name"]: backend["works"] for backend in found["backends"]} == {
        "tensorrt": False,
        "cuda": False,
        "cpu": True,
    }
    assert [main(["--require", name], *here) for name in ("cpu", "tensorrt")] == [0, 2]
    with pytest.raises(InvalidSetting, match="--require must be one of tensorrt, cuda, cpu"):
        main(["--require", "gpu"], *here)


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """The real probes: nothing to load fails, whatever is installed here."""
    assert main(["--json", "--require", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["onnxruntime"]
