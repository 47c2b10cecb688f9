"""Turns an artifact's `ort` graph into an OpenVINO model: block-quantized weights stay integers, attention is paged.

OpenVINO's PagedAttention reads and writes K and V in blocks of 32 positions. It takes the tokens of several sequences
packed without padding, as the `ort` graph has them outside attention, so the steps into padded rows and back are left
out:

    ort graph    input_ids [T] -> ... -> rows [B, S] -> GroupQueryAttention -> tokens [T] -> ... -> logits [R]
    here         input_ids [T] -> ... ----------------> PagedAttention ----------------> ... -> logits [R]

Inputs of the model besides `input_ids`, `position_ids`, `logits_idx` and the caches are those of `PAGED_INPUTS`.
PagedAttention is an internal operation of OpenVINO: it has no stability promise, and setup.cfg names one release. Its
inputs are specified in OpenVINO's documentation of internal operations. Knows operators, and nothing of sessions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact, ModelDims
from runtime.errors import InvalidArtifact

BLOCK = 32
"""Positions in a block of the cache: what OpenVINO's CPU kernels are written for."""

POSITIONS = "position_ids"
PAGED_INPUTS = {
    "past_lens": 5,  # int32 [rows], tokens in each sequence's cache
    "subsequence_begins": 6,  # int32 [rows + 1], where each sequence's new tokens begin among all
    "block_indices": 7,  # int32, the cache blocks of every sequence, one sequence after another
    "block_indices_begins": 8,  # int32 [rows + 1], where each sequence's blocks begin
    "max_context_len": 12,  # int32, of the longest sequence with its new tokens
}
"""Inputs of the model by name, and which input of PagedAttention each is."""

_MICROSOFT = "com.microsoft"
_UNUSED = ("token_idx", "place_idx", "past_len", "query_len")
_Node = Any  # an operator as OpenVINO's frontend shows it to a conversion


