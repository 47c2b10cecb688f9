"""Which other files an ONNX graph reads its tensors from. Reads the protobuf wire format, see protobuf.py."""

from collections.abc import Mapping

from runtime.artifact.protobuf import fields_of

# Which fields of onnx.proto lead to a tensor, by message: field number to the message that it holds.
_NESTED: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # of an entry of TensorProto.external_data
_LOCATION = b"location"


def external_files(model: bytes) -> set[str]:
    """Names of the files that hold the graph's external tensors, subgraphs included. ValueError if it is no model."""
    found: set[str] = set()
    waiting = [("model", model)]
    while waiting:
        kind, message = waiting.pop()
        if kind == "entry":
            entry = {field.number: field.content for field in fields_of(message)}
            if entry.get(_KEY) == _LOCATION:
                found.add((entry.get(_VALUE) or b"").decode(errors="replace"))
            continue
        nested = _NESTED[kind]
        for field in fields_of(message):
            if (inner := nested.get(field.number)) is not None and field.content is not None:
                waiting.append((inner, field.content))
    return found
