"""Restores the text of an earlier calibration, which an artifact keeps only on request.

The statistics, ranges and costs of a calibration are enough for most exports. Rounding weights needs the text too: it
is read again from its source, and its hash must be the same.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from export.calibration.dataset import BUILT_IN, CalibrationOptions, CalibrationSet, sequences_digest
from export.calibration.records import FLAG
from export.quantize.int8.saved import Calibration
from runtime.errors import InvalidSetting

RANDOM = "random ids"
"""How the recorded source begins where there was no tokenizer. The ids are always the same."""

ReadText = Callable[[CalibrationOptions], CalibrationSet]


def with_text(found: Calibration, path: Path, given: CalibrationOptions, read: ReadText) -> Calibration:
    """`found` with its sequences: its own if it kept them, else read again.

    given: the user's own --calibration-text, for text that is not the project's
    InvalidSetting if that is missing, or another text than the calibration's.
    """
    if found.sequences:
        return found
    source = str(found.provenance.get("source", "unknown text"))
    is_ours = source == BUILT_IN or source.startswith(RANDOM)
    if not is_ours and given.source == BUILT_IN:
        raise InvalidSetting(
            f"--reuse-calibration {path} holds no text, and this export needs it: give {FLAG} {source} as well, "
            "the text it was made of, or export that artifact with --keep-calibration-text"
        )
    sizes = {name: found.provenance.get(name, getattr(given, name)) for name in ("num_samples", "length")}
    material = read(CalibrationOptions(source=BUILT_IN if is_ours else given.source, **sizes))
    if sequences_digest(material.sequences) != found.provenance.get("sequences_sha256"):
        raise InvalidSetting(
            f"{FLAG} {given.source} is not the text that --reuse-calibration {path} was made of ({source}); give "
            "that text, or leave --reuse-calibration out"
        )
    return replace(found, sequences=material.sequences)


def without_text(calibration: Calibration) -> Calibration:
    """The calibration as an artifact keeps it by default: everything but the text."""
    return replace(calibration, sequences=())
