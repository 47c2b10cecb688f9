"""Memory of the KV cache: zeros, committed page by page when written, given back by slot and with the last view."""

import gc
import mmap

import numpy as np
import pytest

from runtime.machine.kv_pages import PAGE_BYTES, LazyArrays, PageLayout, aligned_len, plain_layout, resident_bytes
from tests.support import server_process


def test_memory_is_committed_as_it_is_written_and_given_back() -> None:
    before = server_process.resident_bytes()
    pool = LazyArrays(3, (64, 2, 8192, 64), np.float32)  # 805 MB
    assert server_process.resident_bytes() - before < 2**24
    assert not any(map(resident_bytes, pool.arrays))
    array = pool.arrays[1]
    array[3, 1, :16] = 1
    assert array[3, 1, :17].sum() == 16 * 64
    array[2, 0, 4000:4096] = 2
    held = -(-16 * 256 // PAGE_BYTES) + -(-96 * 256 // PAGE_BYTES)
    assert held * PAGE_BYTES <= resident_bytes(array) <= (held + 2) * PAGE_BYTES, "and the page of zeros that was read"
    pool.drop_slot(3)
    assert not array[3, 1, :16].any() and (array[2, 0, 4000:4096] == 2).all(), "the neighbour keeps what it holds"
    for item in pool.arrays:
        item[:8] = 1
    assert server_process.resident_bytes() - before > 90 * 2**20
    view = array[5:6]
    pool.free()
    del array, item
    assert (view == 1).all()
    del view, pool
    gc.collect()
    assert server_process.resident_bytes() - before < 2**25


def test_slots_that_share_a_page_keep_it() -> None:
    pool = LazyArrays(2, (5, 3000), np.uint8)
    for array in pool.arrays:
        array[:] = 7
    pool.drop_slot(2)
    for array in pool.arrays:
        assert (array[[0, 1, 3, 4]] == 7).all()
    whole = LazyArrays(2, (3, 4 * PAGE_BYTES), np.uint8)
    for array in whole.arrays:
        array[:] = 7
    whole.drop_slot(2)
    assert [array.any(axis=1).tolist() for array in whole.arrays] == [[True, True, False]] * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_any_type_starts_as_zeros(dtype: type[np.generic]) -> None:
    pool = LazyArrays(2, (2, 3, 5), dtype)
    for array in pool.arrays:
        assert array.shape == (2, 3, 5) and array.dtype == dtype and not array.any() and array.flags.writeable


def test_more_addresses_than_memory_are_mapped_but_not_any_number() -> None:
    pool = LazyArrays(56, (64, 8, 32_768, 128), np.float32)  # 64 slots of Qwen3-0.6B: 481 GB
    pool.arrays[55][63, 7, 32_767] = 1
    assert resident_bytes(pool.arrays[55][63, 7]) == PAGE_BYTES
    with pytest.raises(MemoryError, match=r"cannot be mapped.*lower --max-batch or --max-len"):
        LazyArrays(1, (1, 2**46), np.float32)


def test_tokens_fill_pages() -> None:
    """Streams of 64 floats a token: 16 tokens a page of 4,096 bytes."""
    layout = PageLayout(256, 180, page_bytes=4096)
    assert [layout.committed(count) // (180 * 4096) for count in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]
    lengths = np.array([0, 1, 16, 17, 500], np.int32)
    assert layout.all_committed(lengths) == sum(map(layout.committed, lengths.tolist()))
    for count in (1, 16, 17, 500):
        longest = layout.fitting_tokens(layout.committed(count))
        assert longest >= count and layout.committed(longest) == layout.committed(count)
        assert layout.committed(longest + 1) > layout.committed(count)
    assert layout.fitting_tokens(180 * 4096 - 1) == 0


def test_a_spare_position_counts_for_slots_that_hold_something() -> None:
    layout = PageLayout(256, 1, page_bytes=4096, num_spare=1)
    assert [layout.committed(count) // 4096 for count in (0, 15, 16, 31, 32)] == [0, 1, 2, 2, 3]
    assert layout.all_committed(np.array([0, 15, 16], np.int32)) == 3 * 4096
    assert layout.fitting_tokens(2 * 4096) == 31


def test_memory_without_pages_counts_tokens() -> None:
    layout = plain_layout(24)
    assert layout.committed(7) == 7 * 24 and layout.fitting_tokens(7 * 24 + 23) == 7


@pytest.mark.parametrize("token_bytes", [1, 16, 80, 256, 384, 512, 4096])
def test_streams_end_at_the_end_of_a_page(token_bytes: int) -> None:
    for count in (1, 100, 8192, 8193):
        length = aligned_len(count, token_bytes)
        assert length >= count and length * token_bytes % PAGE_BYTES == 0
        assert (length - count) * token_bytes < PAGE_BYTES * token_bytes


def test_the_system_is_asked_for_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no huge pages, madvise fails, and there is nothing to ask for."""

    class NoHugePages(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            raise OSError("no huge pages")

    monkeypatch.setattr(mmap, "mmap", NoHugePages)
    assert not LazyArrays(1, (4, 4), np.float32).arrays[0].any()
