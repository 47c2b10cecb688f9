"""Chooses the GPUs to build for: named ones where the library compiles ahead, else the one in this machine."""

from typing import Any

from runtime.backends.tensorrt.library import TrtLibrary
from runtime.errors import InvalidSetting, PlanBuildFailed

DEFAULT_GPUS = ("sm80", "sm86", "sm89", "sm120")
"""Data-centre Ampere, then GeForce RTX 30, 40 and 50: one engine holds all of them."""


def parse_gpus(text: str) -> tuple[str, ...]:
    """`sm86,sm89` to a tuple of distinct names, not checked against the library."""
    return tuple(dict.fromkeys(part for raw in text.split(",") if (part := raw.strip().lower())))


def chosen_gpus(library: TrtLibrary, wanted: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """Compute capabilities in ascending order, and the name of the device if the engine is for that one alone.

    InvalidSetting for a capability that the library cannot build for, with those it can.
    """
    if library.compiles_ahead:
        known = library.known_gpus
        for gpu in wanted:
            if gpu not in known:
                raise InvalidSetting(f"--gpu {gpu}: {library.target} {library.version} builds for {', '.join(known)}")
        return tuple(sorted(wanted or DEFAULT_GPUS, key=known.index)), None
    gpu, name = gpu_at_hand(library)
    if wanted and wanted != (gpu,):
        raise InvalidSetting(
            f"--gpu {','.join(wanted)}: {library.target} builds on the GPU it is for, and this one is {gpu} ({name}); "
            "--target tensorrt-rtx compiles for others"
        )
    return (gpu,), name


def gpu_at_hand(library: TrtLibrary) -> tuple[str, str]:
    """Compute capability, like sm87, and name of this machine's first GPU; PlanBuildFailed if there is none."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise InvalidSetting("cuda-python is not installed: pip install 'headrace[tensorrt]'") from error
    try:
        _ok(driver.cuInit(0))
        (device,) = _ok(driver.cuDeviceGet(0))
        (name,) = _ok(driver.cuDeviceGetName(128, device))
        kinds = driver.CUdevice_attribute
        major, minor = (
            _ok(driver.cuDeviceGetAttribute(kind, device))[0]
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
    except RuntimeError as error:
        raise PlanBuildFailed(
            f"{library.target} builds on the GPU it is for, and there is none here: {str(error).rstrip('.')}; "
            "--target tensorrt-rtx compiles on any machine"
        ) from error
    return f"sm{major}{minor}", bytes(name).partition(b"\0")[0].decode()


def _ok(returned: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a driver call after its status. RuntimeError names any status but success."""
    status, *rest = returned
    if int(status):
        raise RuntimeError(str(getattr(status, "name", status)))
    return tuple(rest)
