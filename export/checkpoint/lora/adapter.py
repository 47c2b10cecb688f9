"""Reads a LoRA adapter as the PEFT library saves it: adapter_config.json and adapter_model.safetensors.

Knows PEFT's names and settings. A setting that changes what a merged weight is, and that is not read here, is refused
by name.

    layer      lora_A [r, K], lora_B [N, r]     weight + scaling * B A
    embedding  lora_embedding_A [r, V], lora_embedding_B [K, r]    weight + scaling * (B A) transposed
    DoRA       lora_magnitude_vector [N]        magnitude * (weight + scaling * B A) / its norm of each row
    scaling    alpha / r, or alpha / sqrt(r) with use_rslora
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.config_fields import shown
from export.checkpoint.safetensors_dir import read_floats
from export.checkpoint.safetensors_files import Place, plain_name, read_header
from export.checkpoint.texts.reading import read_json_object
from runtime.errors import InvalidCheckpoint, InvalidSetting, UnsupportedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
)
# How it was trained, and which modules it has: the tensors say that.
_NO_EFFECT = frozenset(
    {
        "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
        "exclude_modules", "modules_to_save", "bias", "lora_dropout", "layers_to_transform", "layers_pattern",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core",
        "runtime_config", "peft_version", "ensure_weight_tying", "qalora_group_size", "init_lora_weights",
    }
)  # fmt: skip
_MOVED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "mica")
"""Initializations that also change the base model, so that the adapter belongs to a base that is not the original."""

_PARTS = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
}
_TENSOR = re.compile(rf"(.+)\.({'|'.join(_PARTS)})(?:\.(?!weight)[^.]+)?(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter to merge: its directory, and the factor of what it adds."""

    path: Path
    weight: float = 1.0

    @property
    def name(self) -> str:
        """For the artifact's source: the directory's name, with the factor if it is not 1."""
        name = self.path.resolve().name
        return name if self.weight == 1 else f"{name}*{self.weight:g}"


