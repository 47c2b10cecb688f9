"""Headrace against onnxruntime-genai 0.18's own export of the same weights, in turn (A B A B).

usage: python benchmarks/versus_genai.py [--ours w8a8,w8a16,w4a16,NAME=ARTIFACT] [--repeat 5] [--cache DIR]

w8a8 and w8a16 meet its int8, w4a16 its int4. The peer's virtual environment is made in --cache on first use (about
1.5 GB with torch, which its model builder needs); it runs on the threads it chooses by default. Four minutes an
artifact once everything is there. Prints a table of medians and ratios, then one JSON line.
"""

from pathlib import Path

from benchmarks.peer import PeerTool, run, versus
from export.sources.default_model import default_model_file

WORKER = Path(__file__).with_name("genai_worker.py")
WANTED = {
    ("w8a8", "prefill 512"): 4.0,
    ("w8a8", "decode x32"): 2.5,
    ("w8a8+kv8", "prefill 512"): 4.0,
    ("w8a8+kv8", "decode x32"): 2.5,
    **{
        (ours, case): ratio
        for ours in ("w8a16", "w4a16")
        for case, ratio in {"prefill 512": 1.8, "decode x32": 1.5, "decode x1": 1.1}.items()
    },
}


def model(python: Path, cache: Path, precision: str) -> Path:
    """The peer's export of the default model. What was interrupted is begun again: the last step renames."""
    source, out = cache / "genai-source", cache / f"genai-{precision}"
    if not source.exists():
        partial = source.with_name(f"{source.name}.partial")
        run("saving the default model for genai", python, WORKER, "save", default_model_file(), partial)
        partial.rename(source)
    if not out.exists():
        partial = out.with_name(f"{out.name}.partial")
        builder = (python, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", partial)
        run(f"genai's {precision} export", *builder, "-p", precision, "-e", "cpu", "-c", cache / "builder")
        partial.rename(out)
    return out


GENAI = PeerTool(
    key="genai",
    column="genai",
    packages=("onnxruntime-genai==0.18.*", "torch==2.13.0", "transformers>=5,<6", "accelerate", "gguf", "onnx-ir"),
    environment={},
    worker=WORKER,
    counterpart={"w8a8": "int8", "w8a16": "int8", "w4a16": "int4"},
    wanted=WANTED,
    model=model,
)

if __name__ == "__main__":
    versus(GENAI, __doc__, default_ours="w8a8,w8a16,w4a16")
