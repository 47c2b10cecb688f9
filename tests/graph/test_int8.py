"""int8 arithmetic, the choice of layers, and the graph: ONNX Runtime computes what numpy computes."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.artifact.weight_file import WeightFile
from export.graph.builder import GraphBuilder
from export.graph.ort.int8_linear import int8_linear
from export.graph.weights import Weight
from export.model.description import Site
from export.quantize.int8.ranges import FINE_STEPS
from export.quantize.int8.sensitivity import MAX_TWO_PASS_SHARE, LayerCost, choose_two_pass
from export.quantize.rounding.gptq import GramMatrix, factorized
from export.quantize.rounding.int8 import (
    Int8Rows,
    gptq_int8,
    rounded_activations,
    rounded_to_nearest,
)
from export.quantize.rounding.layers import Int8Layer
from runtime.errors import InvalidSetting
from runtime.machine.cpu_features import int8_options
from tests.graph.rounding import correlated_inputs


def output_error(x: np.ndarray, seen: np.ndarray, weight: np.ndarray, rows: Int8Rows) -> float:
    return float(np.square(seen @ rows.dequantized().T - x @ weight.T).mean())


@pytest.mark.parametrize(("bits", "gain"), [(16, 0.8), (8, 0.97)], ids=["exact input", "rounded input"])
def test_compensated_weights_beat_the_nearest_ones_on_unseen_input(bits: int, gain: float) -> None:
    weight = np.random.default_rng(1).standard_normal((24, 48)).astype(np.float32)
    inputs = correlated_inputs(8000, 48)
    train, test = inputs[:4000], inputs[4000:]
    scale = float(np.abs(train).max()) / 127
    fine = scale / FINE_STEPS if bits == 16 else None
    gram = GramMatrix(48)
    for part in np.split(train, 4):
        gram.update(part, np.ones(len(part), np.float32), lambda x: rounded_activations(x, scale, fine))
    better, nearest = gptq_int8(weight, factorized(gram)), rounded_to_nearest(weight)
    seen = rounded_activations(test, scale, fine)
    assert output_error(test, seen, weight, better) < gain * output_error(test, seen, weight, nearest)


def test_zeros_stay_zero() -> None:
    weight = np.zeros((4, 8), np.float32)
    weight[1, 2] = 3
    gram = GramMatrix(8)
    x = correlated_inputs(50, 8)
    x[:, 5] = 0  # a dead channel
    gram.update(x, np.ones(50, np.float32))
    for rows in (
        rounded_to_nearest(weight),
        gptq_int8(weight, factorized(gram)),
        gptq_int8(weight, factorized(GramMatrix(8))),
    ):
        assert np.isfinite(rows.scales).all()
        assert not rows.values[[0, 2, 3]].any()
        assert rows.dequantized()[1, 2] == pytest.approx(3)


@given(st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_two_passes_leave_a_step_of_sixteen_bits(scale: float, seed: int) -> None:
    x = np.random.default_rng(seed).uniform(-127 * scale, 127 * scale, 200).astype(np.float32)
    fine = scale / FINE_STEPS
    assert np.abs(rounded_activations(x, scale) - x).max() <= scale * 0.5001
    assert np.abs(rounded_activations(x, scale, fine) - x).max() <= fine * 0.5001 + scale * 127 * 3e-7


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 1000)), min_size=1, max_size=12),
    st.floats(0, 0.5),
    st.integers(0, 11),
)
def test_the_budget_holds_or_a_quarter_is_spent(costs: list[tuple[float, int]], increase: float, num_kept: int) -> None:
    layers = [LayerCost(Site(idx, "down"), kl, macs) for idx, (kl, macs) in enumerate(costs)]
    keep = [str(layer.site) for layer in layers[:num_kept]]
    head = LayerCost(Site(99, "lm_head"), 0.02, 10**6)
    assert (head.site in choose_two_pass([*layers, head], max_increase=increase)) <= (0.1 * np.log1p(increase) < 0.02)
    wide = choose_two_pass(layers, max_increase=increase, keep=keep)
    assert {str(site) for site in wide} >= set(keep)
    total = sum(layer.macs for layer in layers)
    spent = sum(layer.macs for layer in layers if layer.site in wide and str(layer.site) not in keep)
    assert spent <= MAX_TWO_PASS_SHARE * total
    left = sum(layer.kl for layer in layers if layer.site not in wide)
    affordable = MAX_TWO_PASS_SHARE * total - sum(layer.macs for layer in layers if layer.site in wide)
    assert left <= np.log1p(increase) or all(layer.macs > affordable for layer in layers if layer.site not in wide)


def test_a_layer_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidSetting, match=r"no layer 'layers\.9\.dwon'; layers are called like layers\.0\.down"):
        choose_two_pass([LayerCost(Site(0, "down"), 0.1, 10)], max_increase=0, keep=["layers.9.dwon"])


@pytest.mark.parametrize("is_wide", [False, True])
def test_the_graph_multiplies_as_numpy_does(tmp_path: Path, *, is_wide: bool) -> None:
    weight = np.random.default_rng(3).standard_normal((24, 64)).astype(np.float32)
    rows, x = rounded_to_nearest(weight), correlated_inputs(17, 64)
    scale = float(np.abs(x).max()) / 100  # a little saturates
    fine = scale / FINE_STEPS if is_wide else None
    with WeightFile(tmp_path) as weights:
        g = GraphBuilder(weights)
        source = g.input("x", ir.DataType.FLOAT, ["n", 64])
        layer = Int8Layer(scale, fine, lambda: rows)
        y = int8_linear(g, source, Weight("w.weight", "down", weight.shape, lambda: weight), layer, "y")
        g.output(y, ir.DataType.FLOAT, ["n", 24])
    ir.save(g.model("test", "0"), tmp_path / "model.onnx")
    options = ort.SessionOptions()
    for name, value in int8_options().items():
        options.add_session_config_entry(name, value)
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0]
    profile = Path(session.end_profiling()).read_text(encoding="utf-8")
    expected = rounded_activations(x, scale, fine) @ rows.dequantized().T
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert '"op_name" : "MatMulIntegerToFloat"' in profile
    assert '"op_name" : "MatMul"' not in profile


def test_a_row_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    weight = np.random.default_rng(3).standard_normal((96, 64)).astype(np.float32)
    rows, x = rounded_to_nearest(weight), correlated_inputs(64, 64)
    with WeightFile(tmp_path) as weights:
        g = GraphBuilder(weights)
        source = g.input("x", ir.DataType.FLOAT, ["n", 64])
        layer = Int8Layer(0.05, 0.05 / FINE_STEPS, lambda: rows)
        y = int8_linear(g, source, Weight("w.weight", "down", weight.shape, lambda: weight), layer, "y")
        g.output(y, ir.DataType.FLOAT, ["n", 96])
    ir.save(g.model("test", "0"), tmp_path / "model.onnx")
    options = ort.SessionOptions()
    for name, value in int8_options().items():
        options.add_session_config_entry(name, value)
    session = ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    together = session.run(None, {"x": x})[0]
    for count in (1, 3, 32):
        assert np.array_equal(session.run(None, {"x": x[5 : 5 + count]})[0], together[5 : 5 + count])
