"""The calibration set of one export: what the user asked for, with the checkpoint at hand.

Joins `calibration_set.py` to a checkpoint; for `self` it first writes the model to a scratch artifact to sample from.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from export.calibration.dataset import CalibrationOptions, CalibrationSet, load_calibration_set
from export.calibration.self_samples import artifact_generator
from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig
from export.pipeline.artifact_files import write_unverified
from export.pipeline.graph_files import ExportPlan
from export.schemes.registry import scheme_named

# Samples are drawn from nearly the model's own distribution (KL 0.004 nats of SmolLM2-135M), at a quarter of the bytes.
_SAMPLED_PRECISION = "w8a16"


def calibration_set_for(
    options: CalibrationOptions, checkpoint: Checkpoint, config: ModelConfig, max_len: int
) -> CalibrationSet:
    """The sequences to calibrate on; `max_len` is the exported model's longest sequence. Errors as there."""

    def generate(starts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
        with tempfile.TemporaryDirectory(prefix="headrace-sample-") as directory:
            scheme = scheme_named(_SAMPLED_PRECISION)
            plan = ExportPlan(checkpoint=checkpoint, config=config, scheme=scheme, max_len=length)
            artifact = write_unverified(Path(directory), plan)
            return artifact_generator(artifact, length=length)(starts, length, seed)

    return load_calibration_set(
        options.source,
        checkpoint.text_files(),
        num_samples=options.num_samples,
        length=options.length_within(max_len),
        max_len=max_len,
        generate=generate,
    )
