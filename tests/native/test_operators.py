"""Native operators in a session of the installed ONNX Runtime: the ABI that we declare is the one that it has."""

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from export.graph.builder import NATIVE
from tests.support.native.calls import add_norm, gate_up
from tests.support.native.sessions import node_session


def arrays(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def norm_session(threads: int) -> Any:
    node = helper.make_node("AddNorm", ["x", "skip", "weight"], ["normed", "sum"], domain=NATIVE, epsilon=1e-5)
    shape: list[int | str | None] = ["N", 48]
    return node_session(node, {"x": shape, "skip": shape, "weight": [48]}, {"normed": shape, "sum": shape}, threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_sum_and_norm_in_a_session(native_library: ctypes.CDLL, threads: int) -> None:
    graph = norm_session(threads)
    for rows in (1, 5, 3000):  # 3000 are several tasks for the pool
        x, skip, weight = arrays(rows, 48), arrays(rows, 48)[::-1].copy(), arrays(48)
        normed, total = graph.run(None, {"x": x, "skip": skip, "weight": weight})
        expected = add_norm(native_library, x, skip, weight, None, is_layer_norm=False)
        np.testing.assert_array_equal(normed, expected[0])
        np.testing.assert_array_equal(total, expected[1])


def test_optional_inputs_and_outputs_may_be_left_out(native_library: ctypes.CDLL) -> None:
    node = helper.make_node(
        "AddNorm", ["x", "", "weight", "bias"], ["normed"], domain=NATIVE, epsilon=1e-5, is_layer_norm=1
    )
    graph = node_session(node, {"x": ["N", 48], "weight": [48], "bias": [48]}, {"normed": ["N", 48]}, 1)
    x, weight, bias = arrays(7, 48), arrays(48), arrays(48)[::-1].copy()
    (normed,) = graph.run(None, {"x": x, "weight": weight, "bias": bias})
    np.testing.assert_array_equal(normed, add_norm(native_library, x, None, weight, bias, is_layer_norm=True)[0])


@pytest.mark.parametrize("gelu", [0, 1])
def test_the_gate_in_a_session(native_library: ctypes.CDLL, gelu: int) -> None:
    node = helper.make_node("GateUp", ["x"], ["y"], domain=NATIVE, gelu=gelu)
    graph = node_session(node, {"x": ["B", "S", 96]}, {"y": ["B", "S", 48]}, 2)
    x = arrays(3, 100, 96)
    (y,) = graph.run(None, {"x": x})
    np.testing.assert_array_equal(y.reshape(300, 48), gate_up(native_library, x.reshape(300, 96), is_gelu=bool(gelu)))


@pytest.mark.usefixtures("native_library")
def test_a_failure_is_an_error_of_the_run_with_the_operators_name() -> None:
    graph = norm_session(1)
    with pytest.raises(Exception, match=r"headrace\.AddNorm: x and skip differ in size"):
        graph.run(None, {"x": arrays(3, 48), "skip": arrays(2, 48), "weight": arrays(48)})
    assert len(graph.run(None, {"x": arrays(2, 48), "skip": arrays(2, 48), "weight": arrays(48)})) == 2


@pytest.mark.usefixtures("native_library")
def test_a_missing_attribute_refuses_the_session() -> None:
    node = helper.make_node("AddNorm", ["x", "", "weight"], ["y"], domain=NATIVE)
    with pytest.raises(Exception, match="epsilon"):
        node_session(node, {"x": ["N", 48], "weight": [48]}, {"y": ["N", 48]}, 1)
