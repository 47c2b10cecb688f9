"""Activation scales by the largest magnitude seen: what W8A8 graphs get where no calibration has chosen better ones.

Inputs of down_proj are left out: in SmolLM2-135M one of their channels is 1,924 times the median, and a range that
holds it rounds everything else to nothing (perplexity doubles).
"""

from collections.abc import Sequence

from export.checkpoint import Checkpoint
from export.config import ModelConfig
from export.reference import Array, run_reference
from export.trt_linear import ActivationScales
from runtime.progress import progress_bar


def minmax_scales(checkpoint: Checkpoint, config: ModelConfig, windows: Sequence[Sequence[int]]) -> ActivationScales:
    """Scale of every projection's input but down_proj's: the largest magnitude over the windows' tokens, by 127."""
    scales: dict[str, float] = {}

    def see(name: str, inputs: Array) -> None:
        if not name.endswith("down_proj"):
            scales[name] = max(scales.get(name, 0.0), float(abs(inputs).max()) / 127)

    with progress_bar("calibrate", total=config.num_layers) as bar:
        run_reference(checkpoint, config, windows, on_layer=lambda: bar.update(1), on_input=see)
    return scales
