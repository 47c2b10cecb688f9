"""Writes the graphs of an artifact, one file for each dialect, and the weights that they read."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.artifact.weight_file import WeightFile
from export.checkpoint.protocol import Checkpoint
from export.checkpoint.view import CheckpointView
from export.graph.builder import NATIVE_OPSETS, ORT_OPSETS, GraphBuilder
from export.graph.native.decoder import NATIVE_CACHE, NativeDecoderGraph
from export.graph.ort.decoder import DecoderGraph
from export.graph.ort.int8_attention import INT8_KV_OPSETS
from export.graph.standard.writer import write_standard_graph
from export.model.description import ModelConfig
from export.quantize.int8.saved import Calibration
from export.quantize.rounding.layers import Layers, QuantizedLayers, layers_of_checkpoint
from export.quantize.statistics.kv_scales import PER_CHANNEL, KvScales
from export.schemes.scheme import Scheme, Storage
from export.storage.quantized_rows import ImportedRows
from runtime.artifact.manifest import DIALECT_FILES, TRT_WEIGHTS, Estimate, KvContract, kind_of
from runtime.machine.progress import progress_bar


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """What the files of an artifact are made from.

    scheme: how the graphs store weights and compute; it has each dialect's
    layers: those that calibration rounded, for the `ort` graph and for the others ("trt")
    kv_scales: of an int8 KV cache; estimates: of other schemes, for the manifest
    calibration: what the artifact keeps of it
    """

    checkpoint: Checkpoint
    config: ModelConfig
    scheme: Scheme
    max_len: int
    dialects: tuple[str, ...] = ("ort",)
    layers: Mapping[str, Layers] = field(default_factory=dict)
    kv_scales: Mapping[int, KvScales] | None = None
    calibration: Calibration | None = None
    estimates: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    def storage_of(self, dialect: str) -> Storage:
        """The scheme's for one of the dialects, which has been checked."""
        storage = self.scheme.storage_of(dialect)
        assert storage is not None, (self.scheme.name, dialect)
        return storage

    def kv_of(self, dialect: str) -> KvContract:
        """How a dialect's cache looks."""
        if self.kv_scales is not None:
            return KvContract(dtype="int8", scales=PER_CHANNEL)
        compute = self.storage_of(dialect).compute
        return KvContract(dtype=NATIVE_CACHE if dialect == "native" and self.scheme.name != "fp32" else compute)

    def layers_of(self, dialect: str) -> QuantizedLayers:
        """The layers that are integers already: from calibration, or as a tool has left them."""
        key = kind_of(dialect)
        takes_stored = key != "ort" or self.scheme.keeps_stored
        if not self.layers and takes_stored and self.checkpoint.stored_bits is not None:
            layers = layers_of_checkpoint(self.checkpoint, self.config, multiplies_int8=self.scheme.multiplies_int8)
            return QuantizedLayers(layers)
        return QuantizedLayers(self.layers.get(key, {}))


def write_graphs(directory: Path, plan: ExportPlan) -> int:
    """Write the weights and each dialect's graph; the bytes of weights that every run of the first dialect reads."""
    others = [dialect for dialect in plan.dialects if kind_of(dialect) != "ort"]
    num_reads = sum(name.endswith((".weight", ".bias")) for name in plan.checkpoint.tensors) * len(plan.dialects)
    step_weight_bytes: dict[str, int] = {}
    with (
        WeightFile(directory, is_shared=len(plan.dialects) > 1) as weights,
        progress_bar("export", total=num_reads, unit="tensor") as bar,
    ):
        for dialect in (name for name in plan.dialects if name not in others):
            checkpoint = _Counting(plan.checkpoint, bar)
            step_weight_bytes[dialect] = _write_ort_graph(directory, dialect, plan, checkpoint, weights)
        if others:
            with WeightFile(directory, TRT_WEIGHTS, shares=weights) as rest:
                for dialect in others:
                    step_weight_bytes[dialect] = write_standard_graph(
                        directory,
                        dialect,
                        _Counting(plan.checkpoint, bar),
                        plan.config,
                        plan.storage_of(dialect),
                        max_len=plan.max_len,
                        weights=rest,
                        layers=plan.layers_of(dialect),
                    )
    return step_weight_bytes[plan.dialects[0]]


def _write_ort_graph(
    directory: Path, dialect: str, plan: ExportPlan, checkpoint: Checkpoint, weights: WeightFile
) -> int:
    """Write the `ort` or the `native` graph, and weights.bin; the bytes of weights that every run reads."""
    import onnx

    scales, config = plan.kv_scales, plan.config
    is_native = dialect == "native"
    kind = NativeDecoderGraph if is_native else DecoderGraph
    opsets = NATIVE_OPSETS if is_native else ORT_OPSETS if scales is None else INT8_KV_OPSETS
    graph, file = GraphBuilder(weights, opsets=opsets), directory / DIALECT_FILES[dialect]
    storage, layers = plan.storage_of(dialect), plan.layers_of(dialect)
    kv = plan.kv_of(dialect).dtype
    kind(graph, checkpoint, config, storage, plan.max_len, layers, kv=kv, kv_scales=scales).build()
    ir.save(graph.model(config.model_type, importlib.metadata.version("headrace")), file)
    weights.flush()
    onnx.checker.check_model(str(file), full_check=True)
    return graph.step_weight_bytes()


class _Counting(CheckpointView):
    """A checkpoint that moves a progress bar with every tensor it loads."""

    def __init__(self, checkpoint: Checkpoint, bar: Any) -> None:
        super().__init__(checkpoint)
        self._bar = bar

    def load(self, name: str) -> NDArray[np.float32]:
        self._bar.update(1)
        return self._base.load(name)

    def imported(self, name: str) -> ImportedRows | None:
        return self._base.imported(name)
