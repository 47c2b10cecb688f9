"""Writes the graph of a TensorRT dialect beside the `ort` one, sharing its weights where the bytes are the same.

fp32 and fp16 share everything but half-precision norms, w8a8 its integers. Weight-only precisions share nothing: ONNX
Runtime's blocks are unsigned with a zero point and lie along the inputs of a row, TensorRT's are signed, without one,
in the MatMul's order.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from export.artifact.weight_file import WeightFile
from export.checkpoint.protocol import Checkpoint
from export.graph.builder import GraphBuilder
from export.graph.portable.decoder import TrtDecoderGraph
from export.graph.portable.linear import TrtLinear
from export.graph.portable.operators import FusedOperators
from export.graph.portable.plain_operators import PlainOperators
from export.model.config import ModelConfig
from export.model.trt_precision import trt_precision_named
from export.quantize.rounding.int8 import Int8Layers
from runtime.artifact.manifest import DIALECT_FILES

_OPERATORS: Mapping[str, type[FusedOperators] | type[PlainOperators]] = {
    "trt": FusedOperators,
    "trt-plain": PlainOperators,
}


def write_trt_graph(
    directory: Path,
    dialect: str,
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: str,
    *,
    max_len: int,
    weights: WeightFile,
    int8_layers: Int8Layers,
) -> int:
    """Write one graph; the bytes of weights that every run reads. `int8_layers`: of calibrated precisions."""
    import onnx

    kind, row = _OPERATORS[dialect], trt_precision_named(precision)
    g = GraphBuilder(weights, opsets={"": kind.opset}, ir_version=kind.ir_version)
    operators, linear = kind(g, config), TrtLinear(g, row, int8_layers)
    TrtDecoderGraph(g, checkpoint, config, row, max_len=max_len, operators=operators, linear=linear).build()
    file = directory / DIALECT_FILES[dialect]
    ir.save(g.model(config.model_type, importlib.metadata.version("headrace")), file)
    weights.flush()
    onnx.checker.check_model(str(file), full_check=True)
    return g.step_weight_bytes()
