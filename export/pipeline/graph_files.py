"""Writes the graphs of an artifact, a file a dialect, and the weights they read."""

import importlib.metadata
from collections.abc import Mapping, Sequence
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
from export.quantize.rounding.int8 import Int8Layers
from export.quantize.statistics.kv_scales import KvScales
from export.storage.quantized_rows import ImportedRows
from runtime.artifact.manifest import ORT_MODEL, TRT_WEIGHTS
from runtime.progress import progress_bar


def write_graphs(
    staging: Path,
    checkpoints: Mapping[str, Checkpoint],
    config: ModelConfig,
    precision: Precision | None,
    max_len: int,
    dialects: Sequence[str],
    name: str,
    int8_layers: Int8Layers,
    kv_scales: Sequence[KvScales] | None,
) -> int:
    """Write each dialect's graph, and the weights; the bytes that every run of the first dialect reads."""
    num_reads = sum(name.endswith((".weight", ".bias")) for name in checkpoints["ort"].tensors) * len(dialects)
    others = [dialect for dialect in dialects if dialect != "ort"]
    step_weight_bytes: dict[str, int] = {}
    with (
        WeightFile(staging, is_shared=bool(others)) as weights,
        progress_bar("export", total=num_reads, unit="tensor") as bar,
    ):
        counting = {dialect: _Counting(checkpoint, bar) for dialect, checkpoint in checkpoints.items()}
        if precision is not None:
            step_weight_bytes["ort"] = _write_ort_graph(
                staging, counting["ort"], config, precision, max_len, weights, int8_layers, kv_scales
            )
        if others:
            with WeightFile(staging, TRT_WEIGHTS, shares=weights) as rest:
                for dialect in others:
                    step_weight_bytes[dialect] = write_trt_graph(
                        staging,
                        dialect,
                        counting[dialect],
                        config,
                        name,
                        max_len=max_len,
                        weights=rest,
                        int8_layers=int8_layers,
                    )
    return step_weight_bytes[dialects[0]]


def _write_ort_graph(
    staging: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision,
    max_len: int,
    weights: WeightFile,
    int8_layers: Int8Layers,
    kv_scales: Sequence[KvScales] | None,
) -> int:
    """Write model.onnx and weights.bin; the bytes of weights that every run reads."""
    import onnx

    graph = GraphBuilder(weights, opsets=ORT_OPSETS if kv_scales is None else INT8_KV_OPSETS)
    DecoderGraph(graph, checkpoint, config, precision, max_len, int8_layers, kv_scales).build()
    ir.save(graph.model(config.model_type, importlib.metadata.version("headrace")), staging / ORT_MODEL)
    weights.flush()
    onnx.checker.check_model(str(staging / ORT_MODEL), full_check=True)
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
