"""choice.json of an artifact that was exported with PRECISION=auto: the measurements its precision was chosen by.

Reads and shows; `export/pipeline/auto_precision.py` writes it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from runtime.artifact.manifest import CHOICE, Artifact
from runtime.artifact.shapes import read_choice_file
from runtime.machine.sizes import format_bytes


def read_choice(artifact: Artifact) -> dict[str, Any] | None:
    """The table as written; None for an artifact whose precision was named by its user. InvalidArtifact if damaged."""
    return None if CHOICE not in artifact.manifest.files else read_choice_file(artifact.path / CHOICE)


def choice_lines(choice: Mapping[str, Any]) -> Iterator[str]:
    """The table for people: the fastest first, then those that were out, and why."""
    machine = choice["machine"]
    yield f"chosen for {choice['optimized_for']}: {choice['work']}; medians of {choice['rounds']} runs in turn"
    yield f"  {'':12}{'seconds':>9}{'prefill':>12}{'decode':>12}{'size':>10}{'perplexity':>12}"
    for row in choice["candidates"]:
        mark = "chosen" if row["precision"] == choice["chosen"] else ""
        if row["why_not"] is not None:
            yield f"  {row['precision']:12}ruled out: {row['why_not']}"
            continue
        increase = row["perplexity_increase"]
        told = "" if increase is None else f"{increase:+.2%}"
        speeds = f"{row['prefill_tokens_per_s']:>8,.0f} t/s{row['decode_tokens_per_s']:>8,.0f} t/s"
        size = format_bytes(row["file_bytes"])
        yield f"  {row['precision']:12}{row['seconds']:>9.2f}{speeds}{size:>10}{told:>12}  {mark}".rstrip()
    yield f"  on {machine['cores']} cores, {machine['cpu']} ({machine['instruction_sets']})"
