"""Headrace against llama.cpp on the same weights, in turn (A B A B).

usage: python -m benchmarks.versus_llamacpp [--ours LIST] [--shape qwen2.5-0.5b] [--device cpu] [--cases LIST]

w8a8 and w8a16 meet Q8_0, w4a16 Q4_0, both made by llama.cpp's own quantization from the default model in float32.
llama-cpp-python is built from source for this machine's instructions, in a virtual environment in --cache (on first
use; needs a C++ compiler; about 15 minutes on two cores). llama.cpp gets one thread a core, and for every case the
fastest of flash attention on and off and of one KV cache and one a sequence; its KV cache is float16, as it is unless
told. Five minutes an artifact once everything is there. Prints a table of medians and ratios, then one JSON line.
"""

from pathlib import Path

from benchmarks.peer import PeerTool, versus
from benchmarks.peer_models import quantized_gguf_of

WORKER = Path(__file__).with_name("llamacpp_worker.py")
WANTED = {
    ("w8a8", "prefill 512"): 2.7,
    ("w8a8", "decode x32"): 2.5,
    ("w8a8", "decode x1"): 1.1,
    ("w8a16", "decode x1"): 1.1,
    ("w4a16", "decode x1"): 1.1,
}


LLAMACPP = PeerTool(
    key="llamacpp",
    column="llama.cpp",
    packages=("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "gguf", "numpy"),
    environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    worker=WORKER,
    counterpart={"w8a8": "Q8_0", "w8a16": "Q8_0", "w4a16": "Q4_0"},
    wanted=WANTED,
    model=lambda python, cache, shape, precision: quantized_gguf_of(shape, cache, python, precision),
)

if __name__ == "__main__":
    versus(LLAMACPP, __doc__, default_ours="w8a8,w4a16")
