"""The artifact directory: the contract between export and runtime.

    manifest.json     this module's `Manifest`: dimensions, KV contract, tensor names, sha256 of every file
    model.onnx        graph for ONNX Runtime; weights.bin holds its tensors
    model.native.onnx graph for the native operators of runtime/native/, with the same weights
    model.trt.onnx    graph in standard ONNX, opset 24; model.trt-plain.onnx in opset 21: in weights.bin what they share
                      with model.onnx, in weights.trt.bin the rest
    tokenizer.json  tokenizer_config.json  chat_template.jinja  generation_config.json
    receipt.json      what the exported model was compared with, and how close it is
    choice.json       where the precision was chosen by measurement: the table it was chosen from
    engines/          TensorRT engines built from it later, and listed in the manifest then: see plans_of.py

Nothing is opened that the manifest does not list with its hash. Reading only; `export/artifact/writer.py` writes them.
Nothing here loads a model.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from msgspec import Meta

from runtime.artifact.json_shape import parse_json, read_json, shaped
from runtime.artifact.known_hashes import known_sha256_of
from runtime.artifact.onnx_files import external_files
from runtime.artifact.shapes import read_receipt
from runtime.errors import InvalidArtifact
from runtime.machine.sizes import item_bytes, kv_bytes_per_token

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
RECEIPT = "receipt.json"
WEIGHTS = "weights.bin"
TRT_WEIGHTS = "weights.trt.bin"
ORT_MODEL = "model.onnx"
CHOICE = "choice.json"
DIALECT_FILES = {
    "ort": ORT_MODEL,
    "native": "model.native.onnx",
    "trt": "model.trt.onnx",
    "trt-plain": "model.trt-plain.onnx",
}
DIALECT_NAMES = {"ort": "ort", "native": "native", "standard": "trt", "standard-21": "trt-plain"}
"""Names for people, and the key of each in manifests and receipts, which keep the names of their first reader."""
CALIBRATION = "calibration.json"
CALIBRATION_ARRAYS = "calibration.npz"

Size = Annotated[int, Meta(ge=1, lt=2**31)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TensorName = Annotated[str, Meta(pattern=r"^[^{}]*\{layer\}[^{}]*\{kv\}[^{}]*\Z")]
"""A name with one place for the layer's number and one for `k` or `v`: nothing else that `str.format` would act on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """Sizes of the decoder, in the names of Hugging Face's config.json."""

    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_layers: Annotated[int, Meta(ge=1, le=100_000)]
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    vocab_size: Size
    max_len: Size
    """Longest sequence, prompt and answer together, that the rotary tables cover."""
    attention_layers: tuple[Annotated[int, Meta(ge=0)], ...] | None = None
    """The layers that have K and V, if not all of them do."""

    @property
    def kv_layers(self) -> Sequence[int]:
        """The layers that have K and V."""
        return range(self.num_layers) if self.attention_layers is None else self.attention_layers

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V that one token takes over all layers. InvalidSetting for an unknown dtype."""
        return kv_bytes_per_token(
            num_layers=len(self.kv_layers), num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, dtype=dtype
        )


