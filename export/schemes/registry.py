"""The schemes that can be exported, by name. A new scheme with existing forms needs one entry here."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from export.schemes.floats import BF16, FP16, FP32
from export.schemes.forms import Blocks, Floats
from export.schemes.int8 import W8A8
from export.schemes.scheme import Scheme
from export.schemes.weight_only import W4A16, W8A16
from runtime.errors import InvalidSetting

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {scheme.name: scheme for scheme in (FP32, FP16, BF16, W8A16, W4A16, W8A8)}
)

AUTO = "auto"
"""The --precision that chooses the fastest scheme that passes its gates."""

IMPORTED = "imported"
"""The --precision that keeps a quantized checkpoint's integers, and stores the rest as floats."""


def scheme_named(name: str, *, stored_bits: int | None = None, has_input_scales: bool = False) -> Scheme:
    """Look up a scheme.

    stored_bits: bits per weight of a checkpoint that is already quantized, else None
    has_input_scales: whether that checkpoint has static scales of int8 inputs
    InvalidSetting lists the valid names, or those that fit a checkpoint with that many bits.
    """
    if name == IMPORTED:
        if stored_bits is None:
            raise InvalidSetting(
                f"precision {IMPORTED} keeps the integers of a checkpoint that is quantized already, and this one has "
                f"none; choose one of {', '.join(SCHEMES)}"
            )
        assert FP32.ort is not None
        stored = W8A8 if has_input_scales else SCHEMES[f"w{stored_bits}a16"]
        assert stored.ort is not None
        floats = replace(FP32.ort, gates=stored.ort.gates)
        return Scheme(
            name=stored.name,
            summary="",
            ort=floats,
            standard=None,
            keeps_stored=True,
            multiplies_int8=stored.multiplies_int8,
        )
    if name not in SCHEMES:
        raise InvalidSetting(f"precision {name!r} is unknown; choose one of {', '.join(SCHEMES)}")
    scheme = SCHEMES[name]
    if stored_bits is None or scheme.ort is None or isinstance(scheme.ort.linear, Floats):
        return scheme
    form = scheme.ort.fallback_of("down")
    loses = scheme.multiplies_int8 and not has_input_scales
    if not isinstance(form, Blocks) or form.bits != stored_bits or loses:
        raise InvalidSetting(
            f"the checkpoint's weights are {stored_bits}-bit integers already, and {name} would round them once more; "
            f"choose {IMPORTED}, w{stored_bits}a16, or fp32 and fp16, which hold them exactly as well"
        )
    return replace(scheme, keeps_stored=True, calibration=None)


def check_dialect(scheme: Scheme, dialect: str) -> None:
    """InvalidSetting if the scheme has no graph of that dialect; the message lists schemes that have one."""
    if scheme.storage_of(dialect) is None:
        known = ", ".join(name for name, other in SCHEMES.items() if other.storage_of(dialect) is not None)
        raise InvalidSetting(f"precision {scheme.name!r} has no graph of the dialect {dialect}; choose one of {known}")
