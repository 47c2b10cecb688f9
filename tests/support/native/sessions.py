"""ONNX Runtime sessions of a single native operator."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graph.builder import NATIVE
from runtime.native.library import operators_for

Shapes = Mapping[str, Sequence[int | str | None]]


def node_session(
    node: onnx.NodeProto,
    inputs: Shapes,
    outputs: Shapes,
    threads: int,
    constants: Mapping[str, NDArray[Any]] | None = None,
) -> Any:
    """A session of one node; its inputs and outputs are float32 of these shapes, and some inputs are constants."""
    import onnxruntime

    taken, made = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in values.items()]
        for values in (inputs, outputs)
    )
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(NATIVE, 1)]
    graph = helper.make_graph([node], "one", taken, made, tensors)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(operators_for(threads)))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