class CacheNames(NamedTuple):
    """A graph's names of one cache tensor, as input and as output."""

    past: str
    present: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvContract:
    """How the cache tensors look: per layer and for k and v, `[B, num_kv_heads, capacity, head_dim]` of `dtype`.

    The caller keeps past_len + S <= capacity for every row of a run, S being the padded chunk.
    """

    dtype: Annotated[str, Meta(pattern=r"^(float32|float16|bfloat16|int8)\Z")]
    scales: str | None = None
    """How fine the scales of an int8 cache are: "per channel". The graph holds them; None for floats."""
    layout: str = "B,kv_heads,capacity,head_dim"
    past_name: TensorName = "past.{layer}.{kv}"
    present_name: TensorName = "present.{layer}.{kv}"

    def cache_names(self, layers: Iterable[int]) -> list[CacheNames]:
        """The names of every cache tensor of these layers, K before V."""
        return [
            CacheNames(self.past_name.format(layer=layer, kv=kv), self.present_name.format(layer=layer, kv=kv))
            for layer in layers
            for kv in "kv"
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """What a recurrent layer remembers of a slot's tokens, in every dialect: float32 `[B, *shape]`, written in place.

    It cannot be cut back to fewer tokens. A graph reads it as zero in a row without earlier tokens.
    """

    past: str
    present: str
    shape: tuple[Size, ...]

    @property
    def slot_bytes(self) -> int:
        return math.prod(self.shape) * item_bytes("float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Another precision of the same model: bytes of its weights, and the type of its KV cache."""

    weights: Annotated[int, Meta(ge=0)]
    kv: Annotated[str, Meta(pattern=r"^(float32|float16|bfloat16|int8)\Z")]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file's size in bytes and its sha256 in hex."""

    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know before it opens the model."""

    schema_version: int
    name: str
    source: str
    """What the user called the checkpoint: hub id, directory or file name; no path."""
    precision: str
    dims: ModelDims
    kv: KvContract
    dialects: Mapping[str, str]
    """Dialect (`ort`, `native`, `trt`, `trt-plain`) to the file that holds its graph; `files` has its hash."""
    is_tied: bool
    """Whether embedding and LM head are one matrix, stored once."""
    eos_ids: tuple[TokenId, ...]
    bos_id: TokenId | None
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]
    step_weight_bytes: Annotated[int, Meta(ge=0)] | None = None
    """Bytes of weights that every run reads whole; None in artifacts written before it was counted."""
    num_parameters: Annotated[int, Meta(ge=0)] | None = None
    """Weights of the matrices, those of a tied embedding once; None in artifacts written before they were counted."""
    num_active: Annotated[int, Meta(ge=0)] | None = None
    """Of these, what a token is multiplied with, on average: of experts the chosen ones, and the LM head."""
    trt_kv: KvContract | None = None
    """The TensorRT dialects' cache, whose dtype is their compute type; None where there is no such dialect."""
    native_kv: KvContract | None = None
    """The `native` dialect's cache; None where there is no such dialect."""
    states: tuple[StateTensor, ...] = ()
    """What slots hold beside K and V."""
    commit: str | None = None
    """Of the hub, which `source` stood at when it was exported; None for what has none."""
    origin: str | None = None
    """A hash of where a local checkpoint lay, which tells two of the same name apart; None for what is no path."""
    estimates: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """What other precisions would take, by kind of graph ("ort", "trt") and precision. Empty in older artifacts."""
    engines: Mapping[str, FileEntry] = field(default_factory=dict)
    """Descriptions of the TensorRT engines built since, and timing caches, by their names in `engines/`."""

    def kv_of(self, dialect: str) -> KvContract:
        """How one dialect's cache tensors look."""
        own = self.native_kv if dialect == "native" else None if dialect == "ort" else self.trt_kv
        return own or self.kv

    @property
    def state_bytes(self) -> int:
        """Bytes of a slot's states, however many tokens it holds."""
        return sum(state.slot_bytes for state in self.states)

    @property
    def is_exact(self) -> bool:
        """Whether the `ort` graph computes and remembers in float32 throughout."""
        return self.precision == "fp32" and self.kv.dtype == "float32"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Parse and check; InvalidArtifact names the first field that is wrong."""
        return cls.from_raw(parse_json(text, where), where)

    @classmethod
    def from_raw(cls, raw: Any, where: str) -> "Manifest":
        """The same of JSON that is parsed already."""
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise InvalidArtifact(
                f"{where} has schema version {version!r}, this release reads {SCHEMA_VERSION}; export the model again"
            )
        manifest = shaped(raw, cls, where)
        _check_fields(manifest, where)
        return manifest


WITHOUT_CUTS = (
    "states follow every token and cannot be cut back to fewer: no speculation; a prompt is reused up to where runs of "
    "an earlier one ended"
)
"""What is switched off, or restricted, for a model with states."""


def kind_of(dialect: str) -> str:
    """`ort` or `trt`: graphs of one kind store weights and cache alike, and have the same calibrated layers."""
    return "trt" if dialect.startswith("trt") else "ort"


def dialect_name(dialect: str) -> str:
    """The name for people of a manifest's dialect: `standard` for `trt`, `standard-21` for `trt-plain`."""
    return next((name for name, key in DIALECT_NAMES.items() if key == dialect), dialect)


def described(manifest: Manifest) -> str:
    """The precision in a word or two: `w8a16`, or `w8a16, int8 KV cache`."""
    return f"{manifest.precision}, int8 KV cache" if manifest.kv.dtype == "int8" else manifest.precision


def _check_fields(manifest: Manifest, where: str) -> None:
    """What a field's type alone does not say."""
    if not manifest.dialects or (unknown := set(manifest.dialects) - set(DIALECT_FILES)):
        named = ", ".join(sorted(map(repr, unknown))) if manifest.dialects else "none"
        raise InvalidArtifact(f"{where} is malformed: dialects are {named}, known are {', '.join(DIALECT_FILES)}")
    dims = manifest.dims
    if outside := [token_id for token_id in manifest.eos_ids if token_id >= dims.vocab_size]:
        raise InvalidArtifact(
            f"{where} is malformed: end-of-text id {outside[0]} is outside the vocabulary of {dims.vocab_size:,}"
        )
    if dims.num_heads % dims.num_kv_heads:
        raise InvalidArtifact(
            f"{where} is malformed: {dims.num_heads} heads cannot share {dims.num_kv_heads} key-value heads"
        )
    if manifest.dims.attention_layers == () or any(layer >= dims.num_layers for layer in dims.kv_layers):
        raise InvalidArtifact(
            f"{where} is malformed: attention_layers are {list(dims.kv_layers)}, and there are {dims.num_layers} layers"
        )
    for name in (*manifest.files, *manifest.engines):
        if os.sep in name or "\0" in name or name in ("", ".", ".."):
            raise InvalidArtifact(f"{where} names a file outside the artifact: {name!r}")


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact whose files are all there and are what the manifest says."""

    path: Path
    manifest: Manifest
    receipt: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every gate of the receipt was passed."""
        return self.receipt.get("passed") is True

    @property
    def weight_bytes(self) -> int:
        """Size of the weight file."""
        return self.manifest.files[WEIGHTS].size if WEIGHTS in self.manifest.files else 0

    def kv_bytes_per_token(self, dialect: str = "ort") -> int:
        """Bytes of a dialect's KV cache that a token takes."""
        return self.manifest.dims.kv_bytes_per_token(self.manifest.kv_of(dialect).dtype)

    def listed(self, name: str) -> Path | None:
        """Path of a file that the manifest lists, else None: one that lies there all the same has no hash and is not
        used, with a warning."""
        if name in self.manifest.files:
            return self.path / name
        if (self.path / name).exists():
            log.warning("%s is not used: %s does not list it", self.path / name, MANIFEST)
        return None

    def graph_file(self, dialect: str) -> Path:
        """Path of the graph of one dialect; InvalidArtifact if the artifact has no such dialect."""
        if dialect not in self.manifest.dialects:
            raise InvalidArtifact(f"{self.path} has no {dialect} graph, only {', '.join(self.manifest.dialects)}")
        return self.path / self.manifest.dialects[dialect]

    def model_file(self, dialect: str = "ort") -> Path:
        """The same of a graph that is to be loaded.

        InvalidArtifact as well if the graph reads weights from a file that the manifest does not list.
        """
        file = self.graph_file(dialect)
        try:
            read = external_files(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidArtifact(f"cannot load {file}: {error}; export the model again") from error
        if unlisted := sorted(read - set(self.manifest.files)):
            raise InvalidArtifact(
                f"{file} reads weights from {unlisted[0]!r}, which {MANIFEST} does not list; export the model again"
            )
        return file


def open_artifact(path: str | Path, *, allow_failed: bool = False, check_hashes: bool = True) -> Artifact:
    """Read the manifest, check that every file is there, whole and unchanged, and that the receipt passed.

    `allow_failed` opens an artifact whose receipt failed; `check_hashes=False` compares sizes only.
    Raises InvalidArtifact with what is wrong and what to do.
    """
    path = Path(path)
    manifest_file = path / MANIFEST
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        _check_file(path, name, entry, check_hashes=check_hashes)
    for needed in (*manifest.dialects.values(), RECEIPT):
        if needed not in manifest.files:
            raise InvalidArtifact(f"{manifest_file} does not list {needed}; export the model again")
    artifact = Artifact(path, manifest, read_receipt(path / RECEIPT))
    if not artifact.passed and not allow_failed:
        raise InvalidArtifact(
            f"{path}: the receipt says the model failed its accuracy gate; "
            f"see `headrace inspect {path}`, or pass --allow-failed to use it all the same"
        )
    return artifact


def read_manifest(path: Path) -> Manifest:
    """The manifest of an artifact, checked by itself; the files it lists are not looked at. InvalidArtifact."""
    file = path / MANIFEST
    try:
        if not path.is_dir():
            raise InvalidArtifact(
                f"{path} is not a directory; `headrace export MODEL --out {path}` writes an artifact there"
            )
        if not file.is_file():
            raise InvalidArtifact(f"{path} has no {MANIFEST}: not an artifact, or half of one; export it again")
    except OSError as error:
        raise InvalidArtifact(f"{path} cannot be read: {error.strerror or error}") from error
    return Manifest.from_raw(read_json(file), str(file))


def _check_file(root: Path, name: str, entry: FileEntry, *, check_hashes: bool) -> None:
    file = root / name
    try:
        if not file.is_file():
            raise InvalidArtifact(f"{file} is missing; export the model again")
        size = file.stat().st_size
        found = known_sha256_of(file) if check_hashes and size == entry.size else entry.sha256
    except OSError as error:
        raise InvalidArtifact(f"{file} cannot be read: {error.strerror or error}") from error
    if size != entry.size:
        raise InvalidArtifact(f"{file} has {size:,} bytes, the manifest says {entry.size:,}; export the model again")
    if found != entry.sha256:
        raise InvalidArtifact(f"{file} has changed: sha256 {found[:12]}..., the manifest says {entry.sha256[:12]}...")
