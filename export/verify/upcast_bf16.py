"""Upcasts a bfloat16 graph to float32, so that ONNX Runtime's CPU provider can run it.

That provider has no bfloat16 matrix products. So the receipt of such a graph covers its weights, mask and layout, but
not the rounding of its activations, which only a GPU can show.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from runtime.artifact.manifest import Artifact

_UPCAST = "upcast.{file}"


@contextmanager
def runnable(artifact: Artifact, dialect: str) -> Iterator[Artifact]:
    """The artifact itself, or for a bfloat16 graph one with an upcast copy, which is removed afterwards."""
    manifest = artifact.manifest
    contract = manifest.kv_of(dialect)
    if contract.dtype != "bfloat16":
        yield artifact
        return
    name = _UPCAST.format(file=manifest.dialects[dialect])
    file = artifact.path / name
    try:
        file.write_bytes(_upcast((artifact.path / manifest.dialects[dialect]).read_bytes()))
        wide = replace(contract, dtype="float32")
        dialects = {**manifest.dialects, dialect: name}
        yield replace(artifact, manifest=replace(manifest, dialects=dialects, kv=wide, trt_kv=wide))
    finally:
        file.unlink(missing_ok=True)


def _upcast(model_bytes: bytes) -> bytes:
    """Every bfloat16 initializer gets a Cast behind it; casts to bfloat16, inputs and outputs become float32."""
    import onnx

    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load_from_string(model_bytes)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == bf16:
            name, tensor.name = tensor.name, f"{tensor.name}.bfloat16"
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=fp32))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == bf16:
                attribute.i = fp32
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == bf16:
            value.type.tensor_type.elem_type = fp32
    return bytes(model.SerializeToString())
