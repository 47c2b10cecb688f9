"""Keeps compiled grammars for later requests, within a limit on memory.

All requests with the same grammar share its lexer, which grows as they follow it. llguidance does not tell its size, so
we estimate growth from the processor time spent on new states.
"""

import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from runtime.core import ConstraintKind
from runtime.errors import Overloaded
from runtime.machine.freed_memory import give_back_freed

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher
    from numpy.typing import NDArray


GrammarKey = tuple[ConstraintKind, str]

KEPT_BYTES = 64 * 2**20
"""Memory for grammars that no request uses now. Ordinary ones take 10 to 300 KB."""
USED_BYTES = 512 * 2**20
"""Memory for grammars that are kept or in use. Beyond it a request is refused for the moment."""
MIN_BYTES = 256 * 2**10
"""Least size that is counted for a grammar: up to 140 KB were measured, and its key has up to 5,000 characters."""
GROWTH_BYTES_PER_S = 300 * 2**20
"""Memory that a lexer takes for each second of building states: 220 to 330 MB for expressions made to grow."""
CHEAP_S_PER_TOKEN = 2e-9
"""Processor time of a mask that needs no new state, for each token of the vocabulary: 50 us for 49,152."""
MAX_GROWTH_BYTES = 32 * 2**20
"""A grammar that may have grown by more is compiled again for the next request: a lexer fails for good at 20,000
states."""
MAX_FREED_BYTES = 32 * 2**20
"""After dropping grammars of this size, freed memory is given back to the operating system."""


class SharedLexer:
    """Size and state of one compiled grammar, as its guides report it. May be used from any thread."""

    def __init__(self, num_bytes: int, *, has_foresight: bool) -> None:
        self.has_foresight = has_foresight
        """Whether forced text is found quickly."""
        self._compiled_bytes = max(num_bytes, MIN_BYTES)
        self._built_s = 0.0
        self._has_failed = False

    @property
    def num_bytes(self) -> int:
        """Memory that it may take now."""
        return self._compiled_bytes + self._grown_bytes

    @property
    def is_worn(self) -> bool:
        """Whether the next request should have a new one."""
        return self._has_failed or self._grown_bytes > MAX_GROWTH_BYTES

    @property
    def _grown_bytes(self) -> int:
        return int(self._built_s * GROWTH_BYTES_PER_S)

    def note(self, taken_s: float, *, num_masks: int, vocab_size: int) -> None:
        """Note the processor time that some masks took."""
        self._built_s += max(0.0, taken_s - num_masks * vocab_size * CHEAP_S_PER_TOKEN)

    def note_failure(self) -> None:
        """Note that it reached one of its limits. From then on it fails for every request."""
        self._has_failed = True


class Compiled(NamedTuple):
    """A matcher at the beginning of a grammar, copied for each request; its first mask; its size and state."""

    matcher: "LLMatcher"
    first: "NDArray[np.bool_]"
    lexer: SharedLexer


class KeptGrammars:
    """The most recently used grammars, up to KEPT_BYTES. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[GrammarKey, Compiled] = OrderedDict()
        self._alive: weakref.WeakSet[SharedLexer] = weakref.WeakSet()
        self._freed_bytes = 0

    def find(self, key: GrammarKey) -> Compiled | None:
        """A kept grammar that is not worn, or None."""
        with self._lock:
            compiled = self._kept.get(key)
            if compiled is None:
                return None
            if compiled.lexer.is_worn:
                self._let_go(key)
                return None
            self._kept.move_to_end(key)
            return compiled

    def keep(self, key: GrammarKey, compiled: Compiled) -> None:
        """Keep a grammar; drop the least recently used ones."""
        with self._lock:
            self._alive.add(compiled.lexer)
            self._kept[key] = compiled
            self._shrink(KEPT_BYTES)
            is_much = self._freed_bytes > MAX_FREED_BYTES
            self._freed_bytes = 0 if is_much else self._freed_bytes
        if is_much:
            give_back_freed()

    def make_room(self, num_bytes: int) -> None:
        """Drop grammars until there is room for this one. Raises Overloaded if those in use leave none."""
        with self._lock:
            self._shrink(KEPT_BYTES - num_bytes)
            used_bytes = sum(lexer.num_bytes for lexer in self._alive)
        if used_bytes + num_bytes > USED_BYTES:
            raise Overloaded(
                f"the grammars in use take {used_bytes / 1e6:.0f} MB of {USED_BYTES / 1e6:.0f}; try again later",
                retry_after=5,
            )

    def num_bytes(self) -> int:
        """Memory that the kept grammars may take."""
        with self._lock:
            return self._kept_bytes()

    def _kept_bytes(self) -> int:
        return sum(compiled.lexer.num_bytes for compiled in self._kept.values())

    def _shrink(self, num_bytes: int) -> None:
        while self._kept and self._kept_bytes() > num_bytes:
            self._let_go(next(iter(self._kept)))

    def _let_go(self, key: GrammarKey) -> None:
        self._freed_bytes += self._kept.pop(key).lexer.num_bytes
