"""Which instructions this processor has, and what ONNX Runtime must be told because of them.

Reads /proc/cpuinfo, which a test can replace by a set of flags. Knows nothing of models or sessions.
"""

import platform
from collections.abc import Collection
from functools import cache
from pathlib import Path

EXACT_INT8 = ("session.x64quantprecision", "1")
"""Session option: exact sums of uint8 times int8 on x86 without VNNI. The fast kernel there adds pairs of products in
16 bits and saturates: wrong by 0.25 % of a typical output, and by several times as much where activations and weights
are large. With the option a prefill takes a tenth longer on such a processor. On one with VNNI the fast kernel is
exact, and the option only makes prefill 1.6 to 1.8 times and decoding 32 rows 1.45 times slower."""
_EXACT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Linux's names of the x86 extensions that add products of uint8 and int8 in 32 bits. ONNX Runtime chooses its kernel
by the same processor flags."""
_X86 = frozenset({"x86_64", "amd64", "i686", "i386"})


@cache
def cpu_info() -> dict[str, str]:
    """The fields of /proc/cpuinfo, of the last processor listed; empty where there is no such file."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_flags() -> frozenset[str]:
    """This processor's instruction sets by Linux's names, like `avx2` and `avx512_vnni`; empty if unknown."""
    info = cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def int8_options(flags: Collection[str] | None = None, machine: str | None = None) -> dict[str, str]:
    """Session options that make uint8 times int8 exact on this processor, and slow no processor that is exact already.

    flags, machine: of another processor, for tests. An x86 processor whose flags are unknown counts as inexact.
    """
    flags = cpu_flags() if flags is None else flags
    is_x86 = (machine or platform.machine()).lower() in _X86
    return dict([EXACT_INT8]) if is_x86 and _EXACT_PRODUCTS.isdisjoint(flags) else {}
