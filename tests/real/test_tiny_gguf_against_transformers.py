"""Tiny GGUF files of each architecture hold the tensors and the config that transformers reads from them."""

from pathlib import Path

import numpy as np
import pytest

from export.checkpoint.gguf.file import GgufCheckpoint
from tests.support.tiny.gguf import HEAD_DIM, TinyGguf, hugging_face_tensors

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_tiny_models_are_what_transformers_loads(tmp_path: Path, arch: str) -> None:
    """Names, values and dimensions of each architecture, head untied."""
    pytest.importorskip("torch", reason="the oracle needs torch")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    biases = ("attn_q", "attn_k", "attn_v") if arch == "qwen2" else ()
    tensors = hugging_face_tensors(arch=arch, tied=False, biases=biases)
    extra = {f"{arch}.rope.dimension_count": HEAD_DIM}
    checkpoint = GgufCheckpoint(TinyGguf(arch=arch, tensors=tensors, extra=extra).write(tmp_path / "tiny.gguf"))
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    if arch == "qwen3":
        config.head_dim = HEAD_DIM  # transformers takes Qwen3's usual 128, whatever the file says
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="tiny.gguf",
        config=config,
        dtype="float32",
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    assert set(theirs) == set(checkpoint.tensors)
    for name, value in theirs.items():
        np.testing.assert_array_equal(checkpoint.load(name), value, err_msg=name)
    for key in ("model_type", "hidden_size", "num_key_value_heads", "rope_parameters", "tie_word_embeddings"):
        assert checkpoint.config[key] == getattr(config, key), key
