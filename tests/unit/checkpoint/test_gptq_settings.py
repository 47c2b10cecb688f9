"""Settings of GPTQ, AWQ and AutoRound: which packing each layer has."""

from typing import Any

import pytest

from export.checkpoint.quantized.gptq_settings import parse_packings
from runtime.errors import InvalidCheckpoint, UnsupportedModel

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
ROUND: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True}
DOWN, UP = "model.layers.3.mlp.down_proj", "model.layers.3.mlp.up_proj"


def test_dynamic_settings_of_gptqmodel() -> None:
    """Patterns begin at the beginning of a name; the first that matches counts, and `-:` names what is not packed."""
    dynamic = {"-:.*\\.o_proj": {}, "+:.*\\.3\\.mlp\\.down": {"bits": 8, "group_size": 32}, ".*": {"sym": False}}
    packings = parse_packings({**GPTQ, "dynamic": dynamic})
    assert (packings.of(DOWN).bits, packings.of(DOWN).group_size, packings.of(DOWN).symmetric) == (8, 32, True)
    assert (packings.of(UP).bits, packings.of(UP).group_size, packings.of(UP).symmetric) == (4, 64, False)
    assert packings.of(DOWN).checkpoint_format == "gptq"


def test_extra_settings_of_auto_round() -> None:
    extra = {DOWN: {"bits": 8, "group_size": -1}, "lm_head": {"bits": 8, "data_type": "int", "act_bits": 16}}
    packings = parse_packings({**ROUND, "extra_config": extra, "packing_format": "auto_round:gptqmodel"})
    assert (packings.of(DOWN).bits, packings.of(DOWN).group_size) == (8, None)
    assert (packings.of("lm_head").bits, packings.of("lm_head").group_size) == (8, 64)
    assert packings.of(UP) == packings.usual
    assert packings.usual.checkpoint_format == "gptq_v2"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data_type": "mx_fp"}, "auto-round with data_type 'mx_fp'"),
        ({"act_bits": 8}, "auto-round with act_bits 8"),
        ({"super_bits": 6}, "auto-round with super_bits 6"),
        ({"bits": 5}, "auto-round with bits 5"),
        ({"rotation": "hadamard"}, "rotation = 'hadamard'"),
    ],
)
def test_a_layer_in_another_form_is_refused(change: dict[str, Any], reason: str) -> None:
    packings = parse_packings({**ROUND, "extra_config": {DOWN: change}})
    with pytest.raises(UnsupportedModel, match=reason):
        packings.of(DOWN)


def test_settings_of_another_type() -> None:
    for raw in ({**GPTQ, "dynamic": [1]}, {**ROUND, "extra_config": {DOWN: 8}}):
        with pytest.raises(InvalidCheckpoint, match="must name settings of modules"):
            parse_packings(raw)
