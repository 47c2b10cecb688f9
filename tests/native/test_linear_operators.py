"""BlockLinear and ChannelLinear in sessions of ONNX Runtime: the kernels' own results, and what is refused."""

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from export.graph.builder import NATIVE
from export.storage.blocks import quantize_rows
from tests.support.native.linear import pack_blocks, pack_channels
from tests.support.native.sessions import node_session


def session(operator: str, constants: dict[str, NDArray[Any]], threads: int, **attributes: Any) -> Any:
    """A session of one product, whose inputs are x [rows, K] and these constants."""
    node = helper.make_node(operator, ["x", *constants], ["y"], domain=NATIVE, **attributes)
    shape = ["B", "S", None]
    return node_session(node, {"x": shape}, {"y": shape}, threads, constants)


def floats(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_in_a_session(native_library: ctypes.CDLL, bits: int, threads: int) -> None:
    rows = quantize_rows(floats(200, 96), bits=bits, block_size=32, symmetric=bits == 8)
    constants: dict[str, NDArray[Any]] = {"values": rows.values, "scales": rows.scales}
    if rows.zero_points is not None:
        constants["zero_points"] = rows.zero_points
    graph = session("BlockLinear", constants, threads, N=200, K=96, bits=bits, block_size=32)
    kernel = pack_blocks(native_library, rows, 96, bits=bits)
    for batch, length in ((0, 3), (1, 1), (3, 5), (2, 300)):
        x = floats(batch, length, 96)
        (y,) = graph.run(None, {"x": x})
        assert y.shape == (batch, length, 200)
        np.testing.assert_array_equal(y.reshape(-1, 200), kernel.multiply(x.reshape(-1, 96)))


@pytest.mark.parametrize("attributes", [{"scale": 0.02}, {"group_size": 32}, {}], ids=str)
def test_channels_in_a_session(native_library: ctypes.CDLL, attributes: dict[str, Any]) -> None:
    values = np.random.default_rng(0).integers(-127, 128, (80, 50)).astype(np.int8)
    scales = np.abs(floats(50))
    graph = session("ChannelLinear", {"values": values, "scales": scales}, 2, **attributes)
    scale, group = attributes.get("scale", 0), attributes.get("group_size", 0)
    kernel = pack_channels(native_library, values, scales, group=group, scale=scale)
    x = floats(2, 9, 80)
    (y,) = graph.run(None, {"x": x})
    np.testing.assert_array_equal(y.reshape(18, 50), kernel.multiply(x.reshape(18, 80)))


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2}, "bits must be 4 or 8"),
        ({"block_size": 12}, "a multiple of 8"),
        ({"K": 64}, "do not fit N, K, bits and block_size"),
        ({"N": 7}, "do not fit N, K, bits and block_size"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    rows = quantize_rows(floats(8, 96), bits=8, block_size=32, symmetric=True)
    attributes = {"N": 8, "K": 96, "bits": 8, "block_size": 32} | change
    with pytest.raises(Exception, match=message):
        session("BlockLinear", {"values": rows.values, "scales": rows.scales}, 1, **attributes)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(
    ("num_scales", "attributes", "message"),
    [
        (4, {}, r"values must be \[K, N\] and scales \[N\]"),
        (5, {"group_size": 20}, "a multiple of 8"),
        (5, {"group_size": 16, "scale": 0.1}, "a calibrated scale is for the whole row"),
    ],
)
def test_channels_that_do_not_fit_are_refused(num_scales: int, attributes: dict[str, Any], message: str) -> None:
    constants: dict[str, NDArray[Any]] = {
        "values": np.ones((32, 5), np.int8),
        "scales": np.ones(num_scales, np.float32),
    }
    with pytest.raises(Exception, match=message):
        session("ChannelLinear", constants, 1, **attributes)


@pytest.mark.usefixtures("native_library")
def test_inputs_of_another_size_fail_the_run() -> None:
    values, scales = np.ones((32, 5), np.int8), np.ones(5, np.float32)
    graph = session("ChannelLinear", {"values": values, "scales": scales}, 1)
    with pytest.raises(Exception, match="x does not fit the weights"):
        graph.run(None, {"x": floats(1, 2, 31)})
