"""The seam to TensorRT: `tensorrt` and `tensorrt_rtx` have one interface, and are imported here and nowhere else.

`tensorrt-rtx` compiles for several kinds of GPU on a machine without any; `tensorrt` builds on the GPU it is for.
Releases of `tensorrt` before 10.15 have no cache-update layer: they take the `trt-plain` dialect.
"""

import importlib
import logging
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from runtime.artifact.plan_files import TARGETS
from runtime.errors import InvalidSetting

log = logging.getLogger(__name__)


class _Package(NamedTuple):
    module: str
    extra: str
    oldest: tuple[int, int]


_PACKAGES = {
    "tensorrt-rtx": _Package("tensorrt_rtx", "rtx", (1, 7)),
    # Strongly typed networks with int4 blocks and a progress monitor; what JetPack 6 ships.
    "tensorrt": _Package("tensorrt", "tensorrt", (10, 3)),
}
assert tuple(_PACKAGES) == TARGETS

# Bits of the library's own verdict on a plan that do not depend on the GPU at hand.
_PLAN_DEFECTS = ("VERSION_MISMATCH", "MALFORMED_ENGINE")


@dataclass(frozen=True, slots=True)
class TrtLibrary:
    """One imported library. `module` is its Python package; version is as the package gives it."""

    target: str
    module: Any
    version: str

    @property
    def dialect(self) -> str:
        """The graph it compiles: one with attention and cache-update layers if it has those."""
        return "trt" if hasattr(self.module, "IKVCacheUpdateLayer") else "trt-plain"

    @property
    def compiles_ahead(self) -> bool:
        """Whether it builds for GPUs named by compute capability, present or not."""
        return hasattr(self.module, "ComputeCapability")

    @property
    def keeps_timings(self) -> bool:
        """Whether it measures kernels while building; TensorRT-RTX measures at run time, its cache does nothing."""
        return not self.compiles_ahead

    @property
    def known_gpus(self) -> tuple[str, ...]:
        """Compute capabilities it can be told to build for, like sm86; none where it builds for the GPU at hand."""
        names = self.module.ComputeCapability.__members__ if self.compiles_ahead else ()
        return tuple(name.lower() for name in names if name.startswith("SM"))

    def logger(self) -> "TrtLogger":
        """A logger for the library's objects, which must outlive them."""
        return _make_logger(self.module)

    def plan_defects(self, plan: bytes) -> list[str]:
        """What the library itself finds wrong with a plan, whatever the GPU; nothing where it has no such check.

        It looks for a GPU before it reads further than the header, so that without one only the header is judged.
        """
        if not hasattr(self.module.Runtime, "get_engine_validity"):
            return []
        logger = self.logger()
        _, diagnostics = self.module.Runtime(logger.inner).get_engine_validity(plan)
        known = self.module.EngineInvalidityDiagnostics
        return [name for name in _PLAN_DEFECTS if int(diagnostics) & int(getattr(known, name))]


class TrtLogger(NamedTuple):
    """The library's logger, and the first lines of the errors it was given."""

    inner: Any
    errors: list[str]


def open_library(target: str) -> TrtLibrary:
    """Import the library of a target.

    InvalidSetting if the target is unknown, the package is not installed (with its name), does not load or is too old.
    """
    if target not in _PACKAGES:
        raise InvalidSetting(f"target {target!r} is unknown; choose one of {', '.join(_PACKAGES)}")
    package = _PACKAGES[target]
    install = f"pip install 'headrace[{package.extra}]'"
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        raise InvalidSetting(f"{target} is not installed: {install}") from error
    except (ImportError, OSError, RuntimeError) as error:  # a shared library that is missing or does not fit
        first_line = str(error).partition("\n")[0]
        raise InvalidSetting(f"{package.module} is installed but does not load: {first_line}; {install}") from error
    version = str(module.__version__)
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < package.oldest:
        oldest = ".".join(map(str, package.oldest))
        raise InvalidSetting(f"{target} {version} is too old, {oldest} is the first that will do: {install}")
    return TrtLibrary(target, module, version)


def _make_logger(module: Any) -> TrtLogger:
    errors: list[str] = []
    severity = module.ILogger.Severity

    def record(_: Any, level: Any, message: str) -> None:
        line = message.strip().partition("\n")[0]
        if level in (severity.ERROR, severity.INTERNAL_ERROR):
            errors.append(line)
        log.debug("%s: %s", level, line)

    def construct(self: Any) -> None:
        module.ILogger.__init__(self)  # pybind11 demands this call by name

    kind = type("Logger", (module.ILogger,), {"__init__": construct, "log": record})
    return TrtLogger(kind(), errors)
