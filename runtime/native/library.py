"""Finds and loads the library of native operators. Nothing needs it: without it the `native` device is not offered.

The library's file name holds a digest of the sources beside this file and of the compiler's flags, so that a library
built from other sources is never loaded. `build.py` writes it.
"""

import ctypes
import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from runtime.errors import DeviceUnavailable, InvalidSetting

HERE = Path(__file__).parent
BUILD = HERE / "built"
ISA = "HEADRACE_NATIVE_ISA"
"""Environment variable: which variant runs, instead of the best that the processor has."""

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread",
         "-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized")  # fmt: skip
"""No contraction: a * b + c rounds as it is written, so that two code paths agree to the bit. Intrinsics of GCC 12 and
vectors wider than the baseline's registers warn without cause."""

VARIANTS: Mapping[str, Sequence[str]] = (
    {
        "generic": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512vnni": ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
    }
    if platform.machine() == "x86_64"
    else {"generic": ()}
)
"""The instruction sets that kernels are compiled for, and their flags."""


def sources() -> list[Path]:
    """Every source and header, in a fixed order."""
    return sorted(file for pattern in ("*.cc", "*.h") for file in HERE.rglob(pattern))


@cache
def library_file() -> Path:
    """Where the library of these sources is, if it has been built."""
    digest = hashlib.sha256(repr((FLAGS, sorted(VARIANTS.items()), platform.machine())).encode())
    for file in sources():
        digest.update(f"{file.relative_to(HERE)}\0".encode() + file.read_bytes())
    return BUILD / f"headrace-{digest.hexdigest()[:16]}.so"


def is_built() -> bool:
    """Whether the library of these sources is there."""
    return library_file().is_file()


@cache
def load_library() -> ctypes.CDLL:
    """The library, for calls of its own functions; ONNX Runtime opens the same file for its operators.

    DeviceUnavailable if it has not been built or does not load, InvalidSetting if HEADRACE_NATIVE_ISA names no variant
    that this processor runs.
    """
    if not is_built():
        raise DeviceUnavailable("the native operators are not built: make native (it needs g++ or clang++)")
    asked = os.environ.get(ISA)
    if asked is not None and asked not in VARIANTS:
        raise InvalidSetting(f"{ISA}={asked}: choose from {', '.join(VARIANTS)}")
    try:
        library = ctypes.CDLL(str(library_file()))
    except OSError as error:
        raise DeviceUnavailable(f"the native operators do not load ({error}): make native") from error
    library.headrace_variant.restype = ctypes.c_char_p
    if asked is not None and variant_of(library) != asked:
        raise InvalidSetting(f"{ISA}={asked}: this processor does not run it")
    return library


def variant_of(library: ctypes.CDLL) -> str:
    """The instruction set that its kernels use."""
    return str(library.headrace_variant().decode())


def operators_for(threads: int) -> Path:
    """The file to register with a session of so many threads, before the session is made. Errors: `load_library`."""
    load_library().headrace_set_session_threads(threads)
    return library_file()
