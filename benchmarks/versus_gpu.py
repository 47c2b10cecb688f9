"""Headrace on a GPU against other servers' engines: 32 greedy requests at once, and one alone.

    make bench-gpu ARTIFACT=artifacts/mine
    python -m benchmarks.versus_gpu ARTIFACT --checkpoint DIR --gguf FILE

Each row runs if what it needs is here, else it says what is missing. vLLM reads the checkpoint (--checkpoint) and
llama.cpp a GGUF file (--gguf) of the same model; TensorRT-Edge-LLM has no package that pip could install: build it from
its repository and run its own benchmark with these lengths. Prints a table, then one JSON line.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.backends.environment import CudaDevice, Environment
from runtime.core import SamplingParams
from runtime.errors import HeadraceError
from runtime.settings import EngineSettings
from runtime.text_model import open_text_model

PROMPT, NEW = 32, 128
BATCHES = (1, 32)

Figures = dict[int, float]


class CannotRunError(Exception):
    """A row that cannot be measured here; the message says what is missing."""


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Random token ids: what they are does not change the speed."""
    rng = np.random.default_rng(0)
    return [row.tolist() for row in rng.integers(100, vocab_size, (count, PROMPT))]


def measure_headrace(artifact: str, device: str) -> Figures:
    """Tokens a second by batch, through the engine and its thread."""
    settings = EngineSettings(
        device=device, max_batch=max(BATCHES), max_len=PROMPT + NEW if device != "tensorrt" else None
    )
    try:
        model = open_text_model(artifact, settings)
    except HeadraceError as error:
        raise CannotRunError(str(error)) from error
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)

    def run(count: int) -> None:
        for generation in [model.generate(ids, params) for ids in prompts(count, model.vocab_size)]:
            for _ in generation:
                pass

    try:
        model.start()
        return _rates(run)
    finally:
        model.close()


def measure_vllm(checkpoint: str | None) -> Figures:
    """The same through vLLM's offline engine."""
    try:
        import vllm
    except ImportError as error:
        raise CannotRunError("vllm is not installed: pip install vllm") from error
    if checkpoint is None:
        raise CannotRunError("give the model's directory with --checkpoint")
    model = vllm.LLM(model=checkpoint, max_model_len=PROMPT + NEW, enable_prefix_caching=False)
    params = vllm.SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    vocab_size = model.get_tokenizer().vocab_size

    def run(count: int) -> None:
        model.generate([{"prompt_token_ids": ids} for ids in prompts(count, vocab_size)], params, use_tqdm=False)

    return _rates(run)


def measure_llama_cpp(gguf: str | None) -> Figures:
    """One request after another: the Python binding does not batch; only the row for one request compares."""
    try:
        import llama_cpp
    except ImportError as error:
        raise CannotRunError("llama-cpp-python is not installed: CMAKE_ARGS=-DGGML_CUDA=on pip install it") from error
    if not llama_cpp.llama_supports_gpu_offload():
        raise CannotRunError("this llama-cpp-python was built without CUDA: CMAKE_ARGS=-DGGML_CUDA=on pip install it")
    if gguf is None:
        raise CannotRunError("give a GGUF file of the model with --gguf")
    model = llama_cpp.Llama(model_path=gguf, n_gpu_layers=-1, n_ctx=PROMPT + NEW, verbose=False)

    def run(count: int) -> None:
        for ids in prompts(count, model.n_vocab()):
            for index, _ in enumerate(model.generate(ids, temp=0.0, reset=True)):
                if index + 1 == NEW:
                    break

    return _rates(run, batches=(1,))


def measure_edge_llm() -> Figures:
    """Never here: there is nothing to import."""
    raise CannotRunError("TensorRT-Edge-LLM has no package to install: build it and run its own benchmark")


def _rates(run: Callable[[int], None], batches: tuple[int, ...] = BATCHES) -> Figures:
    """Tokens a second, the best of three runs behind one that warms up."""
    found = {}
    for count in batches:
        run(count)
        times = []
        for _ in range(3):
            started_s = time.perf_counter()
            run(count)
            times.append(time.perf_counter() - started_s)
        found[count] = count * NEW / min(times)
    return found


def machine() -> dict[str, Any]:
    """GPU, driver, clocks and power, as far as they can be asked for."""
    env = Environment()
    device = env.cuda_device
    found: dict[str, Any] = {"gpu": device.name if isinstance(device, CudaDevice) else None, "driver": env.driver}
    for tool, arguments in (
        ("nvidia-smi", ["--query-gpu=clocks.sm,clocks.mem,power.limit,power.draw", "--format=csv,noheader"]),
        ("nvpmodel", ["-q"]),
    ):
        if shutil.which(tool):
            done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=20, check=False)
            found[tool] = done.stdout.strip()
    return found


def main() -> int:
    """Measure what can be measured; 0 also if that is nothing, which is said."""
    parser = argparse.ArgumentParser(description="Headrace on a GPU against other engines.")
    parser.add_argument("artifact", help="with an engine, and a graph in fp16 for ORT CUDA")
    parser.add_argument("--checkpoint", help="the model's directory, for vLLM")
    parser.add_argument("--gguf", help="a GGUF file of the model, for llama.cpp")
    args = parser.parse_args()
    rows: dict[str, Callable[[], Figures]] = {
        "Headrace, TensorRT": lambda: measure_headrace(args.artifact, "tensorrt"),
        "Headrace, ORT CUDA": lambda: measure_headrace(args.artifact, "cuda"),
        "vLLM": lambda: measure_vllm(args.checkpoint),
        "llama.cpp": lambda: measure_llama_cpp(args.gguf),
        "TensorRT-Edge-LLM": measure_edge_llm,
    }
    where = machine()
    print(f"{where['gpu'] or 'NO GPU HERE: nothing of Headrace can be measured'}; {PROMPT} + {NEW} tokens, greedy")
    found: dict[str, Figures | str] = {}
    for name, measure in rows.items():
        try:
            found[name] = measure()
        except CannotRunError as error:
            found[name] = f"not run: {error}"
        figures = found[name]
        text = (
            figures
            if isinstance(figures, str)
            else ", ".join(f"{b} at once {r:,.0f} tokens/s" for b, r in figures.items())
        )
        print(f"{name:20}{text}")
    print(json.dumps({"machine": where, "figures": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
