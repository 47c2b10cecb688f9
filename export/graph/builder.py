"""A thin layer over onnx_ir: add a node, get its output; constants and weights become initializers.

Knows nothing about decoders. Not thread-safe.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.artifact.weight_file import Extent, WeightFile, external_value

MICROSOFT = "com.microsoft"
NATIVE = "headrace"
"""The domain of the operators in runtime/native/."""
ORT_OPSETS = {"": 23, MICROSOFT: 1}  # 23 is the first with RMSNormalization
NATIVE_OPSETS = {**ORT_OPSETS, NATIVE: 1}
IR_VERSION = 11

# By operator, inputs of which a run reads only some rows: embeddings and rotary tables.
_GATHERED = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "GroupQueryAttention": (7, 8),
    "Attention": (6, 7),
    "AttentionFloat16": (6, 7),
    "AttentionInt8": (6, 7),
    "RotaryEmbedding": (1, 2),
}


class GraphBuilder:
    """Collects the nodes, initializers, inputs and outputs of one graph."""

    def __init__(
        self,
        weights: WeightFile,
        *,
        opsets: Mapping[str, int] = ORT_OPSETS,
        ir_version: int = IR_VERSION,
        on_tensor: Callable[[], None] = lambda: None,
    ) -> None:
        self._weights, self._opsets, self._ir_version = weights, opsets, ir_version
        self._on_tensor = on_tensor
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; a string is a symbolic dimension."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a node's output as a graph output."""
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output called `name`."""
        return self.ops(op_type, inputs, [name], domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with several outputs; an empty name leaves an optional output out."""
        outputs = [ir.Value(name=name) for name in names]
        node_name = f"{names[0]}/{op_type}"
        self._nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=node_name))
        return outputs

    def branch(self, name: str, types: Sequence[ir.DataType], build: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        """A branch of an If, with the nodes that `build` adds and the outputs that it returns.

        types: of the outputs. The branch can read all earlier values; its names must differ from the outer graph's.
        """
        outer, self._nodes = self._nodes, []
        try:
            outputs = build()
            for value, dtype in zip(outputs, types, strict=True):
                value.type = ir.TensorType(dtype)
            return ir.Graph([], outputs, nodes=self._nodes, name=name)
        finally:
            self._nodes = outer

    def body(
        self,
        name: str,
        inputs: Sequence[tuple[str, ir.DataType]],
        build: Callable[[Sequence[ir.Value]], Sequence[tuple[ir.Value, ir.DataType]]],
    ) -> ir.Graph:
        """The body of a Scan: `build` makes its outputs from its inputs. Names must differ from the outer graph's."""
        outer, self._nodes = self._nodes, []
        try:
            values = [ir.Value(name=label, type=ir.TensorType(dtype)) for label, dtype in inputs]
            outputs = []
            for value, dtype in build(values):
                value.type = ir.TensorType(dtype)
                outputs.append(value)
            return ir.Graph(values, outputs, nodes=self._nodes, name=name)
        finally:
            self._nodes = outer

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small initializer in the graph file. A second call with the same name returns the first one's value."""
        if name not in self._initializers:
            tensor = ir.tensor(array, name=name)
            self._initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._initializers[name]

    def shape_constant(self, *dims: int) -> ir.Value:
        """An int64 vector for Reshape and Split; 0 copies a dimension, -1 infers it."""
        return self.constant("shape_" + "_".join(map(str, dims)).replace("-", "m"), np.array(dims, np.int64))

    def write(self, chunks: Iterable[NDArray[Any]]) -> Extent:
        """Append a tensor to the weight file."""
        extent = self._weights.append(chunks)
        self._on_tensor()
        return extent

    def weight(self, name: str, extent: Extent, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """An initializer for a tensor that is already in the weight file."""
        value = external_value(name, extent, dtype, shape)
        self._initializers[name] = value
        return value

    def array(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Write an array to the weight file; returns its initializer."""
        return self.weight(name, self.write([array]), ir.DataType.from_numpy(array.dtype), array.shape)

    def step_weight_bytes(self) -> int:
        """Bytes of the weights that every run reads completely; weights with two names count once."""
        extents = {
            (str(value.const_value.location), value.const_value.offset, value.const_value.length)
            for node in self._nodes
            for idx, value in enumerate(node.inputs)
            if value is not None
            and isinstance(value.const_value, ir.ExternalTensor)
            and idx not in _GATHERED.get(node.op_type, ())
        }
        return sum(length or 0 for _, _, length in extents)

    def model(self, name: str, producer_version: str) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=dict(self._opsets),
            name=name,
        )
        return ir.Model(graph, ir_version=self._ir_version, producer_name="headrace", producer_version=producer_version)
