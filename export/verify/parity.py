"""Compares two dialects' graphs on the same tokens, in the four ways a scheduler runs a model.

    prefill   a head of the text in one run
    decode    token by token
    chunked   in pieces of several sizes
    ragged    rows of different lengths and pasts in one batch, then one more token for each

In float32 the other graph is the `ort` dialect's. In narrower types it is the float32 reference, because two graphs
that round at different places are further from each other (0.115 in fp16) than from the reference.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.session.scoring import Distance
from runtime.session.session import Batch, Session

HEAD = 48  # tokens; logits of each are kept, in four ways, for each dialect
NUM_DECODED = 16  # of them token by token

Ways = Mapping[str, NDArray[np.float32]]


def figure_name(dialect: str, figure: str) -> str:
    """A dialect's figure in the receipt: `kl` for `ort`, `trt.kl` for the dialect `trt`."""
    return figure if dialect == "ort" else f"{dialect}.{figure}"


def four_ways(session: Session, window: Sequence[int]) -> Ways:
    """Logits float32 `[n, vocab]` of a window's head, by way; overwrites slot 0 and its neighbours."""
    ids = list(window[:HEAD])
    cuts = _cuts(len(ids))[: session.info.num_slots]
    rows = len(cuts)
    heads = run_rows(session, [ids[:cut] for cut in cuts], [0] * rows).copy()
    nexts = run_rows(session, [[ids[cut]] for cut in cuts], cuts).copy()
    return {
        "prefill": _in_pieces(session, ids, [len(ids)]),
        "decode": _in_pieces(session, ids, [1] * NUM_DECODED),
        "chunked": _in_pieces(session, ids, [11, 1, 17, len(ids)]),
        "ragged": np.concatenate([heads, nexts]),
    }


def reference_ways(logits: NDArray[np.float32]) -> Ways:
    """The logits that `four_ways` should give, from the reference's logits `[HEAD or fewer, vocab]`."""
    cuts = np.array(_cuts(len(logits)))
    return {
        "prefill": logits,
        "decode": logits[:NUM_DECODED],
        "chunked": logits,
        "ragged": np.concatenate([logits[cuts - 1], logits[cuts]]),
    }


def parity_figures(dialect: str, ways: Ways, expected: Ways) -> dict[str, float]:
    """The largest logit difference in each way, and `chunk_kl`: the graph's own chunks against its one run."""
    figures = {f"{way}_error": float(np.abs(logits - expected[way]).max()) for way, logits in ways.items()}
    chunks = Distance()
    chunks.add(ways["prefill"], ways["chunked"], np.zeros(len(ways["prefill"]), np.int64))
    return {figure_name(dialect, name): value for name, value in {**figures, "chunk_kl": chunks.kl}.items()}


def _cuts(length: int) -> list[int]:
    """Where the ragged rows of a head of `length` tokens end."""
    return [1 + (row * 13) % (length - 1) for row in range(4)]


def run_rows(
    session: Session, rows: Sequence[Sequence[int]], past: Sequence[int], *, every: bool = False
) -> NDArray[np.float32]:
    """One ragged run; logits of each row's last token, or of every token of a single row."""
    chunk = max(map(len, rows))
    ids = np.zeros((len(rows), chunk), np.int64)
    for idx, row in enumerate(rows):
        ids[idx, : len(row)] = row
    query = np.array([len(row) for row in rows], np.int32)
    wanted = np.arange(chunk) if every else np.arange(len(rows)) * chunk + query - 1
    return session.run(Batch(0, ids, np.array(past, np.int32), query, wanted))


def _in_pieces(session: Session, ids: Sequence[int], sizes: Sequence[int]) -> NDArray[np.float32]:
    done, out = 0, []
    for size in sizes:
        piece = ids[done : done + size]
        if len(piece):
            out.append(run_rows(session, [piece], [done], every=True).copy())
        done += len(piece)
    return np.concatenate(out)
