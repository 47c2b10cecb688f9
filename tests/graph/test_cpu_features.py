"""Features of the processor: int8 products are exact everywhere, and slower kernels are used only where needed."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.commands.roofline import describe_machine
from runtime.machine import cpu_features
from runtime.machine.cpu_features import EXACT_INT8, cpu_flags, int8_options

ZEN_2 = frozenset({"sse4_1", "avx", "avx2"})
SKYLAKE_X = ZEN_2 | {"avx512f", "avx512bw", "avx512vl"}


@pytest.mark.parametrize(
    ("machine", "flags", "is_inexact"),
    [
        ("x86_64", ZEN_2, True),
        ("x86_64", SKYLAKE_X, True),
        ("x86_64", frozenset(), True),
        ("AMD64", ZEN_2, True),
        ("x86_64", SKYLAKE_X | {"avx512_vnni"}, False),
        ("x86_64", ZEN_2 | {"avx_vnni"}, False),
        ("aarch64", frozenset({"asimddp"}), False),
    ],
)
def test_the_exact_kernel_is_asked_for_only_where_the_fast_one_saturates(
    machine: str, flags: frozenset[str], *, is_inexact: bool
) -> None:
    assert int8_options(flags, machine) == (dict([EXACT_INT8]) if is_inexact else {})


def product(x: np.ndarray, weight: np.ndarray, session_options: dict[str, str]) -> np.ndarray:
    """x uint8 [N, K] with zero point 0, times weight int8 [K, M]: int32 [N, M], by ONNX Runtime on this processor."""
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [len(x), weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    for name, value in session_options.items():
        options.add_session_config_entry(name, value)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("num_rows", [1, 3, 32, 130])
def test_products_are_exact_on_this_processor(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    x = rng.integers(200, 256, (num_rows, 256), np.uint8)  # pairs of products leave 16 bits
    weight = rng.integers(100, 128, (256, 48)).astype(np.int8)
    assert np.array_equal(product(x, weight, int8_options()), x.astype(np.int32) @ weight.astype(np.int32))


def test_the_option_changes_nothing_where_products_are_exact_anyway() -> None:
    if int8_options():
        pytest.skip("this processor needs the option: x86 without VNNI")
    rng = np.random.default_rng(0)
    x, weight = rng.integers(0, 256, (64, 512), np.uint8), rng.integers(-127, 128, (512, 64)).astype(np.int8)
    assert np.array_equal(product(x, weight, {}), product(x, weight, dict([EXACT_INT8])))


def test_unknown_processors_have_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "cpu_info", dict)
    assert cpu_flags() == frozenset()
    monkeypatch.setattr(cpu_features, "cpu_info", lambda: {"Features": "asimd asimddp"})
    assert cpu_flags() == {"asimd", "asimddp"}


def test_benchmarks_name_the_instructions_that_matter() -> None:
    assert set(describe_machine().instruction_sets.split()) <= cpu_flags()
