"""int4 weights rounded on calibration text: smaller errors than nearest rounding, in the layout the kernel reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.artifact.weight_file import WeightFile
from export.calibration.dataset import CalibrationOptions
from export.checkpoint.protocol import Checkpoint
from export.checkpoint.view import CheckpointView
from export.graph.builder import GraphBuilder
from export.graph.ort.linear import imported_linear, matmul_nbits
from export.graph.weights import Weight
from export.model.description import Site
from export.model.families.architectures import parse_config
from export.pipeline.calibrated import QuantizationOptions, workdir_of
from export.pipeline.export_model import ExportOptions, export_model
from export.quantize.int4.model import plan_of
from export.quantize.int4.rounding import NUM_PIECES, PIECE, pieces_of, round_layers
from export.quantize.rounding.blocks import SHRINKAGE, gptq_blocks
from export.quantize.rounding.gptq import drift
from export.schemes.forms import Blocks
from export.schemes.registry import SCHEMES
from export.schemes.scheme import Storage
from export.sources.open import open_checkpoint
from export.storage.blocks import QuantizedRows, dequantize_rows, quantize_rows
from export.storage.quantized_rows import ImportedRows
from runtime.artifact.manifest import Artifact
from runtime.commands.inspect_artifact import as_lines
from runtime.errors import CalibrationFailed, UnsupportedModel
from tests.graph.rounding import correlated_inputs, gram_of, output_error
from tests.support.tiny.checkpoint import config_of, write_checkpoint

INT4 = Blocks(bits=4, block_size=32, symmetric=False)

W4A16 = cast(Storage, SCHEMES["w4a16"].ort)


def nearest(weight: np.ndarray) -> QuantizedRows:
    return quantize_rows(weight, bits=4, block_size=32, symmetric=False)


def test_compensated_weights_beat_the_nearest_ones_on_unseen_input() -> None:
    weight = np.random.default_rng(1).standard_normal((24, 64)).astype(np.float32)
    inputs = correlated_inputs(8000, 64)
    train, test = inputs[:4000], inputs[4000:]
    better = gptq_blocks(weight, gram_of(train), INT4)
    assert output_error(test, weight, test, better) < 0.7 * output_error(test, weight, test, nearest(weight))


def test_errors_of_the_layers_before_are_taken_back() -> None:
    weight = np.random.default_rng(1).standard_normal((24, 64)).astype(np.float32)
    exact = correlated_inputs(8000, 64)
    # What earlier rounding did to the input hangs together with the input, as a wrong weight's error does.
    seen = (exact @ (np.eye(64) + 0.1 * np.random.default_rng(2).standard_normal((64, 64)))).astype(np.float32)
    lost = drift(weight, exact[:4000], seen[:4000], np.ones(4000, np.float32), shrinkage=SHRINKAGE)
    aware = gptq_blocks(weight, gram_of(seen[:4000]), INT4, lost)
    unaware = gptq_blocks(weight, gram_of(seen[:4000]), INT4)
    errors = [output_error(exact[4000:], weight, seen[4000:], rows) for rows in (aware, unaware)]
    assert errors[0] < 0.1 * errors[1]


def test_zero_weights_and_dead_channels_stay_zero() -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[1, 2] = 3
    x = correlated_inputs(200, 64)
    x[:, 5] = 0
    for gram in (gram_of(x), gram_of(np.zeros_like(x)), gram_of(x * np.float32(1e-12))):
        rows = gptq_blocks(weight, gram, INT4)
        assert np.isfinite(rows.scales).all()
        back = dequantize_rows(rows, bits=4)
        assert not back[[0, 2, 3]].any()
        assert back[1, 2] == pytest.approx(3)


def test_the_kernel_multiplies_with_what_was_packed(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((24, 64)).astype(np.float32)
    rows = gptq_blocks(weight, gram_of(correlated_inputs(500, 64)), INT4)
    # Whole numbers up to 127 in every block of 32: the kernel's rounding of its input to 8 bits changes nothing.
    x = rng.integers(-127, 128, (9, 64)).astype(np.float32)
    x[:, ::32] = 127
    with WeightFile(tmp_path) as weights:
        g = GraphBuilder(weights)
        source = g.input("x", ir.DataType.FLOAT, ["n", 64])
        stored = Weight("w", "down", weight.shape, lambda: weight)
        y = imported_linear(g, source, stored, ImportedRows(rows, INT4, None), "y", matmul_nbits)
        g.output(y, ir.DataType.FLOAT, ["n", 24])
    ir.save(g.model("test", "0"), tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    expected = x @ dequantize_rows(rows, bits=4).T
    for some in (x, x[:1]):
        found = session.run(None, {"x": some})[0]
        np.testing.assert_allclose(found, expected[: len(some)], rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_last_mlps_keep_eight_bits(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    plan = plan_of(parse_config(checkpoint.config), W4A16)
    wide = {str(site) for site, blocks in plan.items() if blocks.bits == 8}
    assert wide == {"layers.2.gate_up", "layers.2.down"}
    assert {site.kind for site in plan} == {"o", "gate_up", "down"}


def test_pieces_come_from_all_sequences_and_begin_anywhere() -> None:
    config = parse_config(config_of("llama"))
    sequences = [[number] * 512 for number in range(200)]
    pieces = pieces_of(sequences, config)
    assert len(pieces) == NUM_PIECES == len({piece[0] for piece in pieces})
    few = pieces_of([list(range(300)), list(range(40))], config)
    assert sorted(piece[0] for piece in few) == [0, 0, PIECE]
    assert sum(map(len, few)) == 2 * PIECE + 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("int4") / "model", config_of("llama-tied"))


SMALL = QuantizationOptions(text=CalibrationOptions(num_samples=40, length=128))


def export_rounded(model: Path, out: Path, precision: str = "w4a16", calibration: Path | None = None) -> Artifact:
    quantization = SMALL if calibration is None else QuantizationOptions(reuse=calibration)
    options = ExportOptions(model=str(model), out=out, precision=precision, quantization=quantization, force=True)
    return export_model(options)


@pytest.fixture(scope="module")
def calibrated(model: Path) -> Mapping[str, Artifact]:
    """The model in both precisions, each calibrated by its own export."""
    return {name: export_rounded(model, model.with_name(name), name) for name in ("w4a16", "w8a8")}


def test_an_export_rounds_on_text_and_does_better_for_it(
    tmp_path: Path, model: Path, calibrated: Mapping[str, Artifact]
) -> None:
    artifact = calibrated["w4a16"]
    checkpoint = open_checkpoint(str(model))
    nearest_kl = receipt_kl_of_nearest(model, tmp_path)
    assert artifact.receipt["figures"]["kl"] < 0.8 * nearest_kl
    account = artifact.receipt["quantization"]
    assert len(account["layer_errors"]) == 3 * checkpoint.config["num_hidden_layers"]
    assert all(0 < error < 0.05 for error in account["layer_errors"].values())
    assert account["calibration"]["source"].startswith("random ids")
    assert not workdir_of(artifact.path).exists()
    (shown,) = [line for line in as_lines(artifact) if "largest output errors" in line]
    worst = max(account["layer_errors"].items(), key=lambda item: item[1])
    assert f"errors: {worst[0]} {worst[1]:.2%}" in shown


def receipt_kl_of_nearest(model: Path, tmp_path: Path) -> float:
    """The same precision without calibration, as imported checkpoints' floating layers get it."""
    from dataclasses import replace

    from export.pipeline.artifact_files import write_unverified
    from export.pipeline.graph_files import ExportPlan
    from export.verify.receipt import verify
    from export.verify.references import NumpyReference

    checkpoint = open_checkpoint(str(model))
    config = parse_config(checkpoint.config)
    directory = tmp_path / "nearest"
    directory.mkdir()
    plain = replace(SCHEMES["w4a16"], calibration=None)
    plan = ExportPlan(checkpoint=checkpoint, config=config, scheme=plain, max_len=256)
    artifact = write_unverified(directory, plan)
    return float(verify(NumpyReference(checkpoint, config), config, artifact)["figures"]["kl"])


