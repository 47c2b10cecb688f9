"""One dialect's graph against another's: the same tokens through both, in the four ways a scheduler runs a model.

    prefill   a head of the text in one run
    decode    token by token
    chunked   in pieces of several sizes
    ragged    rows of different lengths and pasts in one batch, then one more token for each

Judged by gates.py; knows no reference.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.session import Batch, Session

HEAD = 48  # tokens; logits of each are kept, four times, for each dialect

Ways = Mapping[str, NDArray[np.float32]]


def figure_name(dialect: str, figure: str) -> str:
    """A receipt's name for a dialect's figure: as it is for `ort`, `trt.kl` for the others."""
    return figure if dialect == "ort" else f"{dialect}.{figure}"


def four_ways(session: Session, window: Sequence[int]) -> Ways:
    """Logits float32 `[n, vocab]` of a window's head, by way; overwrites slot 0 and its neighbours."""
    ids = list(window[:HEAD])
    rows = min(4, session.info.num_slots)
    cuts = [1 + (row * 13) % (len(ids) - 1) for row in range(rows)]
    heads = run_rows(session, [ids[:cut] for cut in cuts], [0] * rows).copy()
    nexts = run_rows(session, [[ids[cut]] for cut in cuts], cuts).copy()
    return {
        "prefill": _in_pieces(session, ids, [len(ids)]),
        "decode": _in_pieces(session, ids, [1] * min(16, len(ids))),
        "chunked": _in_pieces(session, ids, [11, 1, 17, len(ids)]),
        "ragged": np.concatenate([heads, nexts]),
    }


def parity_figures(runs: Mapping[str, tuple[Ways, Sequence[Sequence[int]]]]) -> dict[str, Any]:
    """The largest logit difference from the `ort` dialect in each way, and the share of prompts with equal tokens.

    Nothing where there is no `ort` dialect to compare with.
    """
    if "ort" not in runs:
        return {}
    ways, tokens = runs["ort"]
    figures: dict[str, Any] = {}
    for dialect, (other_ways, other_tokens) in runs.items():
        if dialect == "ort":
            continue
        for way, logits in ways.items():
            figures[figure_name(dialect, f"{way}_error")] = float(np.abs(logits - other_ways[way]).max())
        equal = [list(a) == list(b) for a, b in zip(tokens, other_tokens, strict=True)]
        figures[figure_name(dialect, "equal_tokens")] = float(np.mean(equal))
    return figures


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
