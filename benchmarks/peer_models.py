"""The models that the comparisons run, with the same float weights for every side.

`smollm2-135m` is the default model. `qwen2.5-0.5b` has random weights of that shape, for speed alone. Everything is
made in the cache when it is first asked for; what was interrupted is begun again, because the last step renames.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.peer_process import run
from benchmarks.random_model import write_directory, write_gguf
from export.sources.default_model import default_model_file

SMOLLM2, QWEN = "smollm2-135m", "qwen2.5-0.5b"
SHAPES = (SMOLLM2, QWEN)
DEFAULT_MODEL = "smollm2-135m-instruct"
"""What `headrace export` calls it."""

_GENAI_WORKER = Path(__file__).with_name("genai_worker.py")
_LLAMACPP_WORKER = Path(__file__).with_name("llamacpp_worker.py")


def made(out: Path, make: Callable[[Path], object]) -> Path:
    """`out`, made by `make` under another name if it is not there."""
    if not out.exists():
        partial = out.with_name(f"{out.name}.partial")
        make(partial)
        partial.rename(out)
    return out


def checkpoint_of(shape: str, cache: Path) -> str:
    """What our own export reads."""
    return DEFAULT_MODEL if shape == SMOLLM2 else str(_random_directory(cache))


def directory_of(shape: str, cache: Path, python: Path) -> Path:
    """A Hugging Face directory in float32; `python` has transformers and torch, which read the default model's GGUF."""
    if shape == QWEN:
        return _random_directory(cache)
    command = (python, _GENAI_WORKER, "save", default_model_file())
    return made(cache / f"hf-{shape}", lambda out: run("saving the default model in float32", *command, out))


def float_gguf_of(shape: str, cache: Path, python: Path) -> Path:
    """A GGUF file in float32; `python` has gguf, for the default model."""
    out = cache / f"llamacpp-{shape}-F32.gguf"
    if shape == QWEN:
        return made(out, lambda partial: write_gguf(_random_directory(cache), partial))
    command = (python, _LLAMACPP_WORKER, "float", default_model_file())
    return made(out, lambda partial: run("writing the default model in float32 for llama.cpp", *command, partial))


def quantized_gguf_of(shape: str, cache: Path, python: Path, file_type: str) -> Path:
    """The model in one of llama.cpp's types, by its own quantization; `python` has llama-cpp-python."""
    source = float_gguf_of(shape, cache, python)
    command = (python, _LLAMACPP_WORKER, "quantize", source)
    return made(
        cache / f"llamacpp-{shape}-{file_type}.gguf",
        lambda partial: run(f"llama.cpp's {file_type} quantization", *command, partial, file_type),
    )


def _random_directory(cache: Path) -> Path:
    return made(cache / f"hf-{QWEN}", write_directory)
