"""A session on the native graph: a token's logits are the same to the bit in any batch, at any cut, in any slot."""

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact
from runtime.backends.ort.native_session import NativeSession, open_cpu_session, slot_inputs
from runtime.session.scoring import Distance
from runtime.session.session import Batch
from tests.support.native.calls import NAMES, variant
from tests.support.session_runs import LOGIT_TOLERANCE, run_in_pieces
from tests.support.tiny.artifact import TinyExports

NUM_SLOTS, CAPACITY, NUM_TOKENS = 8, 96, 61
IDS = np.random.default_rng(3).integers(3, 250, NUM_TOKENS)


@pytest.fixture(scope="module", params=["fp32", "w8a16", "w4a16", "w8a8"])
def artifact(request: pytest.FixtureRequest, tiny: TinyExports, native_library: ctypes.CDLL) -> Artifact:
    return tiny.artifact(
        "llama", request.param, dialects=("ort", "native"), hidden_size=64, intermediate_size=128, max_len=128
    )


@pytest.fixture(scope="module", params=[1, 2])
def session(request: pytest.FixtureRequest, artifact: Artifact) -> Iterator[NativeSession]:
    found = NativeSession.open_native(artifact, num_slots=NUM_SLOTS, capacity=CAPACITY, threads=request.param)
    yield found
    found.close()


@pytest.fixture(scope="module")
def expected(artifact: Artifact) -> NDArray[np.float32]:
    """Logits of every token, from one run on one thread."""
    found = NativeSession.open_native(artifact, num_slots=NUM_SLOTS, capacity=CAPACITY, threads=1)
    try:
        return run_in_pieces(found, IDS, [NUM_TOKENS])
    finally:
        found.close()


def run_rows(session: NativeSession, rows: dict[int, tuple[int, int]]) -> dict[int, NDArray[np.float32]]:
    """One run of several slots; rows: slot to the piece of IDS that follows there. Returns all logits by slot."""
    first, last = min(rows), max(rows)
    ids = np.zeros((last - first + 1, max(stop - start for start, stop in rows.values())), np.int64)
    past, query = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
    for slot, (start, stop) in rows.items():
        ids[slot - first, : stop - start] = IDS[start:stop]
        past[slot - first], query[slot - first] = start, stop - start
    wanted = np.concatenate([(slot - first) * ids.shape[1] + np.arange(query[slot - first]) for slot in rows])
    logits = session.run(Batch(first, ids, past, query, wanted))
    cuts = np.cumsum([query[slot - first] for slot in rows])[:-1]
    return dict(zip(rows, (part.copy() for part in np.split(logits, cuts)), strict=True))


@pytest.mark.parametrize("sizes", [[1] * NUM_TOKENS, [50, 1, 10], [2, 3, 1, 1, 33, 21]], ids=["steps", "cut", "many"])
def test_a_prompt_may_be_cut_anywhere(session: NativeSession, expected: NDArray[np.float32], sizes: list[int]) -> None:
    np.testing.assert_array_equal(run_in_pieces(session, IDS, sizes), expected)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_rows_of_any_slots_share_runs(
    session: NativeSession, expected: NDArray[np.float32], data: st.DataObject
) -> None:
    """Every run continues some slots by some tokens, beside idle slots between them."""
    done = dict.fromkeys(data.draw(st.sets(st.integers(0, NUM_SLOTS - 1), min_size=1)), 0)
    while any(count < NUM_TOKENS for count in done.values()):
        running = [slot for slot, count in done.items() if count < NUM_TOKENS and data.draw(st.booleans())]
        running = running or [min(slot for slot, count in done.items() if count < NUM_TOKENS)]
        sizes = {slot: data.draw(st.integers(1, min(30, NUM_TOKENS - done[slot]))) for slot in running}
        found = run_rows(session, {slot: (done[slot], done[slot] + size) for slot, size in sizes.items()})
        for slot, logits in found.items():
            np.testing.assert_array_equal(logits, expected[done[slot] : done[slot] + len(logits)])
            done[slot] += len(logits)


def test_a_full_slot_takes_a_single_token_beside_a_long_piece(session: NativeSession) -> None:
    """No padding is written: only a row's own tokens have to fit its slot."""
    long = np.resize(IDS, CAPACITY)
    run_in_pieces(session, long[:-1], [CAPACITY - 1])
    ids = np.zeros((2, 20), np.int64)
    ids[0, 0], ids[1] = long[-1], IDS[:20]
    query = np.array([1, 20], np.int32)
    logits = session.run(Batch(3, ids, np.array([CAPACITY - 1, 0], np.int32), query, np.array([0]))).copy()
    np.testing.assert_array_equal(logits, run_in_pieces(session, long, [CAPACITY])[-1:])


def test_logits_are_near_the_other_dialects(artifact: Artifact, expected: NDArray[np.float32]) -> None:
    other = open_cpu_session(artifact, "ort", num_slots=NUM_SLOTS, capacity=CAPACITY)
    try:
        logits = run_in_pieces(other, IDS, [NUM_TOKENS])
    finally:
        other.close()
    if artifact.manifest.precision == "fp32":
        assert np.abs(logits - expected).max() < LOGIT_TOLERANCE
    # A float sum in another order may round an 8-bit activation the other way: as far as rounding itself moves these
    # random weights (MAX_KL of tests/graph/test_beyond_llama.py). An unrelated model is 1.0 away.
    distance = Distance()
    distance.add(logits, expected, IDS)
    assert distance.kl < 0.03


def test_the_cache_of_quantized_weights_takes_half(artifact: Artifact, session: NativeSession) -> None:
    share = 1 if artifact.manifest.precision == "fp32" else 2
    assert session.info.kv_bytes_per_token == artifact.kv_bytes_per_token("native")
    assert share * artifact.kv_bytes_per_token("native") == artifact.kv_bytes_per_token()


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_cut_exact(artifact: Artifact, native_library: ctypes.CDLL, name: str) -> None:
    with variant(native_library, name) as runs:
        if not runs:
            pytest.skip(f"this processor does not run {name}")
        found = NativeSession.open_native(artifact, num_slots=NUM_SLOTS, capacity=CAPACITY, threads=2)
        try:
            whole = run_in_pieces(found, IDS, [NUM_TOKENS])
            np.testing.assert_array_equal(run_in_pieces(found, IDS, [7, 1, 1, 30, 22]), whole)
        finally:
            found.close()


def test_inputs_leave_idle_rows_out() -> None:
    ids = np.array([[5, 6, 7], [0, 0, 0], [8, 0, 0]])
    past, query = np.array([4, 9, 0], np.int32), np.array([3, 0, 1], np.int32)
    found = slot_inputs(Batch(2, ids, past, query, np.array([2, 6])))
    assert {name: array.tolist() for name, array in found.items()} == {
        "input_ids": [5, 6, 7, 8],
        "positions": [4, 5, 6, 0],
        "slot": [2, 4],
        "past_len": [4, 0],
        "query_len": [3, 1],
        "logits_idx": [2, 3],
    }
