"""The two references that an exported model is compared with.

numpy           this project's own decoder; needs no further package. It shares with the graph the reading of
                config.json, the rotary tables and the tensor names, so it cannot show an error in those.
transformers    shares nothing with the graph but the checkpoint's files. Needs torch, and memory for the whole
                model in float32.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig
from export.model.reference.forward import run_reference
from export.sources.open import DEFAULT_MODEL
from runtime.errors import InvalidCheckpoint, InvalidSetting
from runtime.machine.progress import progress_bar

NUMPY, TRANSFORMERS = "numpy", "transformers"
REFERENCES = (NUMPY, TRANSFORMERS)
"""Choices of --verify."""


class ReferenceLogits(Protocol):
    """The reference's logits on the sequences that it has read."""

    def logits(self, sequence_idx: int, start: int, stop: int) -> NDArray[np.float32]:
        """Logits of positions start .. stop of a sequence, float32 `[stop - start, vocab]`."""
        ...


class Reference(Protocol):
    """A model to compare with."""

    @property
    def name(self) -> str:
        """A description for the receipt."""
        ...

    def run(self, sequences: Sequence[Sequence[int]], directory: Path) -> AbstractContextManager[ReferenceLogits]:
        """Run the sequences, each alone and causal. `directory` is for temporary files."""
        ...


class NumpyReference:
    """The numpy decoder of export/model/reference/; not independent of the graph, see above."""

    name = (
        "the checkpoint in float32, computed by export/model/reference/ (numpy), which shares the reading of "
        "config.json, the description of the decoder and the rotary tables with the graph"
    )

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._config = checkpoint, config

    @contextmanager
    def run(self, sequences: Sequence[Sequence[int]], directory: Path) -> Iterator[ReferenceLogits]:
        """Holds one layer's weights at a time, and the last hidden states."""
        with progress_bar("reference", total=self._config.num_layers) as bar:
            states = run_reference(self._checkpoint, self._config, sequences, on_layer=lambda: bar.update(1))
        yield states


class TransformersReference:
    """transformers' own reading of the checkpoint, on the CPU in float32 with eager attention."""

    def __init__(self, model: str, checkpoint: Checkpoint) -> None:
        """`model` as the user gave it. InvalidSetting without transformers and torch, or for packed integer weights."""
        check_reference(TRANSFORMERS)
        import torch
        import transformers

        if (conversion := checkpoint.conversion) is not None:
            raise InvalidSetting(
                f"--verify {TRANSFORMERS}: the weights of {checkpoint.source} are {conversion}, which transformers "
                f"does not do by itself; use --verify {NUMPY}"
            )
        self.name = (
            f"the checkpoint in float32, read and computed by transformers {transformers.__version__} "
            f"(torch {torch.__version__}, eager attention)"
        )
        self._model, self._checkpoint = model, checkpoint

    @contextmanager
    def run(self, sequences: Sequence[Sequence[int]], directory: Path) -> Iterator[ReferenceLogits]:
        """Holds the whole model while it runs, then only a nameless file of logits in `directory`."""
        import torch

        with tempfile.TemporaryFile(dir=directory) as file:
            logits = _SpooledLogits(file)
            model = _load(self._model, self._checkpoint)
            with progress_bar("reference", total=len(sequences)) as bar, torch.inference_mode():
                for ids in sequences:
                    logits.add(model(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy())
                    bar.update(1)
            del model
            yield logits


class _SpooledLogits:
    """Logits of whole sequences, one behind the other in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._starts: list[int] = []
        self._vocab_size = 0

    def add(self, logits: NDArray[np.float32]) -> None:
        self._starts.append(self._file.tell())
        self._vocab_size = logits.shape[1]
        self._file.write(np.ascontiguousarray(logits, np.float32).data)

    def logits(self, sequence_idx: int, start: int, stop: int) -> NDArray[np.float32]:
        row_bytes = self._vocab_size * np.dtype(np.float32).itemsize
        self._file.seek(self._starts[sequence_idx] + start * row_bytes)
        raw = self._file.read((stop - start) * row_bytes)
        return np.frombuffer(raw, np.float32).reshape(stop - start, self._vocab_size)


def reference_named(name: str, model: str, checkpoint: Checkpoint, config: ModelConfig) -> Reference:
    """One of REFERENCES. InvalidSetting for another, or for one that is not installed."""
    check_reference(name)
    return NumpyReference(checkpoint, config) if name == NUMPY else TransformersReference(model, checkpoint)


def check_reference(name: str) -> None:
    """InvalidSetting, before anything is read, for a reference that is unknown or not installed."""
    if name not in REFERENCES:
        raise InvalidSetting(f"--verify {name} is unknown; choose from {', '.join(REFERENCES)}")
    if name == TRANSFORMERS:
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise InvalidSetting(
                f"--verify {TRANSFORMERS} needs torch and transformers ({error}): pip install 'headrace[oracle]', "
                f"or use --verify {NUMPY}"
            ) from error


def _load(model: str, checkpoint: Checkpoint) -> Any:
    """The model as transformers loads it. InvalidCheckpoint if it cannot, or leaves out or makes up a tensor."""
    import torch
    import transformers

    name, options = _location(model, checkpoint)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        loaded, account = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # transformers and its dependencies raise all kinds
        reason = " ".join(str(error).split())[:300]
        raise InvalidCheckpoint(
            f"transformers cannot load {checkpoint.source}: {type(error).__name__}: {reason}"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, account.get(what) or ())):
            raise InvalidCheckpoint(
                f"transformers finds {what.replace('_', ' ')} in {checkpoint.source}, {names[0]} and {len(names) - 1} "
                "more: it reads another model than the file holds"
            )
    return loaded.eval()


def _location(model: str, checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: directory or hub id, and where in it the weights are."""
    import transformers

    path = Path(model).expanduser()
    if model == DEFAULT_MODEL:
        from export.sources.default_model import default_model_file

        path = default_model_file()
    if path.is_file():
        whole = transformers.GgufConfig(dequantize=True)
        return str(path.parent.resolve()), {"gguf_file": path.name, "quantization_config": whole}
    options: dict[str, Any] = {"use_safetensors": True}
    if path.is_dir():
        return str(path.resolve()), options
    name, _, revision = checkpoint.source.partition("@")
    return name, {**options, "revision": checkpoint.commit or revision or "main"}
