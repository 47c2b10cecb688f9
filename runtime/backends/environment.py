"""What this machine has: GPU, driver, JetPack, packages. Works without a GPU and without any of the packages.

`root` is where /proc, /etc and /dev are found, `packages` what is installed and `open_cuda` loads CUDA; all can be
handed in, so that a test can describe another machine.
"""

import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtime.errors import HeadraceError

if TYPE_CHECKING:
    from runtime.backends.cuda.cuda import Cuda

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


class InstalledPackages(Mapping[str, str]):
    """Versions of installed packages by name, looked up when they are asked for."""

    def __getitem__(self, name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return (str(package.name) for package in importlib.metadata.distributions())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers in a version: 1.31.1 -> (1, 31, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def load_cuda() -> "Cuda":
    """CUDA on the first visible device. DeviceUnavailable says what is missing."""
    from runtime.backends.cuda.cuda import open_cuda

    return open_cuda()


@dataclass(frozen=True)
class Environment:
    """A machine, as its files describe it."""

    root: Path = Path("/")
    packages: Mapping[str, str] = field(default_factory=InstalledPackages)
    machine: str = field(default_factory=platform.machine)
    python: str = field(default_factory=platform.python_version)
    open_cuda: "Callable[[], Cuda]" = load_cuda

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
        return None if version is None else version_numbers(version)[0]

    def _read(self, name: str) -> str:
        try:
            return (self.root / name).read_text(errors="replace")
        except OSError:
            return ""
