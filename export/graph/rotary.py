"""Writes the cosine and sine tables of a decoder's rotary embeddings as initializers."""

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.model.description import ModelConfig, Rotary
from export.model.reference.forward import rotary_tables


class RotaryTables(NamedTuple):
    """cos and sin `[max_len + 1, rotary dim / 2]`."""

    cos: ir.Value
    sin: ir.Value


def rotary_initializers(
    g: GraphBuilder, config: ModelConfig, max_len: int, dtype: np.dtype[Any]
) -> dict[Rotary, RotaryTables]:
    """Write a pair of tables for every rotary embedding of the blocks.

    They have one position more than a slot, because a run may write a padding token after a full slot.
    """
    found = {}
    for idx, (rotary, tables) in enumerate(rotary_tables(config, max_len + 1).items()):
        name = f"rope.{idx}" if idx else "rope"
        cos = g.array(f"{name}.cos", tables.cos.astype(dtype, copy=False))
        sin = g.array(f"{name}.sin", tables.sin.astype(dtype, copy=False))
        found[rotary] = RotaryTables(cos, sin)
    return found
