"""Headrace against OpenVINO GenAI's int8 on the same weights, in turn (A B A B).

usage: python -m benchmarks.versus_openvino_genai [--ours w8a8,w8a16,NAME=ARTIFACT] [--shape qwen2.5-0.5b]
                                                  [--device cpu] [--cases 'prefill 512,decode x32'] [--repeat 5]

The peer's weights are int8 a channel, by optimum-intel's conversion; its activations are quantized dynamically, in
groups, while it runs, and its KV cache has 8 bits, both as it does unless told otherwise. It runs its
continuous-batching pipeline and chooses its threads. Two virtual environments are made in --cache on first use, one to
convert (with torch, 2 GB) and one to run. Prints a table of medians and ratios, then one JSON line.
"""

from pathlib import Path

from benchmarks.peer import PeerTool, versus
from benchmarks.peer_models import directory_of, made
from benchmarks.peer_process import environment_python, run

WORKER = Path(__file__).with_name("openvino_genai_worker.py")
CONVERTER = ("optimum-intel[openvino]==2.2.*", "torch==2.13.0", "accelerate", "gguf")
WANTED = {
    ("w8a8", "prefill 512"): 1.2,
    ("w8a8", "decode x32"): 1.5,
    ("w8a8", "decode x1"): 2.0,
    ("w8a16", "decode x1"): 2.0,
}


def model(_python: Path, cache: Path, shape: str, precision: str) -> Path:
    """The peer's own conversion, by an environment of its own: its torch is not the one that serves."""
    out = cache / f"openvino-{shape}-{precision}"
    if not out.exists():
        # Text models need no torchvision, and one that does not fit the torch beside it breaks transformers.
        python = environment_python(
            cache / "openvino_convert-venv", "optimum-intel", CONVERTER, unwanted=("torchvision",)
        )
        source = directory_of(shape, cache, python)
        convert = (python.with_name("optimum-cli"), "export", "openvino", "-m", source)
        options = ("--task", "text-generation-with-past", "--weight-format", precision)
        made(out, lambda partial: run(f"OpenVINO's {precision} conversion", *convert, *options, partial))
    return out


OPENVINO_GENAI = PeerTool(
    key="openvino_genai",
    column="OpenVINO",
    packages=("openvino-genai==2026.4.*", "numpy"),
    environment={},
    worker=WORKER,
    counterpart={"w8a8": "int8", "w8a16": "int8"},
    wanted=WANTED,
    model=model,
)

if __name__ == "__main__":
    versus(OPENVINO_GENAI, __doc__, default_ours="w8a8,w8a16")
