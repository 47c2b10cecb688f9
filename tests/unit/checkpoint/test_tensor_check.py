"""Every tensor of a checkpoint is used, known to have no effect, or named in a refusal, whatever its format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from export.checkpoint.quantized.checkpoint import open_directory
from export.model.checks.model_reading import read_model
from export.model.checks.tensors import expected_tensors
from export.model.families.architectures import parse_config
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint, UnsupportedModel
from tests.support.tiny.checkpoint import VARIANTS, config_of, shapes_of, write_checkpoint
from tests.support.tiny.gguf import TinyGguf, hugging_face_tensors
from tests.support.tiny.quantized import Packing, write_quantized

Tensors = dict[str, NDArray[Any]]
LAYER = "model.layers.1"


def changed(directory: Path, change: Callable[[Tensors], object], **config: Any) -> Path:
    """A tiny llama whose tensors were changed."""
    write_checkpoint(directory, config_of("llama", **config))
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def put(name: str, value: NDArray[Any]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    """Every tensor whose name begins with `old`."""

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith(old):
                tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_each_family_expects_is_what_its_checkpoints_have(variant: str, tmp_path: Path) -> None:
    assert expected_tensors(parse_config(config_of(variant))) == shapes_of(config_of(variant))
    read_model(open_checkpoint(write_checkpoint(tmp_path, config_of(variant))))


ONES = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (put(f"{LAYER}.self_attn.q_proj.bias", ONES), ["q_proj.bias", "set attention_bias"]),
        (put(f"{LAYER}.mlp.down_proj.bias", ONES), ["down_proj.bias", "mlp_bias"]),
        (put(f"{LAYER}.self_attn.q_norm.weight", np.ones(16, np.float32)), ["q_norm", "another family"]),
        (put("model.layers.3.input_layernorm.weight", ONES), ["layers.3", "num_hidden_layers is too small"]),
        (put(f"{LAYER}.self_attn.q_proj.lora_A.weight", ONES), ["lora_A", "merge it"]),
        (put(f"{LAYER}.mlp.up_proj.weight_scale", ONES), ["weight_scale", "quantization_config"]),
        (put("model.norm.bias", ONES), ["model.norm.bias"]),
        (put("score.weight", ONES), ["score.weight"]),
        (put(f"{LAYER}.self_attn.q_proj.bias", np.zeros(8, np.float32)), ["q_proj.bias"]),
        (put(f"{LAYER}.self_attn.q_proj.bias", np.zeros(64, np.int32)), ["q_proj.bias"]),
        (put("extra.bias", np.zeros((), np.float32)), ["extra.bias"]),
        (drop(f"{LAYER}.mlp.up_proj.weight"), ["no tensor model.layers.1.mlp.up_proj.weight"]),
        (drop("model.norm.weight"), ["no tensor model.norm.weight"]),
        (drop("lm_head.weight"), ["no tensor lm_head.weight", "tie_word_embeddings"]),
        (drop("model.embed_tokens.weight"), ["no tensor model.embed_tokens.weight"]),
        (rename("model.", "bert."), ["model.embed_tokens.weight", "has no place for", "causal language model"]),
        (rename(f"{LAYER}.", "model.layers.7."), ["no tensor model.layers.1.", "and 6 more", "layers.7."]),
        (put("model.embed_tokens.weight", np.ones((328, 64), np.float32)), ["328 rows, and vocab_size is 320"]),
        (put("lm_head.weight", np.ones((312, 64), np.float32)), ["312 rows, and vocab_size is 320"]),
        (put(f"{LAYER}.mlp.up_proj.weight", np.ones((64, 96), np.float32)), ["[64, 96], and", "means [96, 64]"]),
        (put(f"{LAYER}.mlp.up_proj.weight", np.ones(96, np.float32)), ["up_proj", "[96]"]),
        (put("model.norm.weight", np.ones(64, np.float64)), ["model.norm.weight is stored as F64"]),
        (put("model.norm.weight", np.ones(64, np.int8)), ["model.norm.weight is stored as I8"]),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[Tensors], object], reasons: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        read_model(open_checkpoint(changed(tmp_path, change)))
    for reason in reasons:
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        put("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(8, np.float32)),
        put("model.rotary_emb.inv_freq", np.ones(8, np.float32)),
        put("model.layers.0.self_attn.rotary_emb.cos_cached", np.ones((1, 1, 9, 16), np.float32)),
        put("model.causal_mask", np.ones((4, 4), np.bool_)),
        put("model.position_ids", np.arange(9)[None]),
        # As AutoGPTQ and others write them for every layer.
        put(f"{LAYER}.self_attn.o_proj.bias", np.zeros(64, np.float16)),
        put(f"{LAYER}.mlp.up_proj.bias", np.zeros(96, np.float32)),
        # A base model's names have no prefix.
        rename("model.", ""),
    ],
)
def test_a_tensor_without_effect_is_let_be(change: Callable[[Tensors], object], tmp_path: Path) -> None:
    read_model(open_checkpoint(changed(tmp_path, change)))


def test_biases_that_the_config_promises_must_be_there(tmp_path: Path) -> None:
    path = changed(tmp_path, drop(f"{LAYER}.self_attn.k_proj.bias"), attention_bias=True)
    with pytest.raises(InvalidCheckpoint, match=r"no tensor model\.layers\.1\.self_attn\.k_proj\.bias"):
        read_model(open_checkpoint(path))


def test_a_second_lm_head_must_equal_the_embedding_that_it_is_tied_to(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    equal = changed(
        tmp_path / "equal",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
        **tied,
    )
    assert read_model(open_checkpoint(equal)).tie_word_embeddings
    other = changed(tmp_path / "other", put("lm_head.weight", np.ones((320, 64), np.float32)), **tied)
    with pytest.raises(InvalidCheckpoint, match=r"lm_head\.weight differs .* set that to false .* or remove"):
        read_model(open_checkpoint(other))
    longer = changed(tmp_path / "longer", put("lm_head.weight", np.ones((328, 64), np.float32)), **tied)
    with pytest.raises(InvalidCheckpoint, match=r"lm_head\.weight differs"):
        read_model(open_checkpoint(longer))


@pytest.mark.parametrize(("old", "new"), [("", "language_model."), ("model.", "model.language_model.")])
def test_the_prefix_of_a_multimodal_model_is_left_out(old: str, new: str, tmp_path: Path) -> None:
    plain = open_checkpoint(changed(tmp_path / "plain", lambda tensors: None))
    prefixed = open_checkpoint(changed(tmp_path / "prefixed", rename(old, new)))
    assert read_model(prefixed) == read_model(plain)
    for name in plain.tensors:
        np.testing.assert_array_equal(prefixed.load(name), plain.load(name))


def test_a_tensor_with_and_without_that_prefix_is_there_twice(tmp_path: Path) -> None:
    path = changed(tmp_path, put(f"language_model.{LAYER}.input_layernorm.weight", ONES))
    with pytest.raises(InvalidCheckpoint, match=r"model\.layers\.1\.input_layernorm\.weight' twice"):
        open_checkpoint(path)


def test_other_parts_of_a_multimodal_model_are_named(tmp_path: Path) -> None:
    path = changed(tmp_path, put("vision_tower.patch_embed.weight", np.ones((4, 4), np.float32)))
    with pytest.raises(InvalidCheckpoint, match=r"no place for vision_tower\.patch_embed\.weight"):
        read_model(open_checkpoint(path))


@pytest.mark.parametrize("packing", [Packing(), Packing(method="awq")], ids=["gptq", "awq"])
def test_quantized_checkpoints_are_held_to_the_same(packing: Packing, tmp_path: Path) -> None:
    # Sizes that the packings divide.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    write_quantized(tmp_path, config_of("llama", **sizes), packing)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    first = "model.layers.0.self_attn.q_proj"

    def with_change(change: Callable[[Tensors], object]) -> None:
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, file)
        read_model(open_directory(tmp_path))

    with_change(put(f"{first}.bias", np.zeros(64, np.float16)))
    for change, reason in (
        (put(f"{first}.bias", np.ones(64, np.float16)), f"no place for {first}.bias"),
        (put("model.layers.0.mlp.up_proj.unknown", ONES), "up_proj.unknown"),
        (put(f"{first}.weight", np.ones((64, 64), np.float16)), f"both {first}.weight and its quantized form"),
        (drop(f"{first}.qweight"), f"no tensor {first}.weight"),
        (drop("model.layers.0.input_layernorm.weight"), "input_layernorm"),
    ):
        with pytest.raises(InvalidCheckpoint, match=reason.replace(".", r"\.")):
            with_change(change)
    scales = np.array(whole[f"{first}.scales"])
    scales[0, 1] = np.nan
    save_file({**whole, f"{first}.scales": scales}, file)
    with pytest.raises(InvalidCheckpoint, match=r"q_proj\.scales' holds nan at \[0, 1\]"):
        open_directory(tmp_path).load(f"{first}.weight")


def test_packed_weights_without_a_quantization_config_are_named(tmp_path: Path) -> None:
    write_quantized(tmp_path, config_of("llama", num_hidden_layers=1), Packing())
    for config in (
        config_of("llama", num_hidden_layers=1),
        config_of("llama", num_hidden_layers=1, quantization_config=None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InvalidCheckpoint, match=r"qweight.*quantization_config does not describe"):
            read_model(open_checkpoint(tmp_path))


def test_gguf_files_are_held_to_the_same(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(tied=False)

    def read(name: str, **fields: Any) -> None:
        read_model(open_checkpoint(TinyGguf(**fields).write(tmp_path / f"{name}.gguf")))

    read("whole", tensors=tensors)
    read("zero", tensors=tensors, raw_tensors={"blk.1.ffn_up.bias": np.zeros(96, np.float32)})
    for name, fields, reason in (
        ("bias", {"raw_tensors": {"blk.1.ffn_up.bias": np.ones(96, np.float32)}}, "no place for .*up_proj.bias"),
        ("norm", {"raw_tensors": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}}, "no place for .*q_norm"),
        ("deep", {"raw_tensors": {"blk.2.attn_norm.weight": ONES}}, "no place for model.layers.2"),
        ("lack", {"tensors": {k: v for k, v in tensors.items() if "1.mlp.up" not in k}}, "no tensor .*1.mlp.up_proj"),
        ("size", {"extra": {"llama.feed_forward_length": 128}}, r"has the shape \[96, 64\]"),
        ("wide", {"extra": {"llama.attention.head_count": 8}}, "has the shape"),
    ):
        with pytest.raises(InvalidCheckpoint, match=reason):
            read(name, **({"tensors": tensors} | fields))
    tensors["model.norm.weight"][5] = np.inf
    with pytest.raises(InvalidCheckpoint, match=r"tensor 'model\.norm\.weight' holds inf at \[5\]"):
        open_checkpoint(TinyGguf(tensors=tensors).write(tmp_path / "inf.gguf")).load("model.norm.weight")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_number_that_is_not_finite_is_named_where_it_is_read(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ml_dtypes  # noqa: F401  # numpy knows bfloat16 by it

    monkeypatch.setattr("export.storage.tensor_file.CHUNK_BYTES", 64)
    norms = np.ones((8, 9), np.dtype(dtype))
    norms[6, 7] = -np.inf
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": norms}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"tensor 'a' holds -inf at \[6, 7\]"):
        open_checkpoint(tmp_path).load("a")


def test_a_type_without_a_reader_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    path = changed(tmp_path, put("model.norm.weight", np.ones(64, np.float64)))
    with pytest.raises(UnsupportedModel, match="supported: F32, F16 and BF16"):
        read_model(open_checkpoint(path))
