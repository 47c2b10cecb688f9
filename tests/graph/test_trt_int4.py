"""int4 for TensorRT: rounding on calibration text in symmetric blocks, and the same integers in the graph."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from export.artifact.weight_file import WeightFile
from export.calibration.dataset import CalibrationOptions
from export.checkpoint.view import CheckpointView
from export.graph.builder import GraphBuilder
from export.graph.standard.linear import StandardLinear
from export.graph.weights import Weight
from export.model.description import Linear, Part, Site
from export.model.families.architectures import parse_config
from export.pipeline.artifact_files import write_unverified
from export.pipeline.calibrated import CalibrationInput, QuantizationOptions, calibrated_model
from export.pipeline.export_model import ExportOptions, export_model
from export.pipeline.graph_files import ExportPlan
from export.quantize.int4.model import plan_of
from export.quantize.rounding.blocks import gptq_blocks, nearest_rows, symmetric_scales
from export.quantize.rounding.layers import BlockLayer, QuantizedLayers
from export.schemes.forms import Blocks
from export.schemes.registry import SCHEMES
from export.schemes.scheme import Storage
from export.schemes.weight_only import INT4_BLOCKS
from export.sources.open import open_checkpoint
from export.storage.blocks import dequantize_rows, quantize_rows
from export.storage.quantized_rows import ImportedRows
from export.verify.receipt import verify
from export.verify.references import NumpyReference
from runtime.artifact.manifest import Artifact
from runtime.commands.inspect_artifact import as_lines
from tests.graph.rounding import correlated_inputs, gram_of, output_error
from tests.support.tiny.checkpoint import config_of, write_checkpoint

SMALL = QuantizationOptions(text=CalibrationOptions(num_samples=24, length=128))

W4A16 = cast(Storage, SCHEMES["w4a16"].standard)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = config_of("llama-tied", intermediate_size=128)
    return write_checkpoint(tmp_path_factory.mktemp("int4") / "model", raw)


def exported(model: Path, out: Path, dialects: tuple[str, ...], calibration: Path | None = None) -> Artifact:
    quantization = SMALL if calibration is None else QuantizationOptions(reuse=calibration)
    return export_model(
        ExportOptions(
            model=str(model), out=out, precision="w4a16", dialects=dialects, quantization=quantization, force=True
        )
    )


def test_compensated_weights_beat_the_nearest_ones_on_unseen_input() -> None:
    weight = np.random.default_rng(1).standard_normal((24, 128)).astype(np.float32)
    inputs = correlated_inputs(8000, 128)
    train, test = inputs[:4000], inputs[4000:]
    better = gptq_blocks(weight, gram_of(train), INT4_BLOCKS)
    nearest = nearest_rows(weight, INT4_BLOCKS)
    assert better.zero_points is None is nearest.zero_points
    assert output_error(test, weight, test, better) < 0.7 * output_error(test, weight, test, nearest)


def test_scales_are_half_precision_and_clip_where_that_pays() -> None:
    rng = np.random.default_rng(2)
    blocks = rng.standard_normal((4, 3, 64)).astype(np.float32)
    blocks[0] *= 1e-6  # below what half precision holds
    blocks[1, 0] = 0
    blocks[2, 1, 0] = 40.0
    scales = symmetric_scales(blocks, 4)
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    assert (scales > 0).all()

    def error(scales: NDArray[np.float32]) -> NDArray[np.float32]:
        codes = np.clip(np.rint(blocks / scales[..., None]), -8, 7)
        return np.asarray(np.square(codes * scales[..., None] - blocks).sum(-1))

    whole = np.abs(blocks).max(-1) / 7
    assert (error(scales)[1:] <= error(np.where(whole > 0, whole, 1))[1:] * 1.001).all()
    heavy = np.where(np.arange(64) == 0, 1e6, 1.0).astype(np.float32)
    spared = symmetric_scales(blocks, 4, heavy)[2, 1]
    assert spared * 7 == pytest.approx(40, rel=1e-3) or spared * 8 == pytest.approx(40, rel=1e-3), "it counts most"


def product(tmp_path: Path, matrix: NDArray[np.float32], load: Any, imported: ImportedRows) -> NDArray[np.float16]:
    """The float16 `[N, K]` that the graph multiplies with: its product with the unit matrix, on ONNX Runtime."""
    n, k = matrix.shape
    linear = Linear(site=Site(0, "down"), role="down", parts=(Part("w", n),), num_inputs=k)
    weight = Weight("w.weight", "down", (n, k), load)
    with WeightFile(tmp_path) as weights:
        g = GraphBuilder(weights, opsets={"": 24})
        x = g.input("x", ir.DataType.FLOAT16, ["rows", k])
        layers = QuantizedLayers({linear.site: BlockLayer(lambda: imported)})
        y = StandardLinear(g, W4A16, layers)(x, linear, weight, "y")
        g.output(y, ir.DataType.FLOAT16, ["rows", n])
    ir.save(g.model("test", "0"), tmp_path / "model.onnx")
    options = ort.SessionOptions()
    # As written: its own kernel for such products would round their input.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.eye(k, dtype=np.float16)})[0].T)


@pytest.mark.parametrize("blocks", [INT4_BLOCKS, Blocks(4, 128, symmetric=True), Blocks(8, 256, symmetric=True)])
def test_the_graph_multiplies_with_the_integers_it_was_given(tmp_path: Path, blocks: Blocks) -> None:
    weight = np.random.default_rng(3).standard_normal((24, 256)).astype(np.float32)
    if blocks.bits == 4:
        rows = gptq_blocks(weight, gram_of(correlated_inputs(900, 256)), blocks)
    else:
        rows = quantize_rows(weight, bits=8, block_size=256, symmetric=True)

    def load() -> NDArray[np.float32]:
        raise AssertionError("it would be rounded once more")

    found = product(tmp_path, weight, load, ImportedRows(rows, blocks, None))
    # Eight bits' scales were made in float32 and are stored in half precision.
    tolerance = 0 if blocks.bits == 4 else 2.0**-10
    np.testing.assert_allclose(found, dequantize_rows(rows, bits=blocks.bits).astype(np.float16), rtol=tolerance)


@pytest.mark.parametrize(
    "rows_of",
    [
        lambda weight: ImportedRows(nearest_rows(weight, Blocks(4, 32, True)), Blocks(4, 32, True), None),
        lambda weight: ImportedRows(nearest_rows(weight, Blocks(4, 64, False)), Blocks(4, 64, False), None),
        lambda weight: ImportedRows(nearest_rows(weight, INT4_BLOCKS), INT4_BLOCKS, np.arange(128)[::-1]),
        lambda weight: ImportedRows(
            nearest_rows(weight, INT4_BLOCKS)._replace(scales=np.full((24, 2), 1e-7, np.float32)), INT4_BLOCKS, None
        ),
    ],
    ids=["blocks-of-32", "zero-points", "another-order", "scales-too-small"],
)
def test_integers_that_tensorrt_does_not_take_are_made_anew(tmp_path: Path, rows_of: Any) -> None:
    """As a checkpoint that a GPTQ tool has quantized may bring them."""
    weight = np.random.default_rng(4).standard_normal((24, 128)).astype(np.float32)
    found = product(tmp_path, weight, lambda: weight, rows_of(weight))
    expected = dequantize_rows(nearest_rows(weight, INT4_BLOCKS), bits=4)
    np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_the_last_mlps_keep_a_scale_a_channel_and_eight_bits(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    plan = plan_of(parse_config(checkpoint.config), W4A16)
    wide = {str(site): blocks for site, blocks in plan.items() if blocks.bits == 8}
    assert wide == {"layers.2.gate_up": Blocks(8, 64, True), "layers.2.down": Blocks(8, 128, True)}
    assert {blocks for blocks in plan.values() if blocks.bits == 4} == {INT4_BLOCKS}
    assert {site.kind for site in plan} == {"o", "gate_up", "down"}


def test_one_calibration_rounds_for_both_runtimes(tmp_path: Path, model: Path) -> None:
    both = exported(model, tmp_path / "both", ("ort", "trt"))
    alone = exported(model, tmp_path / "alone", ("trt",), calibration=tmp_path / "both")
    figures, errors = both.receipt["figures"], both.receipt["quantization"]
    assert alone.receipt["figures"]["trt.kl"] == pytest.approx(figures["trt.kl"], rel=1e-6), "the very integers"
    assert alone.receipt["quantization"]["trt.layer_errors"] == errors["trt.layer_errors"]
    assert len(errors["layer_errors"]) == len(errors["trt.layer_errors"]) == 3 * 3
    assert figures["trt.kl"] < 0.85 * kl_of_nearest(model, tmp_path), "better than each weight for itself"
    shown = [line for line in as_lines(both) if "largest output errors" in line]
    assert len(shown) == 2 and "for TensorRT" in shown[1]


def kl_of_nearest(model: Path, tmp_path: Path) -> float:
    checkpoint = open_checkpoint(str(model))
    config = parse_config(checkpoint.config)
    directory = tmp_path / "nearest"
    directory.mkdir()
    plan = ExportPlan(checkpoint=checkpoint, config=config, scheme=SCHEMES["w4a16"], max_len=256, dialects=("trt",))
    artifact = write_unverified(directory, plan)
    return float(verify(NumpyReference(checkpoint, config), config, artifact)["figures"]["trt.kl"])


class CountingReads(CheckpointView):
    """A checkpoint that is interrupted at the n-th reading of a tensor; keeps what was read."""

    def __init__(self, checkpoint: Any, at: str = "", number: int = 0) -> None:
        super().__init__(checkpoint)
        self._at, self._number = at, number
        self.seen: list[str] = []

    def load(self, name: str) -> Any:
        self.seen.append(name)
        if name == self._at and self.seen.count(name) == self._number:
            raise KeyboardInterrupt
        return super().load(name)


def test_an_interrupted_export_goes_on_in_the_second_rounding(tmp_path: Path, model: Path) -> None:
    def generate(*_: Any) -> list[list[int]]:
        raise AssertionError("random ids need no sampling")

    def run(checkpoint: Any) -> Any:
        config = parse_config(checkpoint.config)
        row = SCHEMES["w4a16"]
        given = CalibrationInput(
            checkpoint=checkpoint, config=config, max_len=256, generate=generate, workdir=tmp_path / "work"
        )
        return calibrated_model(given, row, SMALL, ("ort", "trt"))

    last, first = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (2, 0))
    with pytest.raises(KeyboardInterrupt):
        run(CountingReads(open_checkpoint(str(model)), at=last, number=2))
    watched = CountingReads(open_checkpoint(str(model)))
    found = run(watched)
    assert watched.seen.count(last) == 1 and first not in watched.seen
    for dialect, blocks in (("ort", Blocks(8, 32, True)), ("trt", Blocks(8, 128, True))):
        assert found.layers[dialect][Site(2, "down")].load().blocks == blocks
    assert found.layers["trt"][Site(0, "down")].load().blocks == INT4_BLOCKS
