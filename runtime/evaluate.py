"""`headrace eval`: perplexity of an artifact on any text, and its distance from another artifact.

Text is cut into non-overlapping windows, each read from an empty cache, so every token but a window's first is
predicted from what precedes it in the window. A long text is read and tokenized line by line in pieces of about a
megabyte, cut at line ends, and logits are compared a chunk at a time: memory does not grow with the text.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InvalidSetting

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.ort_session import OrtSession
    from runtime.scoring import Distance, Likelihood

PIECE_BYTES = 1 << 20
DEFAULT_WINDOW = 512


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace eval", description="Perplexity of an artifact on a text, and its distance from another artifact."
    )
    parser.add_argument("artifact", help="directory written by `headrace export`")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument(
        "--against", metavar="ARTIFACT", help="also KL, top-1 agreement and perplexity change from this"
    )
    parser.add_argument("--window", type=int, help=f"tokens a window; default {DEFAULT_WINDOW}, or the model's limit")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="stop after about this many tokens")
    parser.add_argument("--threads", type=int, help="threads of the model, by default one per core")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    parser.add_argument("--allow-failed", action="store_true", help="use artifacts that failed their accuracy gate")
    return parser


def main(argv: list[str]) -> int:
    """Score, and print a table or one JSON line."""
    args = _parser().parse_args(argv)
    from runtime.artifact import open_artifact

    artifact = open_artifact(args.artifact, allow_failed=args.allow_failed)
    against = open_artifact(args.against, allow_failed=args.allow_failed) if args.against else None
    _check(args, artifact, against)
    windows = _windows(args.text, artifact, args.window, args.limit)
    result = evaluate(artifact, windows, against=against, window=args.window, threads=args.threads)
    if not result["tokens"]:
        raise InvalidSetting(f"{args.text} has fewer than two tokens: nothing to predict; give a longer text")
    result = {"artifact": str(artifact.path), "text": str(args.text), "window": args.window, **result}
    sys.stdout.write(json.dumps(result) + "\n" if args.json else _table(result))
    return 0


def evaluate(
    artifact: "Artifact",
    windows: Iterator[list[int]],
    *,
    against: "Artifact | None" = None,
    window: int = DEFAULT_WINDOW,
    threads: int | None = None,
) -> dict[str, Any]:
    """Figures of one artifact on windows of token ids, of two if `against` is the reference; a JSON-able dict.

    Perplexity is exp of the mean negative log-likelihood in nats per predicted token; KL(against || artifact) is in
    nats per token.
    """
    from runtime.ort_session import OrtSession

    session = OrtSession.open(artifact, num_slots=1, capacity=window, threads=threads)
    if against is None:
        return _likelihood_figures(_likelihood(session, windows))
    reference = OrtSession.open(against, num_slots=1, capacity=window, threads=threads)
    return _distance_figures(_distance(session, reference, windows), against)


def _likelihood(session: "OrtSession", windows: Iterator[list[int]]) -> "Likelihood":
    from runtime.progress import progress_bar
    from runtime.scoring import Likelihood, log_softmax, score

    likelihood = Likelihood()
    with progress_bar("eval", total=None, unit="token") as bar:
        for window in windows:
            for chunk in score(session, [window]):
                likelihood.add(log_softmax(chunk.logits), chunk.next_ids)
                bar.update(len(chunk.next_ids))
    return likelihood


def _distance(session: "OrtSession", reference: "OrtSession", windows: Iterator[list[int]]) -> "Distance":
    from runtime.progress import progress_bar
    from runtime.scoring import Distance, score

    distance = Distance()
    with progress_bar("eval", total=None, unit="token") as bar:
        for window in windows:
            for ours, theirs in zip(score(session, [window]), score(reference, [window]), strict=True):
                distance.add(theirs.logits, ours.logits, ours.next_ids)
                bar.update(len(ours.next_ids))
    return distance


def _likelihood_figures(likelihood: "Likelihood") -> dict[str, Any]:
    return {"tokens": likelihood.num_tokens, "perplexity": _finite(likelihood.perplexity)}


def _distance_figures(distance: "Distance", against: "Artifact") -> dict[str, Any]:
    if not distance.num_rows:
        return {"tokens": 0}
    return {
        "tokens": distance.num_rows,
        "perplexity": _finite(distance.candidate.perplexity),
        "against": str(against.path),
        "perplexity_against": _finite(distance.reference.perplexity),
        "perplexity_increase": _finite(distance.perplexity_increase),
        "kl": _finite(distance.kl),
        "top1_agreement": distance.top1_agreement,
        "max_logit_error": _finite(distance.max_logit_error),
    }


def _finite(value: float) -> float | str:
    """JSON knows no infinity and no NaN."""
    return value if math.isfinite(value) else str(value)


def _check(args: argparse.Namespace, artifact: "Artifact", against: "Artifact | None") -> None:
    from runtime.artifact import sha256_of

    longest = min(one.manifest.dims.max_len for one in (artifact, against) if one is not None)
    args.window = min(DEFAULT_WINDOW, longest) if args.window is None else args.window
    if not 2 <= args.window <= longest:
        raise InvalidSetting(f"--window {args.window} is outside 2 to {longest:,}, the longest sequence of the model")
    if args.limit is not None and args.limit < 2:
        raise InvalidSetting(f"--limit {args.limit} leaves nothing to predict; give at least 2 tokens")
    if not args.text.is_file():
        raise InvalidSetting(f"--text {args.text} is not a file")
    for one in (artifact, against):
        if one is not None and "tokenizer.json" not in one.manifest.files:
            raise InvalidSetting(f"{one.path} has no tokenizer.json, so no text can be scored with it")
    if against is None:
        return
    sizes = [one.manifest.dims.vocab_size for one in (artifact, against)]
    if sizes[0] != sizes[1]:
        raise InvalidSetting(f"the artifacts have vocabularies of {sizes[0]:,} and {sizes[1]:,}: not comparable")
    if sha256_of(artifact.path / "tokenizer.json") != sha256_of(against.path / "tokenizer.json"):
        raise InvalidSetting("the artifacts have different tokenizers: their token ids mean different text")


def _windows(text: Path, artifact: "Artifact", window: int, limit: int | None) -> Iterator[list[int]]:
    """Windows of token ids of a file; only the very last may be shorter, and one of a single token is dropped."""
    from runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(artifact.path)
    ids: Iterator[int] = (
        token for piece in _pieces(text) for token in tokenizer.encode(piece, add_special_tokens=False)
    )
    if limit is not None:
        ids = islice(ids, limit)
    while len(part := list(islice(ids, window))) > 1:
        yield part


def _pieces(text: Path) -> Iterator[str]:
    """The file's text in pieces that end at a line end. InvalidSetting names the first byte that is not UTF-8."""
    offset = 0
    with text.open("rb") as file:
        while raw := b"".join(file.readlines(PIECE_BYTES)):
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise InvalidSetting(
                    f"--text {text} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start:,}; "
                    "convert it first"
                ) from error
            offset += len(raw)


def _table(result: dict[str, Any]) -> str:
    rows = [(name, value if isinstance(value, str | int) else f"{value:.6g}") for name, value in result.items()]
    return "".join(f"{name:22}{value}\n" for name, value in rows)
