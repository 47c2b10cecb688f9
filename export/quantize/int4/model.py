"""Calibrated int4: from a checkpoint and calibration text to a checkpoint whose layers are integers already.

What comes out reads like a checkpoint that a GPTQ tool has quantized, and goes into the graph the same way.

What was measured on SmolLM2-135M, blocks of 32, perplexity increase and KL in nats, everything else in 8 bits:

                                                        project's two texts     Python's pydoc topics
                                                        (2,048 tokens)          (4,096 tokens)
    round to nearest                                    +13.8 %   0.137         +14.2 %   0.145
    HQQ (0.7-norm; zero points then rounded)            +13.8 %   0.150         +12.3 %   0.167
    AWQ (strength searched for each layer's input)       +8.6 %   0.092          +8.7 %   0.090
    GPTQ as here                                         +4.4 %   0.055          +7.4 %   0.065
    GPTQ, and the last two MLPs in 8 bits                +3.4 %   0.048          +6.1 %   0.056

Scaling as AWQ does before GPTQ raised the output error on unseen text in each kind of layer 7 (o 0.55 to 0.65 of round
to nearest, gate_up 0.81 to 0.84, down 0.94 to 1.05). Other blocks, output error of round to nearest in five layers
against 32 with a zero point: 16 gives 0.79 to 0.85 for a quarter more bytes, 64 1.44, 128 1.44 to 1.88, 32 without a
zero point 1.14 to 1.18. The checkpoint at hand was itself quantized in blocks of 32 with a float minimum; the kernel's
zero points are whole numbers, so none of these schemes reproduces it, but they profit: in the basis of rotation.py,
where nothing is left of those blocks, round to nearest costs +21.0 % and +25.3 % (KL 0.214, 0.208). GPTQ was not
measured there.

TensorRT's graph is rounded apart, in symmetric blocks of 64, the last MLPs with a scale an output channel: to nearest
+21.3 % on the project's two texts, as here +6.7 and +7.6 % (KL 0.080, 0.077) in two
runs whose sums differed in order; see schemes/weight_only.py for blocks of 32.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from export.calibration.dataset import CalibrationSet
from export.checkpoint.protocol import Checkpoint
from export.model.description import Linear, ModelConfig, Site
from export.quantize.int4.rounding import LayerError, Plan, pieces_of, round_layers
from export.quantize.int8.saved import Calibration
from export.quantize.rounding.layers import BlockLayer, Layers, undecided
from export.schemes.forms import Blocks
from export.schemes.scheme import Storage
from export.storage.blocks import check_divisible
from export.verify.parity import figure_name

_WIDE_SHARE = 1 / 16
"""Of the layers, the last ones, whose MLP keeps 8 bits: their errors go into the logits with nothing behind them that
could take them back. In SmolLM2-135M these are 2 of 30; for 2.4 % of the bytes a token reads, KL falls from 0.061 to
0.053 nats, and the perplexity increase from 6.4 % to 5.2 %, over 6,144 tokens of three texts."""


class Int4Model(NamedTuple):
    """The rounded layers, and what rounding cost each."""

    layers: Layers
    errors: list[LayerError]


def block_calibration(material: CalibrationSet) -> Calibration:
    """What there is to keep of a calibration that needs the text alone."""
    return Calibration({}, {}, [], material.sequences, material.provenance)


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
    """The blocks of every site that the precision stores in 4 bits, 8 where that is too few, see _WIDE_SHARE.

    UnsupportedModel for rows that blocks do not fill.
    """
    plan: dict[Site, Blocks] = {}
    for block in config.blocks:
        for linear in block.linears:
            blocks = storage.int4_blocks_of(linear.role)
            if blocks is not None:
                check_divisible(linear.weight_names[0], linear.num_inputs, blocks.block_size)
                is_wide = is_kept_wide(config, linear)
                plan[linear.site] = storage.wide_blocks(linear.num_inputs) if is_wide else blocks
    return plan


def is_kept_wide(config: ModelConfig, linear: Linear) -> bool:
    """Whether a layer that a scheme stores in 4 bits keeps 8, see _WIDE_SHARE."""
    first = config.num_layers - max(1, round(config.num_layers * _WIDE_SHARE))
    return first <= linear.site.layer < config.num_layers and linear.role in ("gate_up", "up", "down")


def account_of(models: Mapping[str, Int4Model], provenance: dict[str, Any]) -> dict[str, Any]:
    """The receipt's account of what was quantized how, for each dialect; JSON-able."""
    return {
        "method": "GPTQ, each layer against the float model's output for the inputs the layers before it leave",
        **{
            figure_name(dialect, "layer_errors"): {str(entry.site): entry.error for entry in model.errors}
            for dialect, model in models.items()
        },
        "calibration": provenance,
    }
