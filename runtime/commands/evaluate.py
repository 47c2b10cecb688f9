"""`headrace eval`: perplexity of an artifact on any text, and its distance from another artifact.

Text is cut into non-overlapping windows, each read from an empty cache, so every token but a window's first is
predicted from the tokens before it in the window. No special tokens are added. The text is read in pieces and logits
are compared in chunks, so memory does not grow with the text. It is read twice, first to count its tokens: a bad byte
at its end is reported before hours of scoring.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InvalidArtifact, InvalidSetting
from runtime.settings import check_at_least
from runtime.text.text_file import check_readable, pieces_of

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.machine.progress import Progress
    from runtime.session.scoring import Distance, Likelihood
    from runtime.session.session import Session
    from runtime.text.tokenizer import Tokenizer

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
    from runtime.artifact.manifest import open_artifact

    artifact = open_artifact(args.artifact, allow_failed=args.allow_failed)
    against = open_artifact(args.against, allow_failed=args.allow_failed) if args.against else None
    _check(args, artifact, against)
    from runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_artifact(artifact)
    num_ids = count_ids(args.text, tokenizer, limit=args.limit, vocab_size=artifact.manifest.dims.vocab_size)
    if num_ids < 2:
        raise InvalidSetting(f"--text {args.text} has fewer than two tokens: nothing to predict; give a longer text")
    figures = evaluate(
        artifact,
        windows_of_file(args.text, tokenizer, window=args.window, limit=args.limit),
        against=against,
        window=args.window,
        threads=args.threads,
        num_tokens=num_ids - -(-num_ids // args.window),
    )
    result = {"artifact": str(artifact.path), "text": str(args.text), "window": args.window, **figures}
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n" if args.json else _table(result))
    return 0


def evaluate(
    artifact: "Artifact",
    windows: Iterator[list[int]],
    *,
    against: "Artifact | None" = None,
    window: int = DEFAULT_WINDOW,
    threads: int | None = None,
    num_tokens: int | None = None,
) -> dict[str, Any]:
    """Figures of one artifact on windows of token ids, of two if `against` is the reference; a JSON-able dict.

    Perplexity is exp of the mean negative log-likelihood in nats per predicted token; KL(against || artifact) is in
    nats per token. Each runs its native graph where it can, else the `ort` one. `window` is the longest of the windows.
    `num_tokens`, the number of predictions, is for the progress bar alone.
    """
    from runtime.backends.ort.native import has_native_graph
    from runtime.backends.ort.native_session import open_cpu_session
    from runtime.machine.progress import progress_bar

    with ExitStack() as stack:
        sessions = []
        for one in (artifact, against):
            if one is not None:
                dialect = "native" if has_native_graph(one) else "ort"
                sessions.append(open_cpu_session(one, dialect, num_slots=1, capacity=window, threads=threads))
                stack.callback(sessions[-1].close)
        bar = stack.enter_context(progress_bar("eval", total=num_tokens, unit="token"))
        if against is None:
            likelihood = _likelihood(sessions[0], windows, bar)
            return {"tokens": likelihood.num_tokens, "perplexity": _finite(likelihood.perplexity)}
        return _distance_figures(_distance(sessions[0], sessions[1], windows, bar), against)


def _likelihood(session: "Session", windows: Iterator[list[int]], bar: "Progress") -> "Likelihood":
    from runtime.session.scoring import Likelihood, log_softmax, score

    likelihood = Likelihood()
    for window in windows:
        for chunk in score(session, [window]):
            likelihood.add(log_softmax(chunk.logits), chunk.next_ids)
            bar.update(len(chunk.next_ids))
    return likelihood


def _distance(session: "Session", reference: "Session", windows: Iterator[list[int]], bar: "Progress") -> "Distance":
    from runtime.session.scoring import Distance, score

    distance = Distance()
    for window in windows:
        for ours, theirs in zip(score(session, [window]), score(reference, [window]), strict=True):
            distance.add(theirs.logits, ours.logits, ours.next_ids)
            bar.update(len(ours.next_ids))
    return distance


def _distance_figures(distance: "Distance", against: "Artifact") -> dict[str, Any]:
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
    """The value, or its name where JSON has no number for it (infinity, NaN)."""
    return value if math.isfinite(value) else str(value)


def _check(args: argparse.Namespace, artifact: "Artifact", against: "Artifact | None") -> None:
    artifacts = [artifact] if against is None else [artifact, against]
    shortest = min(artifacts, key=lambda one: one.manifest.dims.max_len)
    longest = shortest.manifest.dims.max_len
    args.window = min(DEFAULT_WINDOW, longest) if args.window is None else args.window
    if not 2 <= args.window <= longest:
        raise InvalidSetting(
            f"--window {args.window} is outside 2 to {longest:,}, the longest sequence {shortest.path} was exported for"
        )
    if args.limit is not None and args.limit < 2:
        raise InvalidSetting(f"--limit {args.limit} leaves nothing to predict; give at least 2 tokens")
    check_at_least("threads", args.threads, 1)
    check_readable(args.text)
    for one in artifacts:
        if "tokenizer.json" not in one.manifest.files:
            raise InvalidSetting(
                f"{one.path} has no tokenizer.json, so no text can be scored with it; export a checkpoint that has one"
            )
    if against is not None:
        _check_comparable(artifact, against)


def _check_comparable(artifact: "Artifact", against: "Artifact") -> None:
    ours, theirs = artifact.manifest, against.manifest
    if ours.dims.vocab_size != theirs.dims.vocab_size:
        raise InvalidSetting(
            f"{artifact.path} has {ours.dims.vocab_size:,} tokens in its vocabulary and {against.path} has "
            f"{theirs.dims.vocab_size:,}: not comparable; give two exports of one model"
        )
    if ours.files["tokenizer.json"].sha256 != theirs.files["tokenizer.json"].sha256:
        raise InvalidSetting(
            f"{artifact.path} and {against.path} have different tokenizers: a token id means different text in each; "
            "give two exports of one model"
        )


def count_ids(text: Path, tokenizer: "Tokenizer", *, limit: int | None, vocab_size: int) -> int:
    """Tokens of a file, at most `limit`. Raises InvalidSetting; InvalidArtifact for an id the model does not have."""
    from runtime.machine.progress import progress_bar

    num_ids = 0
    with progress_bar("read", total=text.stat().st_size, unit="B") as bar:
        for piece in pieces_of(text):
            ids = tokenizer.encode(piece, add_special_tokens=False)
            if max(ids, default=0) >= vocab_size:
                raise InvalidArtifact(
                    f"the tokenizer gives the id {max(ids)}, the model's vocabulary ends at {vocab_size - 1:,}; "
                    "export the model again with the tokenizer that belongs to it"
                )
            num_ids += len(ids)
            if limit is not None and num_ids >= limit:
                return limit
            bar.update(len(piece.encode()))
    return num_ids


def windows_of_file(text: Path, tokenizer: "Tokenizer", *, window: int, limit: int | None) -> Iterator[list[int]]:
    """Windows of token ids of a file; only the very last may be shorter, and one of a single token is dropped."""
    pieces = (tokenizer.encode(piece, add_special_tokens=False) for piece in pieces_of(text))
    ids = islice(chain.from_iterable(pieces), limit)
    while len(part := list(islice(ids, window))) > 1:
        yield part


def _table(result: dict[str, Any]) -> str:
    """The result for people, with percentages, units and the direction of each distance."""
    rows = {
        "artifact": result["artifact"],
        "text": f"{result['text']}, {result['tokens']:,} tokens predicted in windows of {result['window']:,}",
        "perplexity": _shown(result["perplexity"], ".4f"),
    }
    if "against" in result:
        rows |= {
            "against": result["against"],
            "its perplexity": _shown(result["perplexity_against"], ".4f"),
            "perplexity change": _shown(result["perplexity_increase"], "+.3%"),
            "KL(against || this)": _shown(result["kl"], ".4g") + " nats a token",
            "top-1 agreement": _shown(result["top1_agreement"], ".2%"),
            "max logit error": _shown(result["max_logit_error"], ".4g"),
        }
    return "".join(f"{name:21}{value}\n" for name, value in rows.items())


def _shown(value: float | str, spec: str) -> str:
    return value if isinstance(value, str) else format(value, spec)
