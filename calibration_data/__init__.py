"""Texts written for this project: for calibration, and separate ones for evaluation.

Knows nothing about tokens or models. See README.md for what each file is for.
"""

import json
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any

CALIBRATION_GROUPS = ("chat", "instructions", "code", "json", "maths", "prose", "languages")
"""Each is a file calib_GROUP.jsonl."""

EVALUATION_TEXTS: Mapping[str, str] = MappingProxyType({"prose": "verify.txt", "manual": "verify_manual.txt"})
"""Held-out texts by name; never calibrated on. The first is the one the receipt's gates were set for."""


def verification_text(name: str = "prose") -> str:
    """A held-out text. `prose`: prose, dialogue, code, figures, about 1,500 tokens. `manual`: reference and report."""
    return _read(EVALUATION_TEXTS[name])


def evaluation_texts() -> dict[str, str]:
    """Every held-out text by name, the prompts as one of them."""
    return {name: _read(file) for name, file in EVALUATION_TEXTS.items()} | {
        "prompts": "\n".join(verification_prompts())
    }


def verification_prompts() -> list[str]:
    """Twenty short prompts for greedy generation."""
    return [json.loads(line)["prompt"] for line in _read("prompts.jsonl").splitlines()]


def calibration_records(group: str) -> list[dict[str, Any]]:
    """One group's records, each `{"messages": [{"role", "content"}...]}` or `{"text"}`."""
    return [json.loads(line) for line in _read(f"calib_{group}.jsonl").split("\n") if line]


def _read(name: str) -> str:
    return (resources.files(__name__) / name).read_text(encoding="utf-8")
