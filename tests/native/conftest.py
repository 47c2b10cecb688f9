"""The native library with each instruction set in turn."""

import ctypes
from collections.abc import Iterator

import pytest

from tests.support.native.calls import NAMES, variant


@pytest.fixture(scope="module", params=NAMES)
def library(request: pytest.FixtureRequest, native_library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The library, whose kernels use one variant; skipped where the processor does not run it."""
    with variant(native_library, request.param) as runs:
        if not runs:
            pytest.skip(f"this processor does not run {request.param}")
        yield native_library
