"""Tiny checkpoints as GPTQ and AWQ tools write them, packed bit by bit from the formats' descriptions.

Independent of export/: plain loops over single values, the way the tools' own reference packers go.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.support.tiny.checkpoint import write_checkpoint

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What a tool was told. `group_size` -1 is the whole row."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"
    declares_format: bool = True
    has_g_idx: bool = True

    def config(self) -> dict[str, Any]:
        """quantization_config."""
        if self.method == "awq":
            return {
                "quant_method": "awq",
                "bits": self.bits,
                "group_size": self.group_size,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": None,
            }
        config = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "damp_percent": 0.01,
            "true_sequential": True,
        }
        return config | ({"checkpoint_format": self.checkpoint_format} if self.declares_format else {})


def packed_layer(
    module: str, n: int, k: int, packing: Packing, rng: np.random.Generator, group_of: NDArray[np.int32]
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """A random layer's tensors, and the float32 weight `[n, k]` that they mean."""
    top = 2**packing.bits - 1
    num_groups = int(group_of.max()) + 1
    values = rng.integers(0, top + 1, (n, k))
    is_v1 = packing.method == "gptq" and packing.checkpoint_format == "gptq"
    zeros = rng.integers(1 if is_v1 else 0, top + 1, (n, num_groups))
    if packing.sym and packing.method == "gptq":
        zeros[:] = 2 ** (packing.bits - 1)
    scales = (rng.uniform(0.5, 1.5, (n, num_groups)) / (np.sqrt(k) * top / 3)).astype(np.float16)
    weight = np.empty((n, k), np.float32)
    for column in range(k):
        group = group_of[column]
        weight[:, column] = (values[:, column] - zeros[:, group]) * scales[:, group].astype(np.float32)
    per_word = 32 // packing.bits
    if packing.method == "awq":
        tensors: dict[str, NDArray[Any]] = {
            "qweight": words_along_columns(values.T, packing.bits, AWQ_ORDER),
            "qzeros": words_along_columns(zeros.T, packing.bits, AWQ_ORDER),
        }
    else:
        straight = list(range(per_word))
        tensors = {
            "qweight": words_along_columns(values, packing.bits, straight).T,
            "qzeros": words_along_columns((zeros - is_v1).T, packing.bits, straight),
        }
        if packing.has_g_idx:
            tensors["g_idx"] = group_of
    tensors["scales"] = scales.T
    return {f"{module}.{part}": np.ascontiguousarray(array) for part, array in tensors.items()}, weight


def words_along_columns(numbers: NDArray[np.int64], bits: int, order: list[int]) -> NDArray[np.int32]:
    """Pack each row: of every 32 / bits columns, number order[i] goes to bits i * bits and up of one int32."""
    rows, columns = numbers.shape
    per_word = 32 // bits
    words = np.zeros((rows, columns // per_word), np.uint32)
    for row in range(rows):
        for word in range(columns // per_word):
            total = 0
            for place in range(per_word):
                total |= int(numbers[row, word * per_word + order[place]]) << (place * bits)
            words[row, word] = total
    return words.view(np.int32)


def write_quantized(
    directory: Path, config: dict[str, Any], packing: Packing, *, seed: int = 0, keep: tuple[str, ...] = ()
) -> dict[str, NDArray[np.float32]]:
    """Write a model whose layers' projections are packed, but those in `keep`; returns every weight as float32."""
    write_checkpoint(directory, config, seed=seed)
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any]] = {}
    weights: dict[str, NDArray[np.float32]] = {}
    orders: dict[int, NDArray[np.int32]] = {}
    for name, array in load_file(directory / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or name.endswith(keep):
            tensors[name] = array.astype(np.float16)
            weights[name] = tensors[name].astype(np.float32)
            continue
        n, k = array.shape
        group_of = (np.arange(k) // (k if packing.group_size == -1 else packing.group_size)).astype(np.int32)
        if packing.desc_act:  # one order for each width; real layers share it where they share an input
            group_of = orders.setdefault(k, group_of[rng.permutation(k)])
        parts, weights[name] = packed_layer(module, n, k, packing, rng, group_of)
        tensors |= parts
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": packing.config()}))
    return weights