class GraphReader:
    """Reads one artifact's `ort` graph. Hold on to it as long as the model: it owns the bytes of 4-bit weights."""

    def __init__(self, library: Any, artifact: Artifact) -> None:
        from openvino import opset13

        self._ov, self._ops = library, opset13
        self._artifact, self._dims = artifact, artifact.manifest.dims
        self._angles: dict[str, tuple[Any, Any]] = {}  # cos and sin, by the name of the table of cos
        self._attentions: list[Any] = []
        self._kept: list[NDArray[np.uint8]] = []
        self._refusal = ""

    def read(self) -> Any:
        """The OpenVINO model. InvalidArtifact names the operator that cannot be read."""
        from openvino.frontend.onnx import ConversionExtension

        core = self._ov.Core()
        conversions: dict[str, Callable[[_Node], list[Any]]] = {
            "MatMulNBits": self._matmul,
            "GatherBlockQuantized": self._embedding,
            "QuickGelu": self._silu,
            "GroupQueryAttention": self._attention,
            "RotaryEmbedding": self._rotary,
        }
        for operator, convert in conversions.items():
            core.add_extension(ConversionExtension(operator, _MICROSOFT, convert))
        file = self._artifact.model_file("ort")
        try:
            if self._artifact.manifest.states:
                raise RuntimeError("recurrent states")
            model = core.read_model(str(file))
            self._page(model)
        except RuntimeError as error:
            # OpenVINO drops what a conversion said.
            reason = self._refusal or [line.strip(" -") for line in str(error).splitlines() if line.strip()][-1]
            raise InvalidArtifact(f"OpenVINO cannot read {file}: {reason}; use --device cpu") from error
        return model

    def _page(self, model: Any) -> None:
        """Give the model the inputs of paged attention, and take away those of padded rows."""
        kv_heads, head_dim = self._dims.num_kv_heads, self._dims.head_dim
        by_name = {name: parameter for parameter in model.get_parameters() for name in parameter.output(0).get_names()}
        for target in by_name["token_idx"].output(0).get_target_inputs():
            to_rows = target.get_node()
            one_row = self._ops.unsqueeze(to_rows.input_value(0), self._shape(0))
            to_rows.output(0).replace(one_row.output(0))
        for target in by_name["place_idx"].output(0).get_target_inputs():
            to_tokens = target.get_node()
            if not to_tokens.get_type_name().startswith("GatherND"):
                raise RuntimeError("learned positions")
            unsqueezed = to_tokens.input_value(0).get_node()  # by `_attention`
            to_tokens.output(0).replace(unsqueezed.input_value(0))
        added = [self._parameter(name, [] if name == "max_context_len" else [-1], "i32") for name in PAGED_INPUTS]
        for attention in self._attentions:
            info = attention.get_rt_info()
            info["k_head_size"] = info["v_head_size"] = head_dim
            info["num_k_heads"] = info["num_v_heads"] = kv_heads
            for parameter, position in zip(added, PAGED_INPUTS.values(), strict=True):
                attention.input(position).replace_source_output(parameter.output(0))
        positions = self._parameter(POSITIONS, [-1], "i64")
        for angle in (angle for pair in self._angles.values() for angle in pair):
            angle.input_value(0).get_node().input(1).replace_source_output(positions.output(0))
        for result in model.get_results():
            if "logits" not in result.input_value(0).get_names():
                model.remove_result(result)
        model.add_parameters([*added, positions])
        for cache in self._artifact.manifest.kv.cache_names(self._dims.kv_layers):
            by_name[cache.past].set_partial_shape(self._ov.PartialShape([-1, kv_heads, BLOCK, head_dim]))
        for name in _UNUSED:
            model.remove_parameter(by_name[name])
        model.validate_nodes_and_infer_types()

    def _parameter(self, name: str, shape: list[int], dtype: str) -> Any:
        parameter = self._ops.parameter(self._ov.PartialShape(shape), getattr(self._ov.Type, dtype), name=name)
        parameter.output(0).set_names({name})
        return parameter

    def _matmul(self, node: _Node) -> list[Any]:
        """x times a block-quantized matrix transposed. OpenVINO keeps such weights as integers in memory."""
        ops, (n, k) = self._ops, (node.get_attribute("N"), node.get_attribute("K"))
        bits, size = node.get_attribute("bits"), node.get_attribute("block_size")
        values, groups = node.get_input(1), k // size
        zeros = ops.constant(np.full((1, 1, 1), 1 << bits - 1, np.uint8)).output(0)
        if node.get_input_size() > 3:
            zeros = self._zero_points(node.get_input(3), bits, n, groups)
        if bits == 4:
            values = self._nibbles(values, (n, groups, size))
        scales = ops.reshape(node.get_input(2), self._shape(n, groups, 1), False)
        centred = ops.subtract(ops.convert(values, "f32"), ops.convert(zeros, "f32"))
        weight = ops.reshape(ops.multiply(centred, scales), self._shape(n, k), False)
        return [ops.matmul(node.get_input(0), weight, False, True).output(0)]

    def _zero_points(self, packed: Any, bits: int, n: int, groups: int) -> Any:
        """`[n, groups, 1]` of uint8, from one byte or half a byte each."""
        values = packed.get_node().data.reshape(n, -1)
        if bits == 4:
            values = np.stack([values & 15, values >> 4], -1).reshape(n, -1)
        return self._ops.constant(np.ascontiguousarray(values[:, :groups, None])).output(0)

    def _nibbles(self, packed: Any, shape: tuple[int, ...]) -> Any:
        """4-bit integers over a copy of their bytes; OpenVINO only refers to it."""
        from openvino.op import Constant

        data = packed.get_node().data.copy()
        self._kept.append(data)
        return Constant(self._ov.Tensor(data, self._ov.Shape(list(shape)), self._ov.Type.u4)).output(0)

    def _embedding(self, node: _Node) -> list[Any]:
        """Rows of a block-quantized table."""
        ops, dims, size = self._ops, self._dims, node.get_attribute("block_size")
        if node.get_attribute("bits") != 8:
            raise self._refused("a 4-bit embedding")
        groups, ids, axis = dims.hidden_size // size, node.get_input(1), self._shape(0)
        rows = ops.reshape(ops.gather(node.get_input(0), ids, axis), self._shape(-1, groups, size), False)
        flat = ops.reshape(node.get_input(2), self._shape(dims.vocab_size, groups, 1), False)
        scales = ops.gather(flat, ids, axis)
        zeros = ops.constant(np.float32(128)).output(0)
        if node.get_input_size() > 3:
            points = self._zero_points(node.get_input(3), 8, dims.vocab_size, groups)
            zeros = ops.convert(ops.gather(points, ids, axis), "f32").output(0)
        wide = ops.multiply(ops.subtract(ops.convert(rows, "f32"), zeros), scales)
        return [ops.reshape(wide, self._shape(-1, dims.hidden_size), False).output(0)]

    def _silu(self, node: _Node) -> list[Any]:
        """QuickGelu(x) = x * sigmoid(alpha * x); the graph's alpha is 1."""
        if node.get_attribute("alpha", 1.702) != 1:
            raise self._refused("QuickGelu with another alpha than 1")
        return [self._ops.swish(node.get_input(0)).output(0)]

    def _attention(self, node: _Node) -> list[Any]:
        """Rotary embedding and PagedAttention; placeholders for its own inputs, and for the caches' outputs."""
        ops, dims = self._ops, self._dims
        for name in ("softcap", "rotary_interleaved", "smooth_softmax"):
            if node.get_attribute(name, 0):
                raise self._refused(f"GroupQueryAttention with {name}")
        for idx, name in ((10, "attention_bias"), (11, "head_sink")):
            if node.get_input_size() > idx and node.get_input(idx).get_node().get_type_name() != "NullNode":
                raise self._refused(f"GroupQueryAttention with {name}")
        heads, kv_heads, head_dim = dims.num_heads, dims.num_kv_heads, dims.head_dim
        query_and_key, value = self._query_key_value(node)
        if node.get_attribute("do_rotary", 0):
            query_and_key = self._rotate(query_and_key, node.get_input(7), node.get_input(8))
        parts = ops.variadic_split(query_and_key, self._shape(1), self._shape(heads, kv_heads))
        from openvino.op import _PagedAttentionExtension

        window = max(0, node.get_attribute("local_window_size", -1))
        given = [
            ops.reshape(part, self._shape(-1, num * head_dim), False)
            for part, num in ((parts.output(0), heads), (parts.output(1), kv_heads), (value, kv_heads))
        ]
        scale = node.get_attribute("scale", 0.0) or head_dim**-0.5
        inputs = [
            *(one.output(0) for one in given),
            node.get_input(3),
            node.get_input(4),
            *self._settings(scale, window),
        ]
        attention = _PagedAttentionExtension(inputs)
        self._attentions.append(attention)
        placeholder = ops.constant(np.float32(0)).output(0)
        return [ops.unsqueeze(attention.output(0), self._shape(0)).output(0), placeholder, placeholder]

    def _query_key_value(self, node: _Node) -> tuple[Any, Any]:
        """Query and key `[T, heads + kv_heads, head_dim]`, whose rotation is the same, and value."""
        ops, dims = self._ops, self._dims
        heads, kv_heads, head_dim = dims.num_heads, dims.num_kv_heads, dims.head_dim
        if node.get_input(1).get_node().get_type_name() == "NullNode":
            packed = ops.reshape(node.get_input(0), self._shape(-1, heads + 2 * kv_heads, head_dim), False)
            parts = ops.variadic_split(packed, self._shape(1), self._shape(heads + kv_heads, kv_heads))
            return parts.output(0), parts.output(1)
        query, key, value = (
            ops.reshape(node.get_input(idx), self._shape(-1, num, head_dim), False)
            for idx, num in enumerate((heads, kv_heads, kv_heads))
        )
        return ops.concat([query, key], 1).output(0), value.output(0)

    def _rotate(self, x: Any, cos_table: Any, sin_table: Any) -> Any:
        """Rotate pairs (i, i + half) by their position's angle; the tables have `half` columns."""
        ops, half = self._ops, cos_table.get_partial_shape()[1].get_length()
        name = cos_table.get_node().get_friendly_name()
        if name not in self._angles:
            first = ops.constant(np.zeros(1, np.int64))  # `_page` puts the positions here
            cos, sin = (
                ops.unsqueeze(ops.gather(table, first, self._shape(0)), self._shape(1))
                for table in (cos_table, sin_table)
            )
            self._angles[name] = cos, sin
        cos, sin = self._angles[name]
        rest = self._dims.head_dim - 2 * half
        parts = ops.variadic_split(x, self._shape(2), self._shape(half, half, rest))
        a, b = parts.output(0), parts.output(1)
        turned = [
            ops.subtract(ops.multiply(a, cos), ops.multiply(b, sin)).output(0),
            ops.add(ops.multiply(b, cos), ops.multiply(a, sin)).output(0),
        ]
        return ops.concat([*turned, parts.output(2)] if rest else turned, 2).output(0)

    def _rotary(self, node: _Node) -> list[Any]:
        """The graph has it where ONNX Runtime's attention cannot rotate; it takes its positions from padded rows."""
        raise self._refused("RotaryEmbedding")

    def _settings(self, scale: float, window: int) -> list[Any]:
        """PagedAttention's inputs behind the caches: 5 to 8 and 12 are placeholders, see PAGED_INPUTS; what is empty or
        0 switches something off that is not used here (score outputs, cache rotation, sparse attention, sinks)."""
        number, decimal, none = np.int32, np.float32, np.zeros(0, np.int32)
        no_floats, no_bytes = np.zeros(0, np.float32), np.zeros(0, np.uint8)
        values = [
            *(np.array([0], np.int32), np.array([0, 1], np.int32), np.array([0], np.int32), np.array([0, 1], np.int32)),
            *(decimal(scale), number(window), no_floats, number(1)),  # the third: ALiBi slopes
            *(none, none, none, no_floats),  # score aggregation; rotated blocks, their deltas and table
            *(no_floats, number(64), number(8), no_floats),  # sparse attention: threshold, block, stride; sinks
            *(number(0), none, none, none, none, no_bytes, none),  # cache eviction, token types, tree attention
        ]
        return [self._ops.constant(value).output(0) for value in values]

    def _refused(self, what: str) -> ValueError:
        """The error of a conversion that cannot be made; `read` says why."""
        self._refusal = what
        return ValueError(what)

    def _shape(self, *sizes: int) -> Any:
        return self._ops.constant(np.array(sizes if len(sizes) > 1 else sizes[0], np.int32))


def num_blocks(capacity: int) -> int:
    """Blocks that hold a slot of so many tokens."""
    return -(-capacity // BLOCK)


def cache_shape(dims: ModelDims, num_slots: int, capacity: int) -> tuple[int, ...]:
    """Of every cache tensor: the blocks of all slots, one slot after another."""
    return (num_slots * num_blocks(capacity), dims.num_kv_heads, BLOCK, dims.head_dim)
