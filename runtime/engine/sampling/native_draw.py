"""The draw of the native library (runtime/native/sampling/), for rows of logits as numpy holds them."""

import ctypes
from collections.abc import Callable
from functools import cache

from runtime.engine.sampling.logits import Row, most_likely
from runtime.errors import HeadraceError
from runtime.native.library import is_built, library_file, load_library

NativeDraw = Callable[[Row, float, float, float, float], int | None]
"""(logits, 1 / temperature, top_p, min_p, uniform) to a token; None if it is dropped."""

_DROPPED = -1


class _Draw(ctypes.Structure):
    """`Draw` of runtime/native/sampling/draw.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("num_logits", ctypes.c_int64),
        ("inverse_temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("unused", ctypes.c_int32),
        ("uniform", ctypes.c_double),
    )


@cache
def native_draw() -> NativeDraw | None:
    """The library's draw; None where the library is not built or does not load."""
    if not is_built():
        return None
    try:
        load_library()
    except HeadraceError:
        return None
    # PyDLL keeps the interpreter's lock: a draw takes some microseconds, and getting the lock back may take more.
    function = ctypes.PyDLL(str(library_file())).headrace_draw
    function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_int64

    def draw(logits: Row, inverse_temperature: float, top_p: float, min_p: float, uniform: float) -> int | None:
        """BadLogitsError if a logit is NaN or the highest is infinite."""
        assert logits.flags.c_contiguous and logits.dtype == "float32"
        address = logits.__array_interface__["data"][0]
        job = _Draw(address, len(logits), inverse_temperature, top_p, min_p, 0, uniform)
        found: int = function(ctypes.addressof(job))
        if found >= 0:
            return found
        if found != _DROPPED:
            most_likely(logits)
        return None

    return draw
