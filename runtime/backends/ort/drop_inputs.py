"""Drops the last inputs of some nodes of an ONNX file, for an ONNX Runtime that does not know them.

The newest onnxruntime-gpu is 1.31, and its GroupQueryAttention has no `query_seqlens`, which our graph uses. Writing a
second graph at export would double the files and the checks of every artifact for one release, so the input is dropped
when the graph is loaded. The protobuf fields are read here because the serving side has no onnx package; weights lie in
other files, so the bytes are few. Delete this module once onnxruntime-gpu 1.32 is out.
"""

from collections.abc import Callable

from runtime.artifact.protobuf import LENGTH_DELIMITED, fields_of

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.node, NodeProto.input and .op_type.
_GRAPH, _NODE, _INPUT, _OP_TYPE = 7, 1, 1, 4


def without_inputs(model: bytes, op_type: str, num_kept: int) -> bytes:
    """The model with only the first `num_kept` inputs of every node of that kind. ValueError if it is not a model."""

    def edit_node(node: bytes) -> bytes:
        return _node(node, op_type, num_kept)

    return _edited(model, _GRAPH, lambda graph: _edited(graph, _NODE, edit_node))


def _edited(message: bytes, number: int, edit: Callable[[bytes], bytes]) -> bytes:
    """The message with `edit` made of every nested message of that number."""
    return b"".join(
        field.whole if field.number != number or field.content is None else _wrapped(number, edit(field.content))
        for field in fields_of(message)
    )


def _node(node: bytes, op_type: str, num_kept: int) -> bytes:
    fields = list(fields_of(node))
    if not any(field.number == _OP_TYPE and field.content == op_type.encode() for field in fields):
        return node
    inputs = [field for field in fields if field.number == _INPUT][:num_kept]
    return b"".join(field.whole for field in [*inputs, *(field for field in fields if field.number != _INPUT)])


def _wrapped(number: int, content: bytes) -> bytes:
    return _as_varint(number << 3 | LENGTH_DELIMITED) + _as_varint(len(content)) + content


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
