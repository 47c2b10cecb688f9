"""The predicted peak: it follows the dimensions, not the amount of text, and is near what an export really takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from export.model.families.architectures import parse_config
from export.pipeline.memory_plan import phases
from export.schemes.registry import SCHEMES
from export.schemes.scheme import Scheme
from tests.support.tiny_checkpoint import config_of, write_checkpoint

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


@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES.values() if scheme.calibration], ids=lambda scheme: scheme.name
)
def test_it_does_not_grow_with_the_text_but_with_the_model(scheme: Scheme) -> None:
    assert highest(scheme, num_samples=100_000) == highest(scheme)
    assert highest(scheme, num_samples=1, length=16) <= highest(scheme)
    larger = {"vocab_size": 1_000_000, "hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 200}
    for name, value in larger.items():
        assert highest(scheme, **{name: value}) > highest(scheme), name


@pytest.mark.parametrize(("precision", "dialects"), [("w8a8", "ort"), ("w4a16", "ort"), ("w4a16", "ort,trt")])
def test_it_is_near_what_an_export_takes(precision: str, dialects: str, tmp_path: Path) -> None:
    """A vocabulary that outweighs the libraries; benchmarks/calibration_memory.py holds larger models to 20 %."""
    raw = config_of("llama", hidden_size=128, intermediate_size=256, vocab_size=60_000, num_hidden_layers=1)
    model = write_checkpoint(tmp_path / "model", raw)
    command = [sys.executable, "-m", "headrace", "export", str(model), "--precision", precision, "--force"]
    command += ["--dialect", dialects]
    command += ["--out", str(tmp_path / "artifact"), "--calibration-samples", "4", "--calibration-length", "64"]
    # A process of its own, whose children's peak is the export's alone.
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    peak = int(done.stdout) * 1024
    scheme = SCHEMES[precision]
    found = phases(parse_config(raw), scheme, num_samples=4, length=64, dialects=dialects.split(","))
    predicted = max(phase.size for phase in found)
    assert 0.75 < predicted / peak < 1.3, (predicted, peak)
