"""The artifact directory: the contract between export and runtime.

    manifest.json     this module's `Manifest`: dimensions, KV contract, tensor names, sha256 of every file
    model.onnx        graph for ONNX Runtime; weights.bin holds its tensors
    model.trt.onnx    graph for TensorRT, model.trt-plain.onnx for releases before 10.15: in weights.bin what they share
                      with model.onnx, in weights.trt.bin the rest
    tokenizer.json  tokenizer_config.json  chat_template.jinja  generation_config.json
    receipt.json      what the exported model was compared with, and how close it is
    choice.json       where the precision was chosen by measurement: the table it was chosen from
    engines/          TensorRT engines built from it later, not part of the manifest: see engine_files.py

Reading only; `export/writer.py` writes them. Nothing here loads a model.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runtime.errors import InvalidArtifact
from runtime.kv_budget import kv_bytes_per_token

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
RECEIPT = "receipt.json"
WEIGHTS = "weights.bin"
TRT_WEIGHTS = "weights.trt.bin"
ORT_MODEL = "model.onnx"
CHOICE = "choice.json"
DIALECT_FILES = {"ort": ORT_MODEL, "trt": "model.trt.onnx", "trt-plain": "model.trt-plain.onnx"}
PRECISIONS = ("fp32", "fp16", "bf16", "w8a16", "w4a16", "w8a8")
CALIBRATION = "calibration.json"
CALIBRATION_ARRAYS = "calibration.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """Sizes of the decoder, in the names of Hugging Face's config.json."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_len: int
    """Longest sequence, prompt and answer together, that the rotary tables cover."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvContract:
    """How the cache tensors look: per layer and for k and v, `[B, num_kv_heads, capacity, head_dim]` of `dtype`.

    The caller keeps past_len + S <= capacity for every row of a run, S being the padded chunk.
    """

    dtype: str
    scales: str | None = None
    """How fine the scales of an int8 cache are: "per channel". The graph holds them; None for floats."""
    layout: str = "B,kv_heads,capacity,head_dim"
    past_name: str = "past.{layer}.{kv}"
    present_name: str = "present.{layer}.{kv}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file's size in bytes and its sha256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know before it opens the model."""

    schema_version: int
    name: str
    source: str
    precision: str
    dims: ModelDims
    kv: KvContract
    dialects: Mapping[str, str]
    """Dialect (`ort`, `trt`, `trt-plain`) to the file that holds its graph; `files` has its hash."""
    is_tied: bool
    """Whether embedding and LM head are one matrix, stored once."""
    eos_ids: tuple[int, ...]
    bos_id: int | None
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]
    step_weight_bytes: int | None = None
    """Bytes of weights that every run reads whole; None in artifacts written before it was counted."""
    trt_kv: KvContract | None = None
    """The TensorRT dialects' cache, whose dtype is their compute type; None where there is no such dialect."""

    def kv_of(self, dialect: str) -> KvContract:
        """How one dialect's cache tensors look."""
        return self.kv if dialect == "ort" or self.trt_kv is None else self.trt_kv

    @property
    def is_exact(self) -> bool:
        """Whether the `ort` graph computes and remembers in float32 throughout."""
        return self.precision == "fp32" and self.kv.dtype == "float32"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Parse and check; InvalidArtifact names the first field that is wrong."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise InvalidArtifact(f"{where} is not JSON: {error}") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise InvalidArtifact(
                f"{where} has schema version {version!r}, this release reads {SCHEMA_VERSION}; export the model again"
            )
        try:
            trt_kv = raw.pop("trt_kv", None)
            files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
            manifest = cls(
                dims=ModelDims(**raw.pop("dims")),
                kv=KvContract(**raw.pop("kv")),
                trt_kv=trt_kv and KvContract(**trt_kv),
                eos_ids=tuple(raw.pop("eos_ids")),
                files=files,
                **raw,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidArtifact(f"{where} is malformed: {error}") from error
        _check_types(manifest.dims, where)
        return manifest


def described(manifest: Manifest) -> str:
    """The precision in a word or two: `w8a16`, or `w8a16, int8 KV cache`."""
    return f"{manifest.precision}, int8 KV cache" if manifest.kv.dtype == "int8" else manifest.precision


def _check_types(dims: ModelDims, where: str) -> None:
    for item in fields(dims):
        value = getattr(dims, item.name)
        if item.name != "model_type" and (not isinstance(value, int) or value < 1):
            raise InvalidArtifact(f"{where}: dims.{item.name} must be a positive integer, got {value!r}")


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

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache a token takes, in the `ort` dialect."""
        dims = self.manifest.dims
        return kv_bytes_per_token(
            num_layers=dims.num_layers,
            num_kv_heads=dims.num_kv_heads,
            head_dim=dims.head_dim,
            dtype=self.manifest.kv.dtype,
        )

    def model_file(self, dialect: str = "ort") -> Path:
        """Path of the graph of one dialect; InvalidArtifact if the artifact has no such dialect."""
        if dialect not in self.manifest.dialects:
            raise InvalidArtifact(f"{self.path} has no {dialect} graph, only {', '.join(self.manifest.dialects)}")
        return self.path / self.manifest.dialects[dialect]


def open_artifact(path: str | Path, *, allow_failed: bool = False, check_hashes: bool = True) -> Artifact:
    """Read the manifest, check that every file is there, whole and unchanged, and that the receipt passed.

    `allow_failed` opens an artifact whose receipt failed; `check_hashes=False` compares sizes only.
    Raises InvalidArtifact with what is wrong and what to do.
    """
    path = Path(path)
    manifest_file = path / MANIFEST
    if not path.is_dir():
        raise InvalidArtifact(
            f"{path} is not a directory; `headrace export MODEL --out {path}` writes an artifact there"
        )
    if not manifest_file.is_file():
        raise InvalidArtifact(f"{path} has no {MANIFEST}: not an artifact, or half of one; export it again")
    manifest = Manifest.from_json(_read_text(manifest_file), str(manifest_file))
    for name, entry in manifest.files.items():
        _check_file(path, name, entry, check_hashes=check_hashes)
    for needed in (*manifest.dialects.values(), RECEIPT):
        if needed not in manifest.files:
            raise InvalidArtifact(f"{manifest_file} does not list {needed}; export the model again")
    receipt = json.loads(_read_text(path / RECEIPT))
    artifact = Artifact(path, manifest, receipt)
    if not artifact.passed and not allow_failed:
        raise InvalidArtifact(
            f"{path}: the receipt says the model failed its accuracy gate; "
            f"see `headrace inspect {path}`, or pass --allow-failed to use it all the same"
        )
    return artifact


def _check_file(root: Path, name: str, entry: FileEntry, *, check_hashes: bool) -> None:
    file = root / name
    if os.sep in name or name in ("", ".", ".."):
        raise InvalidArtifact(f"{root / MANIFEST} names a file outside the artifact: {name!r}")
    if not file.is_file():
        raise InvalidArtifact(f"{file} is missing; export the model again")
    size = file.stat().st_size
    if size != entry.size:
        raise InvalidArtifact(f"{file} has {size:,} bytes, the manifest says {entry.size:,}; export the model again")
    if check_hashes and (found := sha256_of(file)) != entry.sha256:
        raise InvalidArtifact(f"{file} has changed: sha256 {found[:12]}..., the manifest says {entry.sha256[:12]}...")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArtifact(f"{file} cannot be read: {error}") from error


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file, read once."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
