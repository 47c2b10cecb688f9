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
from export.graph.ort.decoder import DecoderGraph
from export.graph.ort.int8_attention import INT8_KV_OPSETS
from export.graph.standard.writer import write_standard_graph
from export.model.description import ModelConfig
from export.model.precision import Precision
from export.quantize.layers import Layers, QuantizedLayers
from export.quantize.statistics.kv_scales import KvScales
from export.storage.quantized_rows import ImportedRows
from runtime.artifact.manifest import ORT_MODEL, TRT_WEIGHTS
from runtime.progress import progress_bar


def write_graphs(
    staging: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision | None,
    max_len: int,
    dialects: Sequence[str],
    name: str,
    layers: Mapping[str, Layers],
    kv_scales: Sequence[KvScales] | None,
) -> int:
    """Write each dialect's graph, and the weights; the bytes that every run of the first dialect reads."""
    num_reads = sum(name.endswith((".weight", ".bias")) for name in checkpoint.tensors) * len(dialects)
    others = [dialect for dialect in dialects if dialect != "ort"]
    step_weight_bytes: dict[str, int] = {}
    with (
        WeightFile(staging, is_shared=bool(others)) as weights,
        progress_bar("export", total=num_reads, unit="tensor") as bar,
    ):
        counting = _Counting(checkpoint, bar)
        if precision is not None:
            step_weight_bytes["ort"] = _write_ort_graph(
                staging, counting, config, precision, max_len, weights, layers.get("ort", {}), kv_scales
            )
        if others:
            with WeightFile(staging, TRT_WEIGHTS, shares=weights) as rest:
                for dialect in others:
                    step_weight_bytes[dialect] = write_standard_graph(
                        staging,
                        dialect,
                        counting,
                        config,
                        name,
                        max_len=max_len,
                        weights=rest,
                        layers=QuantizedLayers(layers.get("trt", {})),
                    )
    return step_weight_bytes[dialects[0]]


def _write_ort_graph(
    staging: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision,
    max_len: int,
    weights: WeightFile,
    layers: Layers,
    kv_scales: Sequence[KvScales] | None,
) -> int:
    """Write model.onnx and weights.bin; the bytes of weights that every run reads."""
    import onnx

    graph = GraphBuilder(weights, opsets=ORT_OPSETS if kv_scales is None else INT8_KV_OPSETS)
    DecoderGraph(graph, checkpoint, config, precision, max_len, QuantizedLayers(layers), kv_scales).build()
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
