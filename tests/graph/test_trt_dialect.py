"""The TensorRT dialects on ONNX Runtime, from tiny checkpoints: the ort dialect's logits from the same weights."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.calibration.dataset import CalibrationOptions
from export.cli import main
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from export.quantize.int8.model import Int8Options
from runtime.artifact.known_hashes import sha256_of
from runtime.artifact.manifest import (
    DIALECT_FILES,
    TRT_WEIGHTS,
    WEIGHTS,
    Artifact,
    dialect_name,
    open_artifact,
)
from runtime.backends.ort.session import OrtSession
from runtime.errors import InvalidSetting
from tests.support.session_runs import LOGIT_TOLERANCE, run_in_pieces, run_ragged
from tests.support.tiny.artifact import TinyExports
from tests.support.tiny.checkpoint import VARIANTS, config_of, write_checkpoint

DIALECTS = ("ort", "trt", "trt-plain")
MAX_LEN = 128
"""Well past every window (24) and every length that rotary scaling starts from (64); most of an export is checking."""
WAYS = ("prefill", "decode", "chunked", "ragged")


def initializers(artifact: Artifact, dialect: str) -> dict[str, tuple[str, str]]:
    """Where each external initializer lies: (file, offset)."""
    graph = onnx.load(artifact.model_file(dialect), load_external_data=False).graph
    entries = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in graph.initializer}
    return {name: (data["location"], data["offset"]) for name, data in entries.items() if data}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_gives_the_ort_dialects_numbers_in_every_way(tiny: TinyExports, variant: str) -> None:
    artifact = tiny.artifact(variant, dialects=DIALECTS, max_len=MAX_LEN)
    figures = artifact.receipt["figures"]
    for dialect in ("trt", "trt-plain"):
        assert max(figures[f"{dialect}.{way}_error"] for way in WAYS) < LOGIT_TOLERANCE
        assert figures[f"{dialect}.max_logit_error"] < LOGIT_TOLERANCE
        assert figures[f"{dialect}.greedy_agreement"] == figures[f"{dialect}.tokens_equal_to_ort"] == 1


@pytest.mark.oracle
@pytest.mark.parametrize("dialect", ["trt", "trt-plain"])
@pytest.mark.parametrize("variant", ["llama-biases", "mistral-sliding", "qwen2-yarn", "qwen3"])
def test_fp32_equals_transformers(tiny: TinyExports, variant: str, dialect: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    artifact = tiny.artifact(variant, dialects=DIALECTS, max_len=MAX_LEN)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.checkpoint(variant), dtype=torch.float32, attn_implementation="eager"
    )
    ids = np.random.default_rng(1).integers(3, 320, 120)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids[None])).logits[0].numpy()
    session = OrtSession.open(artifact, num_slots=8, capacity=128, dialect=dialect)
    for sizes in ([120], [1] * 120, [50, 1, 33, 36]):
        logits = run_in_pieces(session, ids, sizes)
        assert np.abs(logits - expected).max() < LOGIT_TOLERANCE, f"pieces of {sizes[:4]}"
    cuts = [1, 100, 60, 7, 33, 90, 2, 80]
    heads = run_ragged(session, [ids[:cut] for cut in cuts], [0] * 8)
    tails = run_ragged(session, [ids[cut : cut + 9] for cut in cuts], cuts)
    for cut, head, tail in zip(cuts, heads, tails, strict=True):
        assert np.abs(head - expected[cut - 1]).max() < LOGIT_TOLERANCE
        assert np.abs(tail - expected[cut + 8]).max() < LOGIT_TOLERANCE


# A tiny model's logits reach 15, with steps of 0.008 in half precision; bfloat16 is checked upcast, its weights only.
@pytest.mark.parametrize(
    ("precision", "error"), [("fp16", 0.1), ("bf16", 0.3), ("w8a16", 0.6), ("w8a8", 1.5), ("w4a16", 6.0)]
)
@pytest.mark.parametrize("dialect", ["trt", "trt-plain"])
def test_narrow_precisions_round_and_no_more(tiny: TinyExports, precision: str, error: float, dialect: str) -> None:
    artifact = tiny.artifact("llama-biases", precision, dialects=("trt", "trt-plain"), intermediate_size=128)
    figures = artifact.receipt["figures"]
    assert 1e-4 < figures[f"{dialect}.max_logit_error"] < error
    assert figures[f"{dialect}.prefill_error"] < error


def test_what_has_the_same_form_is_stored_once(tiny: TinyExports) -> None:
    artifact = tiny.artifact("qwen2", dialects=DIALECTS, max_len=MAX_LEN)
    assert TRT_WEIGHTS not in artifact.manifest.files
    ort, trt = initializers(artifact, "ort"), initializers(artifact, "trt")
    assert {file for file, _ in trt.values()} == {WEIGHTS}
    assert ort == trt == initializers(artifact, "trt-plain")


def test_half_precision_shares_all_but_the_norms(tiny: TinyExports) -> None:
    artifact = tiny.artifact("llama-tied", "fp16", dialects=("ort", "trt"))
    own = {name for name, (file, _) in initializers(artifact, "trt").items() if file == TRT_WEIGHTS}
    assert own
    assert all("norm" in name for name in own)
    assert artifact.manifest.kv_of("trt").dtype == "float16"


def test_w8a8_reads_the_ort_dialects_integers_and_scales(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama-tied"))
    quantization = QuantizationOptions(
        text=CalibrationOptions(num_samples=4, length=32), int8=Int8Options(keep=("layers.1.down",))
    )
    options = ExportOptions(
        model=str(source),
        out=tmp_path / "a",
        precision="w8a8",
        dialects=DIALECTS,
        force=True,
        quantization=quantization,
    )
    artifact = export_model(options)
    ort, trt, plain = (initializers(artifact, dialect) for dialect in DIALECTS)
    integers = {name for name in ort if name.endswith(".int8")}
    assert len(integers) == 4 * 3 + 1, "four products a layer, and the LM head"
    assert all(ort[name] == trt[name] == plain[name] == (WEIGHTS, ort[name][1]) for name in integers)
    model = onnx.load(artifact.model_file("trt"), load_external_data=False)
    rounded = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert "gated.1" not in {node.input[0] for node in rounded}, "two passes there, wide activations here"
    two_pass = set(artifact.receipt["quantization"]["two_pass"]) - {"layers.3.lm_head"}
    assert "layers.1.down" in two_pass and len(rounded) == 12 - len(two_pass)
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.raw_data
    }
    assert {float(constants[node.input[1]]) for node in rounded} <= ort_scales(artifact)


def ort_scales(artifact: Artifact) -> set[float]:
    """The activation scales of the ort graph's first passes, as half precision holds them."""
    graph = onnx.load(artifact.model_file("ort"), load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    names = {node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
    return {float(np.float16(onnx.numpy_helper.to_array(constants[name]))) for name in names}


def test_the_receipt_names_the_graphs_by_hash(tiny: TinyExports) -> None:
    artifact = tiny.artifact("llama", dialects=DIALECTS, max_len=MAX_LEN)
    assert artifact.receipt["graphs"] == {
        dialect: sha256_of(artifact.model_file(dialect)) for dialect in artifact.manifest.dialects
    }


def test_the_graph_keeps_away_from_what_tensorrt_drops_or_refuses(tiny: TinyExports) -> None:
    artifact = tiny.artifact("qwen3", "w8a16", dialects=("trt",))
    model = onnx.load(artifact.model_file("trt"), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(attention) == 3
    assert all(len(node.input) == 4 and not node.attribute for node in attention), "no nonpad_kv_seqlen, no softcap"
    scatters = [node for node in model.graph.node if node.op_type == "TensorScatter"]
    assert len(scatters) == 6
    ranks = {len(value.type.tensor_type.shape.dim) for value in model.graph.input if value.name.startswith("past")}
    assert ranks == {4}


def test_the_plain_graph_has_only_elementary_operators(tiny: TinyExports) -> None:
    artifact = tiny.artifact("qwen3", "w8a8", dialects=("trt-plain",))
    model = onnx.load(artifact.model_file("trt-plain"), load_external_data=False)
    assert model.opset_import[0].version == 21 and model.ir_version == 10
    kinds = {node.op_type for node in model.graph.node}
    assert {"ScatterND", "Softmax", "QuantizeLinear"} <= kinds
    assert not kinds & {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}


def test_candidates_are_the_largest_logits_and_their_sum(tiny: TinyExports) -> None:
    import onnxruntime

    artifact = tiny.artifact("llama", dialects=DIALECTS, max_len=MAX_LEN)
    session = onnxruntime.InferenceSession(artifact.model_file("trt"), providers=["CPUExecutionProvider"])
    cache = {entry.name: np.zeros((1, 2, 8, 16), np.float32) for entry in session.get_inputs()[4:]}
    ids = np.array([[5, 6, 7]])
    feeds = {"input_ids": ids, "position_ids": np.arange(3)[None], "write_idx": np.array([0]), **cache}
    names = ["logits", "top_logits", "top_ids", "log_sum"]
    logits, top, top_ids, log_sum = session.run(names, {**feeds, "logits_idx": np.array([2, 0])})
    assert logits.shape == (2, 320) and top.shape == top_ids.shape == (2, 64)
    np.testing.assert_array_equal(np.take_along_axis(logits, top_ids, 1), top)
    np.testing.assert_array_equal(top, -np.sort(-logits, 1)[:, :64])
    np.testing.assert_allclose(log_sum[:, 0], np.log(np.exp(logits.astype(np.float64)).sum(1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("dialects", "precision", "word"),
    [(("onnx",), "fp32", "onnx"), (("ort", "trt"), "bf16", "bf16"), (("",), "fp32", "''")],
)
def test_a_dialect_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, dialects: tuple[str, ...], precision: str, word: str
) -> None:
    options = ExportOptions(model="nowhere", out=tmp_path / "a", precision=precision, dialects=dialects)
    with pytest.raises(InvalidSetting, match=word):
        export_model(options)


def test_the_command_line_takes_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama"))
    assert main([str(source), "--out", str(tmp_path / "a"), "--dialect", "ort,standard,trt"]) == 0
    assert "trt.ragged_error" in capsys.readouterr().out
    assert set(open_artifact(tmp_path / "a").manifest.dialects) == {"ort", "trt"}
    assert [dialect_name(dialect) for dialect in DIALECT_FILES] == ["ort", "native", "standard", "standard-21"]
