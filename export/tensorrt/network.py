"""Parses the artifact's ONNX file into a TensorRT network, and checks that nothing was lost.

A parser may silently leave out an attribute or input that it does not know: the plan builds and gives wrong tokens. So
the network's layers are counted before it is built: attention and cache updates against the manifest, quantize and
dequantize against the file. Every declared input must reach a layer.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.artifact.manifest import Artifact
from runtime.backends.tensorrt.library import TrtLibrary, TrtLogger
from runtime.errors import InvalidArtifact, PlanBuildFailed

_CAPACITY = "capacity"
"""The graph's symbolic length of a cache slot, which TensorRT needs as a number."""

QUANTIZED = ("w8a16", "w4a16", "w8a8")
"""Precisions whose network must have dequantize layers."""


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX file, read once, so that the compiled bytes are those that were hashed.

    layers: what the network must have, by the names of `LAYERS`
    weight_bytes: of the tensors it names in the weight files
    """

    dialect: str
    file: Path
    sha256: str
    model: Any
    weight_bytes: int
    layers: Mapping[str, int]


LAYERS = {
    "attention": "ATTENTION_INPUT",  # an IAttention shows as two boundary layers, this and ATTENTION_OUTPUT
    "kv_cache_update": "KV_CACHE_UPDATE",
    "quantize": "QUANTIZE",
    "dequantize": "DEQUANTIZE",
}
"""Kinds of layers, and their names in the library's LayerType."""


def read_graph(artifact: Artifact, dialect: str) -> Graph:
    """Read and hash the dialect's file. InvalidArtifact unless it is, by hash, the one the receipt was written for."""
    import onnx
    from google.protobuf.message import DecodeError

    file = artifact.graph_file(dialect)
    data = file.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    checked = artifact.receipt.get("graphs", {}).get(dialect)
    if not found == artifact.manifest.files[file.name].sha256 == checked:
        raise InvalidArtifact(
            f"{file} is not the graph that was checked: sha256 {found[:12]}..., the receipt says "
            f"{str(checked)[:12]}...; export the model again"
        )
    artifact.model_file(dialect)  # which refuses weights that the manifest does not list
    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise InvalidArtifact(f"{file} is not an ONNX model: {error}; export the model again") from error
    kinds = Counter(node.op_type for node in model.graph.node)
    expected = {
        "attention": kinds["Attention"],  # capped attention is in elementary operators
        "kv_cache_update": 2 * len(artifact.manifest.dims.kv_layers) if dialect == "trt" else 0,
        "quantize": kinds["QuantizeLinear"],
        "dequantize": kinds["DequantizeLinear"],
    }
    if artifact.manifest.precision in QUANTIZED and not expected["dequantize"]:
        raise InvalidArtifact(f"{file} is said to be {artifact.manifest.precision} but has no DequantizeLinear")
    return Graph(dialect, file, found, model, _weight_bytes(model), expected)


def _weight_bytes(model: Any) -> int:
    """Bytes of the external tensors; tensors that share bytes count once."""
    extents = {
        (entries["location"], entries.get("offset", "0")): int(entries["length"])
        for tensor in model.graph.initializer
        if (entries := {entry.key: entry.value for entry in tensor.external_data})
    }
    return sum(extents.values())


def with_capacity(graph: Graph, capacity: int) -> bytes:
    """The serialized model with a fixed slot length, which TensorRT does not take as a symbol."""
    model = type(graph.model)()
    model.CopyFrom(graph.model)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == _CAPACITY:
                dim.dim_value = capacity
    return bytes(model.SerializeToString())


def parse_network(library: TrtLibrary, logger: TrtLogger, builder: Any, graph: Graph, capacity: int) -> tuple[Any, Any]:
    """The network, and the parser, which owns the weights' memory until the engine is built.

    PlanBuildFailed names the operator that the parser refused.
    """
    trt = library.module
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger.inner)
    if not parser.parse(with_capacity(graph, capacity), str(graph.file)):
        error = parser.get_error(0) if parser.num_errors else None
        what = (
            f"{error.node_operator()} {error.node_name()}: {_first_line(error.desc())}" if error else "no reason given"
        )
        raise PlanBuildFailed(f"{library.target} {library.version} cannot parse {graph.file}: {what}")
    return network, parser


def check_network(library: TrtLibrary, network: Any, graph: Graph) -> Mapping[str, int]:
    """Count the layers, and check that a layer reads every input. PlanBuildFailed says what was lost."""
    kinds = Counter(network.get_layer(idx).type for idx in range(network.num_layers))
    known = library.module.LayerType.__members__
    found = {name: kinds[known[kind]] if kind in known else 0 for name, kind in LAYERS.items()}
    wrong = [
        f"{found[name]} {name} layers of {wanted}" for name, wanted in graph.layers.items() if found[name] != wanted
    ]
    declared = {value.name for value in graph.model.graph.input}
    lost = sorted(declared - _consumed(network))
    if lost:
        wrong.append(f"nothing reads {', '.join(lost[:4])}{' and others' if len(lost) > 4 else ''}")
    missing = {value.name for value in graph.model.graph.output} - {
        network.get_output(idx).name for idx in range(network.num_outputs)
    }
    if missing:
        wrong.append(f"no output {', '.join(sorted(missing)[:4])}")
    if unmasked := sum(attention.mask is None for attention in attentions(library, network)):
        wrong.append(f"{unmasked} attention layers without a mask")
    if wrong:
        raise PlanBuildFailed(
            f"{library.target} {library.version} lost a part of {graph.file}: {'; '.join(wrong)}; "
            "an engine of this network would give wrong tokens, so none is built"
        )
    return found


def attentions(library: TrtLibrary, network: Any) -> Iterator[Any]:
    """Every IAttention of a network."""
    trt = library.module
    kind = getattr(trt.LayerType, LAYERS["attention"], None)
    for idx in range(network.num_layers):
        layer = network.get_layer(idx)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' own way to narrow an ILayer
            yield layer.attention


def _consumed(network: Any) -> set[str]:
    """Names of all tensors that a layer reads."""
    layers = (network.get_layer(idx) for idx in range(network.num_layers))
    inputs = (layer.get_input(idx) for layer in layers for idx in range(layer.num_inputs))
    return {tensor.name for tensor in inputs if tensor is not None}


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
