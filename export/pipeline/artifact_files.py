"""Writes the files of an artifact (graphs, weights, texts, calibration) and lists them in a manifest."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

from export.artifact.writer import file_entry, write_texts
from export.calibration.dataset import Generate
from export.calibration.self_samples import artifact_generator
from export.checkpoint.protocol import Checkpoint
from export.pipeline.graph_files import ExportPlan, write_graphs
from export.quantize.int8.saved import save_calibration
from export.schemes.registry import SCHEMES
from runtime.artifact.manifest import (
    DIALECT_FILES,
    SCHEMA_VERSION,
    Artifact,
    KvContract,
    Manifest,
    ModelDims,
    StateTensor,
    kind_of,
)

_VERSIONED = ("headrace", "onnx", "onnx-ir", "onnxruntime", "numpy")


def write_unverified(directory: Path, plan: ExportPlan) -> Artifact:
    """Write all files but receipt and manifest into an empty directory; returns an artifact that a session can run."""
    if plan.calibration is not None:
        save_calibration(directory, plan.calibration, plan.config.vocab_size)
    write_texts(directory, plan.checkpoint.text_files())
    step_weight_bytes = write_graphs(directory, plan)
    return Artifact(directory, _manifest(directory, plan, step_weight_bytes), {})


def sampler(directory: Path, plan: ExportPlan) -> Generate:
    """A function that samples calibration text from the model, for `--calibration-text self`.

    It samples from an artifact with 8-bit weights, which it writes below `directory` and removes again: within half a
    per cent of the model's perplexity, in half the time.
    """
    plan = replace(plan, scheme=SCHEMES["w8a16"], dialects=("ort",))

    def generate(starts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
        below = directory / "sampler"
        below.mkdir()
        try:
            return artifact_generator(write_unverified(below, plan), length=length)(starts, length, seed)
        finally:
            rmtree(below)

    return generate


def _manifest(directory: Path, plan: ExportPlan, step_weight_bytes: int) -> Manifest:
    config = plan.config
    others = [dialect for dialect in plan.dialects if kind_of(dialect) != "ort"]
    first = "ort" if "ort" in plan.dialects else plan.dialects[0]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=_name_of(plan.checkpoint),
        source=plan.checkpoint.source,
        precision=plan.scheme.name,
        dims=ModelDims(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_len=plan.max_len,
            attention_layers=tuple(block.layer for block in config.attention_blocks) if config.has_states else None,
        ),
        states=tuple(
            StateTensor(
                past=f"past.{block.layer}.{state.kind}",
                present=f"present.{block.layer}.{state.kind}",
                shape=state.shape,
            )
            for block in config.blocks
            for state in block.states
        ),
        kv=plan.kv_of(first),
        native_kv=plan.kv_of("native") if "native" in plan.dialects else None,
        trt_kv=KvContract(dtype=plan.storage_of(others[0]).compute) if others else None,
        dialects={dialect: DIALECT_FILES[dialect] for dialect in plan.dialects},
        is_tied=config.tie_word_embeddings,
        eos_ids=config.eos_ids,
        bos_id=config.bos_id,
        files={file.name: file_entry(file) for file in sorted(directory.iterdir())},
        versions={package: importlib.metadata.version(package) for package in _VERSIONED},
        step_weight_bytes=step_weight_bytes,
        num_parameters=config.num_parameters,
        num_active=sum(config.num_macs(linear.site) for linear in config.linears),
        estimates=plan.estimates,
        commit=plan.checkpoint.commit,
    )


def _name_of(checkpoint: Checkpoint) -> str:
    """The name clients use: of a hub id the last part, without the revision, which may have a slash itself."""
    source, plus, adapters = checkpoint.source.partition("+")
    base = source.partition("@")[0].rpartition("/")[2] if "/" in source.partition("@")[0] else source
    return f"{base}{plus}{adapters}"
