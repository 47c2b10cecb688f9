"""Calibrated int4: round a checkpoint's linear layers with GPTQ on calibration text.

The layers reach the graph in the same way as those of a checkpoint that a GPTQ tool has quantized.

Perplexity increase and KL in nats of SmolLM2-135M, blocks of 32, everything else in 8 bits:

                                                        project's two texts     Python's pydoc topics
                                                        (2,048 tokens)          (4,096 tokens)
    round to nearest                                    +13.8 %   0.137         +14.2 %   0.145
    HQQ (0.7-norm; zero points then rounded)            +13.8 %   0.150         +12.3 %   0.167
    AWQ (strength searched for each layer's input)       +8.6 %   0.092          +8.7 %   0.090
    GPTQ as here                                         +4.4 %   0.055          +7.4 %   0.065
    GPTQ, and the last two MLPs in 8 bits                +3.4 %   0.048          +6.1 %   0.056

AWQ's scaling before GPTQ increased the output error on unseen text in layer 7 (relative to round to nearest: o from
0.55 to 0.65, gate_up 0.81 to 0.84, down 0.94 to 1.05). Output error of round to nearest in five layers with other
blocks, relative to 32 with a zero point: 16 0.79 to 0.85 for a quarter more bytes, 64 1.44, 128 1.44 to 1.88, 32
without a zero point 1.14 to 1.18. The measured checkpoint had itself been quantized in blocks of 32 with a float
minimum, which makes round to nearest better: in the rotated basis (int8/rotation.py) it costs +21.0 % and +25.3 % (KL
0.214, 0.208). GPTQ was not measured there.

TensorRT's graph is rounded separately, in symmetric blocks of 64, and the last MLPs with a scale per output channel.
On the project's two texts round to nearest costs +21.3 %, GPTQ +6.7 and +7.6 % (KL 0.080, 0.077) in two runs with
another order of sums; see schemes/weight_only.py for blocks of 32.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from export.calibration.dataset import CalibrationSet
from export.checkpoint.protocol import Checkpoint
from export.model.description import Linear, ModelConfig, Site
from export.quantize.int4.rounding import Plan, pieces_of, round_layers
from export.quantize.int8.saved import Calibration
from export.quantize.rounding.layers import BlockLayer, Layers, num_experts_of, undecided
from export.schemes.forms import Blocks
from export.schemes.scheme import Storage
from export.storage.blocks import check_divisible
from export.verify.parity import figure_name

_EIGHT_BIT_SHARE = 1 / 16
"""Share of the layers, counted from the last, whose MLP keeps 8 bits: no later layer corrects their errors. In
SmolLM2-135M these are 2 of 30. For 2.4 % more bytes per token, KL falls from 0.061 to 0.053 nats and the perplexity
increase from 6.4 % to 5.2 %, over 6,144 tokens of three texts."""


class Int4Model(NamedTuple):
    """The rounded layers, and each one's output error (see `round_layers`)."""

    layers: Layers
    errors: dict[Site, float]


def block_calibration(text: CalibrationSet) -> Calibration:
    """The `Calibration` of a scheme that needs no statistics."""
    return Calibration({}, {}, [], text.sequences, text.provenance)


def int4_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    plan: Plan,
    sequences: Sequence[Sequence[int]],
    workdir: Path,
) -> Int4Model:
    """Round every site of the plan."""
    files, errors = round_layers(checkpoint, config, pieces_of(sequences, config), plan, workdir)
    return Int4Model(undecided(config) | {site: BlockLayer(partial(files.get, site)) for site in plan}, errors)


def plan_of(config: ModelConfig, storage: Storage) -> Plan:
    """The blocks of every site that the scheme stores in 4 bits; 8-bit blocks in the last layers (`keeps_8_bits`).

    UnsupportedModel if a row is not a whole number of blocks.
    """
    plan: dict[Site, Blocks] = {}
    for block in config.blocks:
        for linear in block.linears:
            blocks = storage.int4_blocks_of(linear.role)
            if blocks is not None:
                check_divisible(linear.weight_names[0], linear.num_inputs, blocks.block_size)
                is_8_bit = keeps_8_bits(config, linear)
                plan[linear.site] = storage.eight_bit_blocks(linear.num_inputs) if is_8_bit else blocks
    return plan


def keeps_8_bits(config: ModelConfig, linear: Linear) -> bool:
    """Whether a layer of a 4-bit scheme keeps 8 bits, see _EIGHT_BIT_SHARE."""
    first = config.num_layers - max(1, round(config.num_layers * _EIGHT_BIT_SHARE))
    return first <= linear.site.layer < config.num_layers and linear.role in ("gate_up", "up", "down")


def int4_report(models: Mapping[str, Int4Model], provenance: dict[str, Any]) -> dict[str, Any]:
    """The receipt's quantization report for each dialect; JSON-able."""
    return {
        "method": "GPTQ, each layer against the float model's output for the inputs the layers before it leave",
        **{
            figure_name(dialect, "layer_errors"): {str(site): error for site, error in model.errors.items()}
            for dialect, model in models.items()
        },
        **_not_reached(models),
        "calibration": provenance,
    }


def _not_reached(models: Mapping[str, Int4Model]) -> dict[str, int]:
    """How many experts no token of the text chose, whose weights are rounded to nearest; nothing if there are none."""
    counts = {
        figure_name(dialect, "experts_not_reached"): num_experts_of(model.layers.keys() - model.errors.keys())
        for dialect, model in models.items()
    }
    return {name: count for name, count in counts.items() if count}
