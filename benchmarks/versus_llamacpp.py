"""Headrace against llama.cpp on the same weights, in turn (A B A B).

usage: python benchmarks/versus_llamacpp.py [--ours w8a8,w4a16,NAME=ARTIFACT] [--repeat 5] [--cache DIR]

w8a8 and w8a16 meet Q8_0, w4a16 Q4_0, both made by llama.cpp's own quantization from the default model in float32.
llama-cpp-python is built from source for this machine's instructions, in a virtual environment in --cache (on first
use; needs a C++ compiler; about 15 minutes on two cores). llama.cpp gets one thread a core, and for every case the
fastest of flash attention on and off and of one KV cache and one a sequence; its KV cache is float16, as it is unless
told. Five minutes an artifact once everything is there. Prints a table of medians and ratios, then one JSON line.
"""

from pathlib import Path

from benchmarks.peer import PeerTool, run, versus
from export.sources.default_model import default_model_file

WORKER = Path(__file__).with_name("llamacpp_worker.py")
WANTED = {
    ("w8a8", "prefill 512"): 2.5,
    ("w8a8", "decode x32"): 1.8,
    ("w8a8+kv8", "prefill 512"): 2.5,
    ("w8a8+kv8", "decode x32"): 2.1,
    ("w4a16", "decode x1"): 0.95,
}


def model(python: Path, cache: Path, precision: str) -> Path:
    """The default model in one of llama.cpp's types. What was interrupted is begun again: the last step renames."""
    source, out = cache / "llamacpp-F32.gguf", cache / f"llamacpp-{precision}.gguf"
    if not source.exists():
        partial = source.with_name(f"{source.name}.partial")
        run(
            "writing the default model in float32 for llama.cpp", python, WORKER, "float", default_model_file(), partial
        )
        partial.rename(source)
    if not out.exists():
        partial = out.with_name(f"{out.name}.partial")
        run(f"llama.cpp's {precision} quantization", python, WORKER, "quantize", source, partial, precision)
        partial.rename(out)
    return out


LLAMACPP = PeerTool(
    key="llamacpp",
    column="llama.cpp",
    packages=("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "gguf", "numpy"),
    environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    worker=WORKER,
    counterpart={"w8a8": "Q8_0", "w8a16": "Q8_0", "w4a16": "Q4_0"},
    wanted=WANTED,
    model=model,
)

if __name__ == "__main__":
    versus(LLAMACPP, __doc__, default_ours="w8a8,w4a16")
