"""Writes the graph of a standard dialect. It shares weights with the `ort` dialect if the bytes are the same.

fp32 and fp16 share everything except half-precision norms; w8a8 shares its integers. Weight-only schemes share nothing:
ONNX Runtime's blocks are unsigned with a zero point and run along the inputs of a row, TensorRT's are signed, without
zero point and in the MatMul's order.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from export.artifact.weight_file import WeightFile
from export.checkpoint.protocol import Checkpoint
from export.graph.builder import GraphBuilder
from export.graph.standard.attention import Opset24
from export.graph.standard.decoder import StandardDecoderGraph
from export.graph.standard.plain_attention import Opset21
from export.graph.types import onnx_type
from export.model.description import ModelConfig
from export.quantize.rounding.layers import QuantizedLayers
from export.schemes.scheme import Storage
from runtime.artifact.manifest import DIALECT_FILES

_DIALECTS: Mapping[str, type[Opset24] | type[Opset21]] = {"trt": Opset24, "trt-plain": Opset21}


def write_standard_graph(
    directory: Path,
    dialect: str,
    checkpoint: Checkpoint,
    config: ModelConfig,
    storage: Storage,
    *,
    max_len: int,
    weights: WeightFile,
    layers: QuantizedLayers,
) -> int:
    """Write one graph. Returns the bytes of weights that every run reads."""
    import onnx

    kind = _DIALECTS[dialect]
    g = GraphBuilder(weights, opsets={"": kind.opset}, ir_version=kind.ir_version)
    parts = kind(g, onnx_type(storage.compute))
    StandardDecoderGraph(g, checkpoint, config, storage, max_len=max_len, dialect=parts, layers=layers).build()
    file = directory / DIALECT_FILES[dialect]
    ir.save(g.model(config.model_type, importlib.metadata.version("headrace")), file)
    weights.flush()
    onnx.checker.check_model(str(file), full_check=True)
    return g.step_weight_bytes()
