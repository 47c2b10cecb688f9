"""Writes the graphs of an artifact, one file for each dialect, and the weights that they read."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.artifact.weight_file import WeightFile
from export.checkpoint.protocol import Checkpoint
from export.checkpoint.view import CheckpointView
from export.graph.builder import ORT_OPSETS, GraphBuilder
from export.graph.decoder import DecoderGraph
from export.graph.int8_attention import INT8_KV_OPSETS
from export.graph.portable.writer import write_trt_graph
from export.model.config import ModelConfig
from export.model.precision import Precision
from export.quantize.int8.saved import Calibration
from export.quantize.rounding.int8 import Int8Layers
from export.quantize.statistics.kv_scales import KvScales
from export.storage.quantized_rows import ImportedRows
from runtime.artifact.manifest import ORT_MODEL, TRT_WEIGHTS
from runtime.progress import progress_bar


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """What the files of an artifact are made from.

    precision: of the `ort` graph; None without one, and then `trt_precision` names that of the other graphs
    trt_checkpoint: what the other graphs read, where it differs from what the `ort` graph reads
    int8_layers: the layers that multiply in int8; kv_scales: of an int8 KV cache
    calibration: what the artifact keeps of it
    """

    checkpoint: Checkpoint
    config: ModelConfig
    precision: Precision | None
    max_len: int
    dialects: tuple[str, ...] = ("ort",)
    trt_precision: str = ""
    trt_checkpoint: Checkpoint | None = None
    int8_layers: Int8Layers = field(default_factory=dict)
    kv_scales: Sequence[KvScales] | None = None
    calibration: Calibration | None = None

    @property
    def precision_name(self) -> str:
        return self.precision.name if self.precision is not None else self.trt_precision


def write_graphs(directory: Path, plan: ExportPlan) -> int:
    """Write the weights and each dialect's graph; the bytes of weights that every run of the first dialect reads."""
    trt_checkpoint = plan.trt_checkpoint or plan.checkpoint
    others = [dialect for dialect in plan.dialects if dialect != "ort"]
    num_reads = sum(name.endswith((".weight", ".bias")) for name in plan.checkpoint.tensors) * len(plan.dialects)
    step_weight_bytes: dict[str, int] = {}
    with (
        WeightFile(directory, is_shared=bool(others)) as weights,
        progress_bar("export", total=num_reads, unit="tensor") as bar,
    ):
        if plan.precision is not None:
            step_weight_bytes["ort"] = _write_ort_graph(
                directory, plan, plan.precision, _Counting(plan.checkpoint, bar), weights
            )
        if others:
            with WeightFile(directory, TRT_WEIGHTS, shares=weights) as rest:
                for dialect in others:
                    step_weight_bytes[dialect] = write_trt_graph(
                        directory,
                        dialect,
                        _Counting(trt_checkpoint, bar),
                        plan.config,
                        plan.precision_name,
                        max_len=plan.max_len,
                        weights=rest,
                        int8_layers=plan.int8_layers,
                    )
    return step_weight_bytes[plan.dialects[0]]


def _write_ort_graph(
    directory: Path, plan: ExportPlan, precision: Precision, checkpoint: Checkpoint, weights: WeightFile
) -> int:
    """Write model.onnx and weights.bin; the bytes of weights that every run reads."""
    import onnx

    scales, config = plan.kv_scales, plan.config
    graph = GraphBuilder(weights, opsets=ORT_OPSETS if scales is None else INT8_KV_OPSETS)
    DecoderGraph(graph, checkpoint, config, precision, plan.max_len, plan.int8_layers, scales).build()
    ir.save(graph.model(config.model_type, importlib.metadata.version("headrace")), directory / ORT_MODEL)
    weights.flush()
    onnx.checker.check_model(str(directory / ORT_MODEL), full_check=True)
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
