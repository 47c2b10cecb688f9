"""What the JSON files of an artifact must look like before anybody reads them: receipt, choice, calibration.

The manifest has its own types, in manifest.py. Fields that are not read are not listed here and may be anything.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from runtime.artifact.json_shape import read_json, shaped
from runtime.errors import InvalidArtifact

TokenIds = Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]

Figure = float | Literal["nan", "inf", "-inf"]
"""A measured figure; as text where it is not finite, because JSON cannot express that."""


class Check(TypedDict):
    """One gate of the receipt."""

    figure: str
    value: Figure
    limit: float
    reason: str
    at_most: bool
    passed: bool


class Recorded(TypedDict):
    """The prompts that were continued at export, and the tokens each dialect gave."""

    prompts: list[TokenIds]
    tokens: dict[str, list[TokenIds]]


# A figure of TensorRT's graphs has a dot in its name, which a class body cannot spell.
Quantization = TypedDict(
    "Quantization",
    {
        "two_pass": NotRequired[list[str]],
        "two_pass_share": NotRequired[float],
        "layer_errors": NotRequired[dict[str, Figure]],
        "trt.layer_errors": NotRequired[dict[str, Figure]],
    },
)


class Receipt(TypedDict):
    """receipt.json, as far as it is read."""

    passed: bool
    checks: list[Check]
    reference: NotRequired[str]
    figures: NotRequired[dict[str, Figure]]
    graphs: NotRequired[dict[str, str]]
    replay: NotRequired[Recorded]
    quantization: NotRequired[Quantization]


class Machine(TypedDict):
    """Where the candidates of choice.json were measured."""

    cores: int
    cpu: str
    instruction_sets: str


class Candidate(TypedDict):
    """A row of choice.json: measured, or ruled out with a reason."""

    precision: str
    why_not: str | None
    seconds: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    file_bytes: int | None
    perplexity_increase: float | None


class Choice(TypedDict):
    """choice.json."""

    optimized_for: str
    work: str
    rounds: int
    chosen: str
    candidates: list[Candidate]
    machine: Machine


class Origin(TypedDict):
    """Where a calibration's text came from."""

    source: str
    num_sequences: NotRequired[int]


class LayerRow(TypedDict):
    """What int8 costs one linear layer."""

    layer: Annotated[int, Meta(ge=0, le=100_000)]
    kind: str
    kl: float


class CalibrationAccount(TypedDict):
    """calibration.json, as far as it is shown."""

    provenance: Origin
    layers: list[LayerRow]


def read_receipt(file: Path) -> dict[str, Any]:
    """The receipt as written. InvalidArtifact if it is malformed, or says that it passed with a gate that did not."""
    raw = read_json(file)
    receipt = shaped(raw, Receipt, str(file))
    if receipt["passed"] and not (receipt["checks"] and all(check["passed"] for check in receipt["checks"])):
        raise InvalidArtifact(f"{file} says that the model passed, and a gate in it says otherwise; export it again")
    return dict(raw)


def read_choice_file(file: Path) -> dict[str, Any]:
    """choice.json as written. InvalidArtifact if it is malformed."""
    raw = read_json(file)
    choice = shaped(raw, Choice, str(file))
    for row in choice["candidates"]:
        measured = (row["seconds"], row["prefill_tokens_per_s"], row["decode_tokens_per_s"], row["file_bytes"])
        if row["why_not"] is None and None in measured:
            raise InvalidArtifact(f"{file} has no figures of {row['precision']}, which it says were measured")
    return dict(raw)


def read_calibration_account(file: Path) -> dict[str, Any]:
    """calibration.json as written. InvalidArtifact if it is malformed."""
    raw = read_json(file)
    shaped(raw, CalibrationAccount, str(file))
    return dict(raw)
