"""What this machine has: GPU, driver, JetPack, packages. Works without a GPU and without any of the packages.

Everything it asks can be handed in: `root` is where /proc, /etc and /dev are found, `packages` what is installed,
`open_cuda` and `open_trt` load what is installed. So a test can describe another machine.
"""

import importlib.metadata
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtime.backends.tensorrt.library import TrtLibrary, open_library
from runtime.errors import HeadraceError

if TYPE_CHECKING:
    from runtime.backends.cuda.cuda import Cuda

# Distributions that a backend can come from, under every name they are published as.
PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "cuda-bindings",
)

# The first line of /etc/nv_tegra_release names the L4T release, and L4T the JetPack; NVIDIA's own table.
_JETPACK_OF_L4T = {35: "5", 36: "6", 38: "7"}


class Jetson(NamedTuple):
    """A Jetson's board and software."""

    model: str
    l4t: str
    jetpack: str
    """Major version, or "unknown"."""


class CudaDevice(NamedTuple):
    """The first visible GPU."""

    name: str
    capability: str
    free_bytes: int


def _load_cuda() -> "Cuda":
    from runtime.backends.cuda.cuda import load_cuda

    return load_cuda()


def installed_packages() -> dict[str, str]:
    """Versions of those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Environment:
    """A machine, as its files describe it."""

    root: Path = Path("/")
    packages: Mapping[str, str] = field(default_factory=installed_packages)
    machine: str = field(default_factory=platform.machine)
    python: str = field(default_factory=platform.python_version)
    open_cuda: "Callable[[], Cuda]" = _load_cuda
    open_trt: Callable[[str], TrtLibrary] = open_library

    @cached_property
    def has_nvidia_device(self) -> bool:
        """Whether there is a GPU that a driver has been loaded for, or a Jetson's."""
        devices = ("dev/nvidiactl", "dev/nvhost-gpu", "dev/nvgpu", "dev/dxg")  # the last is a GPU under WSL
        return self.driver is not None or any((self.root / device).exists() for device in devices)

    @cached_property
    def driver(self) -> str | None:
        """Version of NVIDIA's kernel driver, like 570.86.15."""
        text = self._read("proc/driver/nvidia/version")
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
        return match[1] if match else None

    @cached_property
    def gpus(self) -> tuple[str, ...]:
        """Names of the GPUs that the kernel driver lists."""
        files = sorted((self.root / "proc/driver/nvidia/gpus").glob("*/information"))
        names = (re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.M) for file in files)
        return tuple(match[1].strip() for match in names if match)

    @cached_property
    def jetson(self) -> Jetson | None:
        """What board this is, if it is one."""
        release = self._read("etc/nv_tegra_release")
        match = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", release)
        if match is None:
            return None
        model = self._read("proc/device-tree/model").rstrip("\0\n") or "unknown board"
        jetpack = _JETPACK_OF_L4T.get(int(match[1]), "unknown")
        return Jetson(model, f"{match[1]}.{match[2]}", jetpack)

    @cached_property
    def cuda_device(self) -> "CudaDevice | str":
        """The GPU as CUDA sees it, or why it sees none."""
        try:
            cuda = self.open_cuda()
        except HeadraceError as error:
            return str(error)
        try:
            return CudaDevice(cuda.device_name(), cuda.capability(), cuda.free_memory())
        finally:
            cuda.close()

    def major_of(self, package: str) -> int | None:
        """First number of a package's version; None if it is not installed."""
        version = self.packages.get(package)
        return None if version is None else int(version.partition(".")[0])

    def _read(self, name: str) -> str:
        try:
            return (self.root / name).read_text(errors="replace")
        except OSError:
            return ""