def parse_lora(text: str) -> Lora:
    """`DIR` or `DIR=WEIGHT`. InvalidSetting for a weight that is not a finite number."""
    directory, equals, weight = text.rpartition("=")
    if not equals or Path(text).expanduser().exists():
        return Lora(Path(text).expanduser())
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise InvalidSetting(f"--lora {text!r} is not DIR or DIR=WEIGHT, like style=0.5")
    return Lora(Path(directory).expanduser(), factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What an adapter does to one weight. Matrices are read when they are asked for.

    a `[r, inputs]`, b `[outputs, r]` and magnitude `[outputs]`: places in the file
    is_embedding: the weight is `[inputs, outputs]`; transposed: GPT-2's Conv1D is, too
    """

    module: str
    scaling: float
    a: Place
    b: Place
    magnitude: Place | None
    is_embedding: bool
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        shape = self.b.info.shape[0], self.a.info.shape[1]
        return shape[::-1] if self.is_embedding or self.transposed else shape

    def added(self) -> NDArray[np.float32]:
        """scaling * B A in the weight's own shape."""
        a, b = (read_floats(place, f"{self.module}.lora_{part}") for place, part in ((self.a, "A"), (self.b, "B")))
        product = np.asarray(b @ a, np.float32) * np.float32(self.scaling)
        return product.T if self.is_embedding or self.transposed else product


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter, opened: no matrix is read yet.

    deltas: by module; replaced: whole tensors that take the place of the model's (modules_to_save, trained biases)
    """

    lora: Lora
    deltas: Mapping[str, Delta]
    replaced: Mapping[str, Place]
    config: Mapping[str, Any] = field(repr=False)

    @property
    def file(self) -> Path:
        return self.lora.path / WEIGHTS


def open_adapter(lora: Lora) -> Adapter:
    """Open one adapter. InvalidCheckpoint for files that are missing or do not fit each other, UnsupportedModel for a
    setting that cannot be merged."""
    path = lora.path
    if not path.is_dir():
        raise InvalidCheckpoint(f"--lora {path} is not a directory; give one with {CONFIG} and {WEIGHTS}")
    config = read_json_object(path / CONFIG)
    _check(config, path)
    if not (path / WEIGHTS).is_file():
        pickled = "; *.bin is a pickle, which is never loaded" if any(path.glob("*.bin")) else ""
        raise InvalidCheckpoint(f"{path} has no {WEIGHTS}{pickled}: save the adapter with save_pretrained")
    parts: dict[str, dict[str, Place]] = {}
    replaced: dict[str, Place] = {}
    embeddings = set()
    for stored, place in read_header(path / WEIGHTS).items():
        name = plain_name(stored.removeprefix("base_model.model."))
        found = _TENSOR.fullmatch(name)
        if found is None:
            replaced[re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.)|\.base_layer(?=\.)", "", name)] = place
            continue
        parts.setdefault(found[1], {})[_PARTS[found[2]]] = place
        if "embedding" in found[2]:
            embeddings.add(found[1])
    if odd := next((name for name in replaced if ".lora_" in name or ".original_module." in name), None):
        raise UnsupportedModel(f"{path / WEIGHTS} holds {odd!r}, which cannot be merged")
    deltas = {
        module: _delta(path, module, places, config, is_embedding=module in embeddings)
        for module, places in parts.items()
    }
    if not deltas and not replaced:
        raise InvalidCheckpoint(f"{path / WEIGHTS} holds no tensors")
    return Adapter(lora=lora, deltas=deltas, replaced=replaced, config=config)


def _check(config: Mapping[str, Any], path: Path) -> None:
    where = path / CONFIG
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(f"{where}: peft_type {shown(config.get('peft_type'))} is not supported; supported: LORA")
    for name, value in config.items():
        if name not in _READ | _NO_EFFECT and value is not None and value is not False and value not in ("", [], {}):
            raise UnsupportedModel(f"{where}: {name} = {shown(value)} cannot be merged; merge it with PEFT")
    kind = str(config.get("init_lora_weights"))
    if kind.startswith(_MOVED_BASE):
        raise UnsupportedModel(
            f"{where}: init_lora_weights = {kind!r} changed the base model too; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it with PEFT"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        found = config.get(name) or {}
        if not isinstance(found, dict) or not all(_is_number(value) for value in found.values()):
            raise InvalidCheckpoint(f"{where}: {name} must give a number to each module, got {shown(found)}")


def _delta(
    path: Path, module: str, places: Mapping[str, Place], config: Mapping[str, Any], *, is_embedding: bool
) -> Delta:
    """One module's, checked."""
    where = path / WEIGHTS
    if "a" not in places or "b" not in places:
        raise InvalidCheckpoint(f"{where}: {module} has no lora_{'B' if 'a' in places else 'A'}; it is not whole")
    a, b = places["a"].info.shape, places["b"].info.shape
    rank, alpha = (
        _setting(config, path, *names, module) for names in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] != rank:
        raise InvalidCheckpoint(
            f"{where}: {module} has lora_A {list(a)} and lora_B {list(b)}, and {CONFIG} means the rank {rank:g}"
        )
    is_dora = config.get("use_dora") is True
    if is_dora != ("magnitude" in places):
        raise InvalidCheckpoint(
            f"{where}: {module} has {'no' if is_dora else 'a'} lora_magnitude_vector, and {CONFIG} says use_dora "
            f"{is_dora}"
        )
    return Delta(
        module=module,
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        a=places["a"],
        b=places["b"],
        magnitude=places.get("magnitude"),
        is_embedding=is_embedding,
        transposed=config.get("fan_in_fan_out") is True and not is_embedding,
    )


def _setting(config: Mapping[str, Any], path: Path, name: str, patterns: str, module: str) -> float:
    """A module's own rank or alpha, or the adapter's. As in PEFT, a key means the end of a module's name."""
    for key, own in (config.get(patterns) or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return float(own)
        except re.error as error:
            raise InvalidCheckpoint(f"{path / CONFIG}: {patterns} has {shown(key)}: {error}") from error
    value: Any = config.get(name)
    if not _is_number(value) or value <= 0:
        raise InvalidCheckpoint(f"{path / CONFIG}: {name} must be a positive number, got {shown(value)}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
