"""Peak memory, each in a process of its own, because a peak never falls: of an export, and of reading a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from export.model.families.architectures import parse_config
from export.pipeline.memory_plan import phases
from export.schemes.registry import SCHEMES
from tests.support.tiny.checkpoint import config_of, write_checkpoint

ROOT = Path(__file__).parents[2]


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


PEAK_WHILE_READING = """
import sys
from pathlib import Path
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

checkpoint = SafetensorsCheckpoint(Path(sys.argv[1]))
checkpoint.load("t0")
before = peak_mib()
for name in checkpoint.tensors:
    assert checkpoint.load(name)[-1] == 1
sys.stdout.write(f"{peak_mib() - before:.1f}")
"""


def test_reading_all_tensors_keeps_only_one(tmp_path: Path) -> None:
    """24 tensors of 16 MiB as float32: after the first, the peak may rise by one more, not by the 192 MiB of
    the file, as it does where the file is mapped. In a process of its own, because a peak never falls.
    """
    value = np.ones((4 << 20,), ml_dtypes.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    save_file({f"t{number}": value for number in range(24)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", PEAK_WHILE_READING, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert float(printed) < 32, f"peak memory rose by {printed} MiB"
