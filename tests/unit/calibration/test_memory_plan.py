"""The predicted peak memory of a calibrated export: it follows the dimensions, not the amount of text."""

import pytest

from export.model.families.architectures import parse_config
from export.pipeline.memory_plan import phases
from export.schemes.registry import SCHEMES
from export.schemes.scheme import Scheme
from tests.support.tiny.checkpoint import config_of

WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "vocab_size": 32_000,
    "num_attention_heads": 32,
    "num_hidden_layers": 3,
}

CALIBRATED = [scheme for scheme in SCHEMES.values() if scheme.calibration is not None]


def highest(scheme: Scheme, *, num_samples: int = 128, length: int = 512, **changes: int) -> int:
    config = parse_config(config_of("llama", **{**WIDE, **changes}))
    return max(phase.size for phase in phases(config, scheme, num_samples=num_samples, length=length, workers=2))


@pytest.mark.parametrize("scheme", CALIBRATED, ids=lambda scheme: scheme.name)
def test_it_does_not_grow_with_the_text_but_with_the_model(scheme: Scheme) -> None:
    assert highest(scheme, num_samples=100_000) == highest(scheme)
    assert highest(scheme, num_samples=1, length=16) <= highest(scheme)
    larger = {"vocab_size": 1_000_000, "hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 200}
    for name, value in larger.items():
        assert highest(scheme, **{name: value}) > highest(scheme), name
