"""The cache of compiled grammars: bounded by memory, least recently used first, never a grammar that failed."""

import gc
from typing import Any

import numpy as np
import pytest

from runtime.core import ConstraintKind
from runtime.errors import Overloaded
from runtime.grammar import kept as kept_grammars
from runtime.grammar.kept import MIN_BYTES, Compiled, GrammarKey, KeptGrammars, SharedLexer

MB = 2**20


def key(name: object) -> GrammarKey:
    return (ConstraintKind.REGEX, str(name))


def compiled(num_bytes: int) -> Compiled:
    """One that takes so much; nobody looks at its matcher here."""
    matcher: Any = object()
    return Compiled(matcher, np.ones(1, np.bool_), SharedLexer(num_bytes, has_foresight=True))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> KeptGrammars:
    monkeypatch.setattr(kept_grammars, "KEPT_BYTES", 10 * MB)
    monkeypatch.setattr(kept_grammars, "USED_BYTES", 20 * MB)
    return KeptGrammars()


def test_as_many_are_kept_as_fit_and_the_last_used_stay(kept: KeptGrammars) -> None:
    for number in range(3):
        kept.keep(key(number), compiled(3 * MB))
    assert kept.find(key(0)) is not None
    kept.keep(key(3), compiled(3 * MB))
    assert kept.find(key(1)) is None and kept.num_bytes() == 9 * MB
    assert all(kept.find(key(number)) is not None for number in (0, 2, 3))
    kept.keep(key(4), compiled(11 * MB))
    assert kept.num_bytes() == 0, "one that does not fit is not kept"
    for number in range(100):
        kept.keep(key(number), compiled(0))
    assert kept.num_bytes() == 10 * MB // MIN_BYTES * MIN_BYTES, "the smallest count as well"


def test_growth_counts_and_ends_in_a_new_one(kept: KeptGrammars) -> None:
    one = compiled(MB)
    kept.keep(key(1), one)
    cheap_s = kept_grammars.CHEAP_S_PER_TOKEN
    for _ in range(10_000):  # ordinary masks make nothing
        one.lexer.note(1000 * cheap_s, num_masks=1, vocab_size=1000)
    assert kept.num_bytes() == MB
    one.lexer.note(8 * MB / kept_grammars.GROWTH_BYTES_PER_S, num_masks=0, vocab_size=1000)
    assert kept.num_bytes() == pytest.approx(9 * MB, abs=10) and kept.find(key(1)) is one
    kept.keep(key(2), compiled(2 * MB))
    assert kept.find(key(1)) is None and kept.num_bytes() == 2 * MB
    worn = compiled(MB)
    kept.keep(key(3), worn)
    worn.lexer.note(1.0, num_masks=1, vocab_size=1000)
    assert kept.find(key(3)) is None


def test_one_that_failed_is_not_found_again(kept: KeptGrammars) -> None:
    one = compiled(MB)
    kept.keep(key(1), one)
    one.lexer.note_failure()
    assert kept.find(key(1)) is None and kept.num_bytes() == 0


def test_those_in_use_leave_room_or_the_next_waits(kept: KeptGrammars) -> None:
    in_use = [compiled(6 * MB) for _ in range(3)]
    for number, one in enumerate(in_use):
        kept.make_room(6 * MB)
        kept.keep(key(number), one)
    with pytest.raises(Overloaded, match="take 19 MB of 21") as refused:
        kept.make_room(6 * MB)
    assert refused.value.retry_after > 0
    in_use.pop()
    del one
    gc.collect()
    kept.make_room(6 * MB)
