"""Memory of the KV cache: zeros, committed when written, and returned with the last view."""

import gc

import numpy as np
import pytest

from runtime.machine.kv_pages import lazy_zeros
from tests.support.server_process import resident_bytes


def test_memory_is_committed_as_it_is_written_and_given_back() -> None:
    before = resident_bytes()
    pool = lazy_zeros((64, 2, 8192, 64), np.float32)  # 268 MB
    assert resident_bytes() - before < 2**24
    pool[3, 1, :16] = 1
    assert pool[3, 1, :17].sum() == 16 * 64 and not pool[4].any()
    del pool
    gc.collect()
    held = lazy_zeros((2**26,), np.uint8)
    held[:] = 1
    assert resident_bytes() - before > 2**25
    view = held[5:6]
    del held
    assert view[0] == 1
    del view
    gc.collect()
    assert resident_bytes() - before < 2**25


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_any_type_starts_as_zeros(dtype: type[np.generic]) -> None:
    pool = lazy_zeros((2, 3, 5), dtype)
    assert pool.shape == (2, 3, 5) and pool.dtype == dtype and not pool.any() and pool.flags.writeable


def test_too_much_is_said() -> None:
    with pytest.raises(MemoryError, match="cannot be mapped"):
        lazy_zeros((2**46,), np.float32)