@pytest.mark.parametrize(("first", "second"), [("w4a16", "w8a8"), ("w8a8", "w4a16"), ("w4a16", "w4a16")])
def test_a_calibration_serves_the_other_precision(
    tmp_path: Path, model: Path, calibrated: Mapping[str, Artifact], first: str, second: str
) -> None:
    done, fresh = calibrated[first], calibrated[second]
    again = export_rounded(model, tmp_path / "again", second, done.path)
    assert again.manifest.files["weights.bin"] == fresh.manifest.files["weights.bin"]
    assert again.receipt["quantization"]["calibration"] == done.receipt["quantization"]["calibration"]


class Interrupted(CheckpointView):
    """A checkpoint that is interrupted when a layer is read; keeps which tensors were read."""

    def __init__(self, checkpoint: Checkpoint, at: str = "") -> None:
        super().__init__(checkpoint)
        self._at = at
        self.seen: list[str] = []

    def load(self, name: str) -> Any:
        self.seen.append(name)
        if self._at and name.startswith(self._at):
            raise KeyboardInterrupt
        return super().load(name)


def test_an_interrupted_rounding_goes_on_where_it_stopped(tmp_path: Path, model: Path) -> None:
    checkpoint: Any = open_checkpoint(str(model))
    config = parse_config(checkpoint.config)
    plan = plan_of(config, W4A16)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (6, 40)).tolist()
    whole, errors = round_layers(checkpoint, config, ids, plan, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        round_layers(Interrupted(checkpoint, "model.layers.2.mlp"), config, ids, plan, tmp_path / "parts")
    watched: Any = Interrupted(checkpoint)
    parts, more_errors = round_layers(watched, config, ids, plan, tmp_path / "parts")
    assert "model.layers.1.mlp.down_proj.weight" not in watched.seen
    assert more_errors == errors
    for site in plan:
        first, second = whole.get(site), parts.get(site)
        assert first is not None and second is not None
        assert np.array_equal(first.rows.values, second.rows.values)
    # Other text is another run.
    watched = Interrupted(checkpoint)
    round_layers(watched, config, ids[:3], plan, tmp_path / "parts")
    assert "model.layers.1.mlp.down_proj.weight" in watched.seen


def test_rows_that_blocks_do_not_fill_are_refused_before_any_text_is_read(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", config_of("llama", intermediate_size=100))
    with pytest.raises(UnsupportedModel, match=r"down_proj.weight has rows of 100, not a multiple .* block 32"):
        export_rounded(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_input_that_is_not_finite_is_named(tmp_path: Path, model: Path) -> None:
    checkpoint: Any = open_checkpoint(str(model))
    config = parse_config(checkpoint.config)

    class Broken(Interrupted):
        def load(self, name: str) -> Any:
            array = super().load(name)
            return array * np.float32(np.inf) if name == "model.layers.1.post_attention_layernorm.weight" else array

    with (
        np.errstate(invalid="ignore"),
        pytest.raises(CalibrationFailed, match=r"input of layers\.1\.gate_up is not finite"),
    ):
        round_layers(Broken(checkpoint), config, [list(range(40))], {Site(1, "gate_up"): INT4}, tmp_path / "work")


def test_a_calibration_of_another_model_is_refused(tmp_path: Path, calibrated: Mapping[str, Artifact]) -> None:
    first = calibrated["w4a16"].path
    other = write_checkpoint(tmp_path / "other", config_of("llama-tied", vocab_size=100))
    with pytest.raises(CalibrationFailed, match="another vocabulary"):
        export_rounded(other, tmp_path / "second", calibration=first)
    assert json.loads((first / "calibration.json").read_text(encoding="utf-8"))["layers"] == []
