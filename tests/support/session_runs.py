"""Runs sequences through a session and returns logits: one sequence in pieces, or rows of different lengths."""

from typing import Any

import numpy as np

from runtime.session.session import Batch, Session

# float32 sums of a few hundred terms near 1, in another order; a wrong rotation or mask costs whole units.
LOGIT_TOLERANCE = 1e-4


def run_in_pieces(session: Session, ids: np.ndarray[Any, Any], sizes: list[int]) -> np.ndarray[Any, Any]:
    """Logits of every position; the sequence is fed in pieces to slot 3."""
    done, out = 0, []
    for size in sizes:
        row = ids[None, done : done + size].astype(np.int64)
        out.append(
            session.run(Batch(3, row, np.array([done], np.int32), np.array([size], np.int32), np.arange(size))).copy()
        )
        done += size
    return np.concatenate(out)


def run_ragged(session: Session, rows: list[np.ndarray[Any, Any]], past: list[int]) -> np.ndarray[Any, Any]:
    """Last logits of rows of different lengths in one run; padded only as far as the slots allow."""
    chunk = max(map(len, rows))
    if max(past) + chunk > session.info.capacity:
        return np.concatenate([run_row(session, idx, row, past[idx]) for idx, row in enumerate(rows)])
    ids = np.zeros((len(rows), chunk), np.int64)
    for idx, row in enumerate(rows):
        ids[idx, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    wanted = np.arange(len(rows)) * chunk + lengths - 1
    return session.run(Batch(0, ids, np.array(past, np.int32), lengths, wanted)).copy()


def run_row(session: Session, slot: int, row: np.ndarray[Any, Any], past: int) -> np.ndarray[Any, Any]:
    batch = Batch(
        slot,
        row[None].astype(np.int64),
        np.array([past], np.int32),
        np.array([len(row)], np.int32),
        np.array([len(row) - 1]),
    )
    return session.run(batch).copy()
