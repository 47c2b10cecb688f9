"""Headrace against onnxruntime-genai 0.18's own export of the same weights, in turn (A B A B).

usage: python -m benchmarks.versus_genai [--ours LIST] [--shape qwen2.5-0.5b] [--device cpu] [--cases LIST]

w8a8 and w8a16 meet its int8, w4a16 its int4. The peer's virtual environment is made in --cache on first use (about
1.5 GB with torch, which its model builder needs); it runs on the threads it chooses by default. Four minutes an
artifact once everything is there. Prints a table of medians and ratios, then one JSON line.
"""

from pathlib import Path

from benchmarks.peer import PeerTool, versus
from benchmarks.peer_models import directory_of, made
from benchmarks.peer_process import run

WORKER = Path(__file__).with_name("genai_worker.py")
WANTED = {
    ("w8a8", "prefill 512"): 5.0,
    ("w8a8", "decode x32"): 3.8,
    ("w8a8", "decode x1"): 2.0,
    ("w8a16", "decode x1"): 2.0,
}


def model(python: Path, cache: Path, shape: str, precision: str) -> Path:
    """The peer's own export."""
    builder = (python, "-m", "onnxruntime_genai.models.builder", "-i", directory_of(shape, cache, python))
    options = ("-p", precision, "-e", "cpu", "-c", cache / "builder")
    return made(
        cache / f"genai-{shape}-{precision}",
        lambda out: run(f"genai's {precision} export", *builder, "-o", out, *options),
    )


GENAI = PeerTool(
    key="genai",
    column="genai",
    packages=("onnxruntime-genai==0.18.*", "torch==2.13.0", "transformers>=5,<6", "accelerate", "gguf", "onnx-ir"),
    environment={},
    worker=WORKER,
    counterpart={"w8a8": "int8", "w8a16": "int8", "w4a16": "int4"},
    wanted=WANTED,
    model=model,
    has_cpu_time=False,
)

if __name__ == "__main__":
    versus(GENAI, __doc__, default_ours="w8a8,w8a16,w4a16")
