"""Constants of a family's code are folded into the checkpoint's tensors, however they are read."""

from pathlib import Path

import numpy as np

from export.checkpoint.scaled import ScaledView
from export.sources.open import open_checkpoint
from tests.support.tiny.checkpoint import config_of, write_checkpoint


def test_only_the_named_tensors_are_multiplied(tmp_path: Path) -> None:
    base = open_checkpoint(write_checkpoint(tmp_path / "model", config_of("llama-biases")))
    view = ScaledView(base, {"self_attn.k_proj.weight": 0.5, "k_proj.bias": 3.0})
    for name in base.tensors:
        factor = 0.5 if name.endswith("self_attn.k_proj.weight") else 3 if name.endswith("k_proj.bias") else 1
        np.testing.assert_array_equal(view.load(name), base.load(name) * np.float32(factor))
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(view.load_rows(name, 3, 7), base.load(name)[3:7] * np.float32(0.5))
    np.testing.assert_array_equal(np.concatenate(list(view.pieces(name))), view.load(name))
    assert view.tensors == base.tensors and view.imported(name) is None
