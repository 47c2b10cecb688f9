"""Fused checkpoints: each layer's numbers under its own name, no more read than needed, errors in the file's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from export.checkpoint.fused import FusedView, Split
from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.model.checks.tensors import check_tensors
from export.model.families.architectures import parse_config
from export.schemes.forms import Blocks
from export.storage.blocks import quantize_rows
from export.storage.quantized_rows import ImportedRows
from runtime.errors import InvalidCheckpoint, UnsupportedModel
from tests.support.tiny.checkpoint import config_of, write_checkpoint

QKV = Split("self_attn.qkv_proj", (("self_attn.q_proj", 8), ("self_attn.k_proj", 4), ("self_attn.v_proj", 4)))
GATE_UP = Split("mlp.gate_up_proj", (("mlp.gate_proj", None), ("mlp.up_proj", None)))
GPT2 = (
    Split("attn.c_attn", tuple((f"self_attn.{part}_proj", None) for part in "qkv"), transposed=True),
    Split("attn.c_proj", (("self_attn.o_proj", None),), transposed=True),
)
RENAMES = {"transformer.h": "model.layers", "transformer.wte": "model.embed_tokens", "ln_1": "input_layernorm"}
EXPERTS = Split("mlp.experts.gate_up_proj", (("mlp.experts.{}.gate", None), ("mlp.experts.{}.up", None)), experts=True)


class Arrays(Checkpoint):
    """A checkpoint in memory that notes what is read."""

    def __init__(self, arrays: Mapping[str, NDArray[np.float32]], bits: int | None = None) -> None:
        self.arrays, self.bits = arrays, bits
        self.reads: list[tuple[str, int, int]] = []

    @property
    def source(self) -> str:
        return "arrays"

    @property
    def config(self) -> Mapping[str, Any]:
        return {"model_type": "tiny"}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        kind = "F32" if self.bits is None else f"{self.bits} bits"
        return {name: TensorInfo(array.shape, kind) for name, array in self.arrays.items()}

    @property
    def stored_bits(self) -> int | None:
        return self.bits

    def load(self, name: str) -> NDArray[np.float32]:
        return self.load_rows(name, 0, len(self.arrays[name]))

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        self.reads.append((name, start, stop))
        return self.arrays[name][start:stop]

    def text_files(self) -> Mapping[str, str]:
        return {"tokenizer.json": "{}"}

    def imported(self, name: str) -> ImportedRows | None:
        if self.bits is None or self.arrays[name].ndim != 2:
            return None
        rows = quantize_rows(self.arrays[name], bits=4, block_size=16, symmetric=False)
        return ImportedRows(rows, Blocks(4, 16, symmetric=False), None)


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_layers_are_row_ranges_of_their_fused_tensor_and_nothing_else_is_read() -> None:
    prefix = "model.layers.0.self_attn"
    base = Arrays(
        {
            f"{prefix}.qkv_proj.weight": random(16, 6),
            f"{prefix}.qkv_proj.bias": random(16, seed=1),
            "model.layers.0.mlp.gate_up_proj.weight": random(10, 6, seed=2),
            "model.norm.weight": random(6, seed=3),
        }
    )
    view = FusedView(base, (QKV, GATE_UP))
    assert {name.removeprefix("model.layers.0."): info.shape for name, info in view.tensors.items()} == {
        "self_attn.q_proj.weight": (8, 6),
        "self_attn.k_proj.weight": (4, 6),
        "self_attn.v_proj.weight": (4, 6),
        "self_attn.q_proj.bias": (8,),
        "self_attn.k_proj.bias": (4,),
        "self_attn.v_proj.bias": (4,),
        "mlp.gate_proj.weight": (5, 6),
        "mlp.up_proj.weight": (5, 6),
        "model.norm.weight": (6,),
    }
    assert not base.reads
    key = view.load(f"{prefix}.k_proj.weight")
    key_value = base.arrays[f"{prefix}.qkv_proj.weight"][8:]
    assert base.reads == [(f"{prefix}.qkv_proj.weight", 8, 12)]
    np.testing.assert_array_equal(key, key_value[:4])
    np.testing.assert_array_equal(view.load(f"{prefix}.v_proj.bias"), base.arrays[f"{prefix}.qkv_proj.bias"][12:])
    np.testing.assert_array_equal(view.load_rows(f"{prefix}.v_proj.weight", 1, 9), key_value[5:])
    np.testing.assert_array_equal(view.load("model.norm.weight"), base.arrays["model.norm.weight"])
    assert (view.source, view.config, view.text_files()) == (base.source, base.config, base.text_files())


def test_transposed_weights_are_turned_and_names_replaced() -> None:
    base = Arrays(
        {
            "transformer.h.0.attn.c_attn.weight": random(6, 18),
            "transformer.h.0.attn.c_attn.bias": random(18, seed=1),
            "transformer.h.0.attn.c_proj.weight": random(6, 6, seed=2),
            "transformer.h.0.ln_1.weight": random(6, seed=3),
            "transformer.wte.weight": random(11, 6, seed=4),
        }
    )
    view = FusedView(base, GPT2, renames=RENAMES)
    prefix = "model.layers.0.self_attn"
    fused = base.arrays["transformer.h.0.attn.c_attn.weight"]
    assert view.tensors[f"{prefix}.k_proj.weight"].shape == (6, 6)
    np.testing.assert_array_equal(view.load(f"{prefix}.k_proj.weight"), fused[:, 6:12].T)
    np.testing.assert_array_equal(view.load_rows(f"{prefix}.v_proj.weight", 2, 4), fused[:, 14:16].T)
    np.testing.assert_array_equal(
        view.load(f"{prefix}.k_proj.bias"), base.arrays["transformer.h.0.attn.c_attn.bias"][6:12]
    )
    np.testing.assert_array_equal(
        view.load(f"{prefix}.o_proj.weight"), base.arrays["transformer.h.0.attn.c_proj.weight"].T
    )
    assert {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} <= set(view.tensors)
    assert view.stored_name(f"{prefix}.q_proj.weight") == "transformer.h.0.attn.c_attn.weight"


def test_stacked_experts_are_read_one_at_a_time() -> None:
    name = "model.layers.3.mlp.experts.gate_up_proj"
    base = Arrays({name: random(4, 10, 6)})
    view = FusedView(base, (EXPERTS,))
    assert len(view.tensors) == 8
    np.testing.assert_array_equal(view.load("model.layers.3.mlp.experts.2.up.weight"), base.arrays[name][2, 5:])
    assert base.reads == [(name, 2, 3)]


def test_a_checkpoint_that_is_split_already_stays_as_it_is() -> None:
    base = Arrays({"model.layers.0.self_attn.q_proj.weight": random(8, 6)})
    assert FusedView(base, (QKV, GATE_UP)).tensors == base.tensors


def test_integers_are_split_with_their_scales_and_zero_points() -> None:
    base = Arrays({"model.layers.0.self_attn.qkv_proj.weight": random(16, 32)}, bits=4)
    view = FusedView(base, (QKV,))
    whole = base.imported("model.layers.0.self_attn.qkv_proj.weight")
    part = view.imported("model.layers.0.self_attn.k_proj.weight")
    assert whole is not None and part is not None
    np.testing.assert_array_equal(part.dequantized(), whole.dequantized()[8:12])
    assert view.stored_bits == 4
    with pytest.raises(UnsupportedModel, match="transposed layers are not supported"):
        FusedView(Arrays({"model.layers.0.attn.c_attn.weight": random(32, 48)}, bits=4), GPT2)


def test_experts_whose_outputs_take_turns() -> None:
    fused = "mlp.experts.gate_up_proj"
    both = (("mlp.experts.{}.gate", None), ("mlp.experts.{}.up", None))
    base = Arrays({f"a.{fused}": random(3, 6, 10), f"a.{fused}_bias": random(3, 10)})
    view = FusedView(base, (Split(fused, both, transposed=True, experts=True, interleaved=True),))
    assert len(view.tensors) == 12 and view.tensors["a.mlp.experts.2.up.weight"].shape == (5, 6)
    for place, part in enumerate(("gate", "up")):
        weight, bias = base.arrays[f"a.{fused}"][2].T[place::2], base.arrays[f"a.{fused}_bias"][2, place::2]
        np.testing.assert_array_equal(view.load(f"a.mlp.experts.2.{part}.weight"), weight)
        np.testing.assert_array_equal(view.load_rows(f"a.mlp.experts.2.{part}.weight", 1, 4), weight[1:4])
        np.testing.assert_array_equal(view.load(f"a.mlp.experts.2.{part}.bias"), bias)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a.self_attn.qkv_proj.weight": random(15, 6)}, r"a\.self_attn\.qkv_proj\.weight has 15 outputs.*k_proj 4"),
        ({"a.self_attn.qkv_proj.bias": random(17)}, r"qkv_proj\.bias has 17 outputs"),
        ({"a.mlp.gate_up_proj.weight": random(5, 6)}, r"gate_up_proj\.weight has 5 outputs.*gate_proj an equal share"),
        ({"a.self_attn.qkv_proj.weight": random(16)}, r"the shape \[16\]; this architecture means one of 2 dimensions"),
        (
            {"a.self_attn.q_proj.weight": random(8, 6), "a.self_attn.qkv_proj.weight": random(16, 6)},
            r"a\.self_attn\.q_proj\.weight and a\.self_attn\.qkv_proj\.weight both hold a\.self_attn\.q_proj\.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_the_names_of_the_file(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        FusedView(Arrays(arrays), (QKV, GATE_UP))


def test_a_missing_layer_is_named_as_the_file_would() -> None:
    view = FusedView(Arrays({}), (EXPERTS, *GPT2), renames=RENAMES)
    assert (
        view.stored_name("model.layers.7.mlp.experts.12.up.weight") == "transformer.h.7.mlp.experts.gate_up_proj.weight"
    )
    with pytest.raises(InvalidCheckpoint, match=r"no tensor 'transformer\.h\.1\.attn\.c_attn\.bias'"):
        view.load("model.layers.1.self_attn.v_proj.bias")


def test_a_directory_reads_rows_and_says_where_one_is_not_finite(tmp_path: Path) -> None:
    weight = random(16, 6).astype(np.float16)
    weight[9, 2] = np.nan
    save_file({"x.self_attn.qkv_proj.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    view = FusedView(SafetensorsCheckpoint(tmp_path, commit="c0ffee"), (QKV,))
    assert view.commit == "c0ffee"
    np.testing.assert_array_equal(view.load("x.self_attn.q_proj.weight"), weight[:8].astype(np.float32))
    with pytest.raises(InvalidCheckpoint, match=r"x\.self_attn\.qkv_proj\.weight' holds nan at \[9, 2\]"):
        view.load("x.self_attn.k_proj.weight")


def test_the_check_of_tensors_speaks_of_the_files_names(tmp_path: Path) -> None:
    raw = config_of("llama")
    plain = SafetensorsCheckpoint(write_checkpoint(tmp_path, raw))
    config = parse_config(raw)
    arrays = {name: plain.load(name) for name in plain.tensors}
    gate, up = (arrays.pop(f"model.layers.0.mlp.{part}_proj.weight") for part in ("gate", "up"))
    fused = "model.layers.0.mlp.gate_up_proj.weight"
    check_tensors(FusedView(Arrays({**arrays, fused: np.concatenate([gate, up])}), (GATE_UP,)), config)
    with pytest.raises(InvalidCheckpoint, match=r"there is no tensor model\.layers\.0\.mlp\.gate_up_proj\.weight;"):
        check_tensors(FusedView(Arrays(arrays), (GATE_UP,)), config)
    with pytest.raises(InvalidCheckpoint, match=r"gate_proj.weight \(.*gate_up_proj.weight in the file\) has"):
        check_tensors(FusedView(Arrays({**arrays, fused: gate}), (GATE_UP,)), config)
