"""A checkpoint with LoRA adapters merged into its weights, in float32.

Several adapters add up, each with its factor: PEFT's `add_weighted_adapter(combination_type="cat")`. What an adapter
replaces whole, or scales (DoRA), has no sum: such an adapter stands alone, with the factor 1.
"""

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.config_fields import shown_names
from export.checkpoint.lora.adapter import Adapter, Delta, Lora, open_adapter
from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.safetensors_dir import read_floats
from export.checkpoint.safetensors_files import Place
from export.checkpoint.view import CheckpointView
from runtime.errors import InvalidCheckpoint, UnsupportedModel


class MergedCheckpoint(CheckpointView):
    """A checkpoint over its base model. The base's integers, if it has some, become floats: the sum is not on their
    grid."""

    def __init__(self, base: Checkpoint, loras: Sequence[Lora]) -> None:
        """Open the adapters; reads no weights.

        InvalidCheckpoint, naming the tensor, for one that the base does not have or has in another shape.
        UnsupportedModel for adapters that cannot be added up. Also the errors of `open_adapter`.
        """
        super().__init__(base)
        self._adapters = [open_adapter(lora) for lora in loras]
        self._deltas: dict[str, list[tuple[float, Delta]]] = {}
        self._replaced: dict[str, Place] = {}
        for adapter in self._adapters:
            self._check_alone(adapter)
            for module, delta in adapter.deltas.items():
                name = self._known(adapter, f"{module}.weight", delta.shape)
                self._deltas.setdefault(name, []).append((adapter.lora.weight, delta))
            for name, place in adapter.replaced.items():
                self._replaced[self._known(adapter, name, place.info.shape)] = place
        infos = {name: TensorInfo(info.shape, "F32") for name, info in base.tensors.items() if self._is_changed(name)}
        self._tensors = MappingProxyType({**base.tensors, **infos})

    @property
    def source(self) -> str:
        return "+".join([self._base.source, *(adapter.lora.name for adapter in self._adapters)])

    @property
    def tensors(self) -> MappingProxyType[str, TensorInfo]:
        return self._tensors

    @property
    def stored_bits(self) -> None:
        return None

    @property
    def has_input_scales(self) -> bool:
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        if self._base.stored_bits is None:
            return self._base.notes
        return (*self._base.notes, f"{self.source}: the base model's {self._base.stored_bits}-bit integers become "
                "floats, because the adapter's sums are none of them")  # fmt: skip

    @property
    def conversion(self) -> str:
        return "merged with adapters"

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Each adapter's name, factor, number of changed weights and hash of its file."""
        adapters = [
            {
                "name": adapter.lora.path.resolve().name,
                "weight": adapter.lora.weight,
                "num_changed": len(adapter.deltas) + len(adapter.replaced),
                "sha256": hashlib.sha256(adapter.file.read_bytes()).hexdigest(),
            }
            for adapter in self._adapters
        ]
        return {**self._base.provenance, "adapters": adapters}

    def load(self, name: str) -> NDArray[np.float32]:
        place = self._replaced.get(name)  # beside a delta, too: of an embedding, PEFT saves both
        weight = self._base.load(name) if place is None else read_floats(place, name)
        for factor, delta in self._deltas.get(name, []):
            weight = weight + np.float32(factor) * delta.added()
            if delta.magnitude is not None:
                weight = _with_norms(weight, read_floats(delta.magnitude, f"{delta.module}.magnitude"), delta)
        return weight

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self.load(name)[start:stop] if self._is_changed(name) else self._base.load_rows(name, start, stop)

    def _is_changed(self, name: str) -> bool:
        return name in self._deltas or name in self._replaced

    def _check_alone(self, adapter: Adapter) -> None:
        """UnsupportedModel for an adapter without a sum beside others, or with a factor."""
        scales = next(
            (f"{module} has a DoRA magnitude" for module, delta in adapter.deltas.items() if delta.magnitude), None
        )
        replaces = f"it replaces {shown_names(list(adapter.replaced))}" if adapter.replaced else None
        if (reason := scales or replaces) and (len(self._adapters) > 1 or adapter.lora.weight != 1):
            raise UnsupportedModel(
                f"--lora {adapter.lora.path} can only be merged alone and with the weight 1, because {reason}"
            )

    def _known(self, adapter: Adapter, name: str, shape: tuple[int, ...]) -> str:
        """The base's name of a tensor, which may lack the model's prefix or have one more; its shape is checked."""
        names = (name, name.partition(".")[2], f"model.{name}", f"transformer.{name}")
        found = next((each for each in names if each in self._base.tensors), None)
        if found is None:
            raise InvalidCheckpoint(
                f"{adapter.file} changes {name}, and {self._base.source} has no such tensor: the adapter is another "
                "model's, or changes a tied LM head"
            )
        own = self._base.tensors[found].shape
        if own != shape:
            raise InvalidCheckpoint(
                f"{adapter.file} changes {name} of the shape {list(shape)}, and {self._base.source} has "
                f"{list(own)}: the adapter is another model's, or of one with another vocabulary"
            )
        return found


def _with_norms(weight: NDArray[np.float32], magnitude: NDArray[np.float32], delta: Delta) -> NDArray[np.float32]:
    """DoRA (arXiv 2402.09353): each output's row in the length that the magnitude says."""
    rows = weight.T if delta.transposed or delta.is_embedding else weight
    if magnitude.size != len(rows):
        raise InvalidCheckpoint(
            f"{delta.module}: lora_magnitude_vector has {magnitude.size} values for {len(rows)} rows"
        )
    scaled = rows * (magnitude.reshape(-1) / np.linalg.norm(rows, axis=1))[:, None]
    return np.asarray(scaled.T if rows is not weight else scaled, np.float32)
