"""Repeats the receipt's tokens on the device that will serve.

The receipt holds the prompts that were continued when the model was exported, and the tokens each graph gave. Here the
device's own session is fed the same tokens, in prefilled chunks and then one by one with all prompts in a batch, and
must choose each next one as the receipt says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.artifact.manifest import Artifact
from runtime.errors import InvalidArtifact
from runtime.session.session import Batch, Session

MIN_AGREEMENT = {"fp32": 0.995}
"""Other kernels add floats in another order. In float32 that changes a choice only between logits that differ in
their last digits."""
MIN_AGREEMENT_ROUNDED = 0.95
"""Half precision and integers change choices between logits that are close. A cache one token off agrees on about half
(tests/graph/artifact/test_replay.py).
"""


@dataclass(frozen=True)
class Replay:
    """Shares of tokens chosen as in the receipt: at the end of a prefill, and in batched decoding."""

    device: str
    dialect: str
    prefill: float
    decode: float
    num_tokens: int
    limit: float

    @property
    def passed(self) -> bool:
        return min(self.prefill, self.decode) >= self.limit


def replay(artifact: Artifact, session: Session) -> Replay:
    """Repeat the receipt's continuations. InvalidArtifact if the receipt has none."""
    dialect = session.info.dialect
    recorded = artifact.receipt.get("replay", {})
    tokens = recorded.get("tokens", {}).get(dialect)
    if not tokens:
        raise InvalidArtifact(f"{artifact.path}: the receipt has no tokens of the {dialect} graph; export it again")
    room = session.info.capacity
    each = zip(recorded["prompts"], tokens, strict=False)  # some graphs continue fewer prompts
    pairs = [(prompt, answer) for prompt, answer in each if len(prompt) + len(answer) <= room]
    if not pairs:
        raise InvalidArtifact(f"{artifact.path}: no prompt of the receipt fits slots of {room} tokens; raise --max-len")
    rows = session.info.num_slots
    highest = max(max(prompt + answer) for prompt, answer in pairs)
    if highest >= session.info.vocab_size:
        raise InvalidArtifact(
            f"{artifact.path}: the receipt has token {highest}, the vocabulary ends at {session.info.vocab_size - 1}; "
            "export it again"
        )
    right: list[tuple[int, int]] = []
    for start in range(0, len(pairs), rows):
        right += _replay_batch(session, pairs[start : start + rows])
    num_decode = sum(len(answer) - 1 for _, answer in pairs)
    return Replay(
        device=session.info.device,
        dialect=dialect,
        prefill=sum(first for first, _ in right) / len(pairs),
        # A model of two tokens' length answers with one, which is the prefill's.
        decode=sum(rest for _, rest in right) / num_decode if num_decode else 1.0,
        num_tokens=len(pairs) + num_decode,
        limit=MIN_AGREEMENT.get(artifact.manifest.precision, MIN_AGREEMENT_ROUNDED),
    )


def _replay_batch(session: Session, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[int, int]]:
    """For each prompt: 1 if its first token is the receipt's, else 0; and how many of the further tokens are."""
    right = []
    for slot, (prompt, answer) in enumerate(pairs):
        half = max(1, len(prompt) // 2)
        for begin, piece in ((0, prompt[:half]), (half, prompt[half:])):  # in two chunks, as long prompts are
            if piece:
                ids = np.array([piece])
                count, past = np.array([len(piece)], np.int32), np.array([begin], np.int32)
                logits = session.run(Batch(slot, ids, past, count, np.array([len(piece) - 1])))
        right.append([int(int(logits[0].argmax()) == answer[0]), 0])
    for step in range(min(len(answer) for _, answer in pairs) - 1):
        ids = np.array([[answer[step]] for _, answer in pairs])
        past = np.array([len(prompt) + step for prompt, _ in pairs], np.int32)
        logits = session.run(Batch(0, ids, past, np.ones(len(pairs), np.int32), np.arange(len(pairs))))
        for row, choice in enumerate(logits.argmax(-1).tolist()):
            right[row][1] += choice == pairs[row][1][step + 1]
    return [(first, rest) for first, rest in right]
