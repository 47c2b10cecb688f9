"""LoRA adapters are merged as PEFT merges them, and the artifact says which.

The files in tests/support/tiny/recorded/peft/ come from record_peft.py beside them, which ran PEFT on tiny models.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.artifact.identity import default_name
from export.checkpoint.lora.adapter import Lora, parse_lora
from export.model.checks.model_reading import read_model
from export.model.families.architectures import as_described
from export.model.reference.forward import run_reference
from export.pipeline.export_model import ExportOptions, export_model
from export.sources.open import open_checkpoint
from runtime.artifact.manifest import open_artifact
from runtime.backends.ort.session import OrtSession
from runtime.errors import HeadraceError, InvalidCheckpoint, InvalidSetting, UnsupportedModel
from tests.support.session_runs import LOGIT_TOLERANCE, run_in_pieces
from tests.support.tiny.recorded.record import IDS
from tests.support.tiny.recorded.record_peft import ADAPTERS, CASES, WEIGHTS


def loras_of(case: str) -> tuple[Lora, ...]:
    """The recorded adapters. A single one without a name is saved beside the model."""
    adapters = sorted((ADAPTERS / case).glob("adapter-?"))
    weights = WEIGHTS if len(adapters) > 1 else [1.0]
    return tuple(Lora(path, weight) for path, weight in zip(adapters, weights, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_those_of_pefts_merge(case: str) -> None:
    checkpoint = open_checkpoint(ADAPTERS / case, loras=loras_of(case))
    expected = load_file(ADAPTERS / case / "expected.safetensors")
    logits = expected.pop("logits")
    for name, weight in expected.items():
        # float32 sums of a few products, of terms near 1.
        np.testing.assert_allclose(checkpoint.load(name), weight, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(checkpoint.load_rows(name, 3, 9), weight[3:9], atol=1e-6, err_msg=name)
    own = run_reference(as_described(checkpoint), read_model(checkpoint), [IDS]).logits(0, 0, len(IDS))
    np.testing.assert_allclose(own, logits, atol=LOGIT_TOLERANCE)
    base = open_checkpoint(ADAPTERS / case)
    plain = run_reference(as_described(base), read_model(base), [IDS]).logits(0, 0, len(IDS))
    assert np.abs(plain - logits).max() > 0.1, "an adapter that changes nothing would prove nothing"


def test_an_artifact_has_the_adapters_weights_and_says_so(tmp_path: Path) -> None:
    options = ExportOptions(model=str(ADAPTERS / "several"), out=tmp_path / "out", loras=loras_of("several"))
    artifact = export_model(options)
    assert artifact.manifest.source == artifact.manifest.name == "several+adapter-0*0.5+adapter-1*-1.25"
    names = [(entry["name"], entry["weight"], entry["num_changed"]) for entry in artifact.receipt["adapters"]]
    assert names == [("adapter-0", 0.5, 7), ("adapter-1", -1.25, 2)]
    assert all(len(entry["sha256"]) == 64 for entry in artifact.receipt["adapters"])
    session = OrtSession.open(open_artifact(tmp_path / "out"), num_slots=4, capacity=32)
    expected = load_file(ADAPTERS / "several" / "expected.safetensors")["logits"]
    np.testing.assert_allclose(run_in_pieces(session, np.array(IDS), [len(IDS)]), expected, atol=LOGIT_TOLERANCE)
    # Without the adapters, or with other weights, it is another model.
    for loras in ((), (Lora(options.loras[0].path), options.loras[1])):
        with pytest.raises(InvalidSetting, match=r"holds several\+adapter-0\*0\.5\+adapter-1\*-1\.25 \(fp32\)"):
            export_model(ExportOptions(model=options.model, out=options.out, loras=loras))


def test_a_reference_that_does_not_know_the_adapters_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = ExportOptions(
        model=str(ADAPTERS / "plain"), out=tmp_path / "out", loras=loras_of("plain"), verify="transformers"
    )
    with pytest.raises(InvalidSetting, match=r"weights of plain\+adapter-0 are merged with adapters"):
        export_model(options)


def test_the_flag(tmp_path: Path) -> None:
    (tmp_path / "a=2").mkdir()
    assert parse_lora("style=0.5") == Lora(Path("style"), 0.5)
    assert parse_lora("style") == Lora(Path("style"))
    assert parse_lora(str(tmp_path / "a=2")) == Lora(tmp_path / "a=2")
    assert parse_lora(f"{tmp_path}/a=2=-1") == Lora(tmp_path / "a=2", -1.0)
    for text in ("style=", "style=x", "style=nan", "style=inf"):
        with pytest.raises(InvalidSetting, match="is not DIR or DIR=WEIGHT"):
            parse_lora(text)
    assert default_name("Model.gguf", (Lora(Path("Style"), 0.5),)) == "model+stylex0.5"


def changed(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def without(part: str) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file({name: array for name, array in load_file(file).items() if part not in name}, file)

    return change


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file({name.replace(old, new): array for name, array in load_file(file).items()}, file)

    return change


def cut(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


REFUSED: dict[str, tuple[str, Callable[[Path], None], type[HeadraceError], str]] = {
    "another method": ("plain", changed(peft_type="IA3"), UnsupportedModel, "peft_type 'IA3' is not supported"),
    "unknown setting": ("plain", changed(use_qalora=True), UnsupportedModel, "use_qalora = True cannot be merged"),
    "parameters": ("plain", changed(target_parameters=["x"]), UnsupportedModel, r"target_parameters = \['x'\]"),
    "moved base": ("plain", changed(init_lora_weights="pissa_niter_4"), UnsupportedModel, "changed the base model too"),
    "rank": ("plain", changed(r=8), InvalidCheckpoint, r"lora_A \[4, 32\] and lora_B \[32, 4\].*means the rank 8"),
    "no rank": ("plain", changed(r=None), InvalidCheckpoint, "r must be a positive number, got None"),
    "bad pattern": ("plain", changed(rank_pattern={"(": 3}), InvalidCheckpoint, r"rank_pattern has '\('"),
    "dora undeclared": ("dora", changed(use_dora=False), InvalidCheckpoint, "has a lora_magnitude_vector"),
    "dora without": ("dora", without("magnitude"), InvalidCheckpoint, "has no lora_magnitude_vector"),
    "half": ("plain", without("lora_B"), InvalidCheckpoint, "has no lora_B; it is not whole"),
    "other model": (
        "plain",
        renamed("q_proj", "qkv_proj"),
        InvalidCheckpoint,
        "qkv_proj.weight, and plain has no such",
    ),
    "other shape": ("plain", renamed("q_proj", "k_proj"), InvalidCheckpoint, r"of the shape \[32, 32\], and plain has"),
    "cut short": ("plain", cut, InvalidCheckpoint, "adapter_model.safetensors is not a whole safetensors file"),
    "pickle": ("plain", pickled, InvalidCheckpoint, r"\*.bin is a pickle, which is never loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_named(tmp_path: Path, case: str) -> None:
    model, change, kind, words = REFUSED[case]
    shutil.copytree(loras_of(model)[0].path, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(kind, match=words):
        open_checkpoint(ADAPTERS / model, loras=[Lora(tmp_path / "adapter")])


def test_adapters_that_have_no_sum_stand_alone() -> None:
    (dora,), (plain,), (saved,) = loras_of("dora"), loras_of("plain"), loras_of("saved-modules")
    for loras, why in (
        ([Lora(dora.path, 0.5)], "has a DoRA magnitude"),
        ([plain, dora], "has a DoRA magnitude"),
        ([saved, plain], "it replaces lm_head.weight, model.layers.0.input_layernorm.weight"),
    ):
        with pytest.raises(UnsupportedModel, match=rf"only be merged alone and with the weight 1, because .*{why}"):
            open_checkpoint(ADAPTERS / "plain", loras=loras)


def test_a_quantized_base_is_widened(tmp_path: Path) -> None:
    path, name = ADAPTERS.parent / "bitsandbytes" / "int8", "model.layers.0.self_attn.q_proj"
    base = open_checkpoint(path)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 64), (64, 4)))
    save_file(
        {f"base_model.model.{name}.lora_{part}.weight": matrix for part, matrix in (("A", a), ("B", b))},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    merged = open_checkpoint(path, loras=[Lora(tmp_path, 3.0)])
    expected = base.load(f"{name}.weight") + 3 * (2 / 4) * (b @ a)
    np.testing.assert_allclose(merged.load(f"{name}.weight"), expected, atol=1e-5)  # terms near 10
    assert (base.stored_bits, merged.stored_bits) == (8, None)
    assert merged.imported(f"{name}.weight") is None
    assert "8-bit integers become floats" in merged.notes[-1]
