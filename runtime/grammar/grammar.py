"""Compiles constraints to grammars: check, trial, compilation, cache.

llguidance does the work: it needs neither torch nor transformers, compiles a schema in milliseconds and computes masks
lazily, so that nothing is precomputed over the vocabulary (xgrammar's package requires torch, transformers and triton).
Its own limits do for ordinary grammars. Clients may send others, so each constraint passes four stages:

    checked          its length, and forms known to take all time or memory    runtime/grammar/limits.py
    tried out        compiled and followed a little in a disposable process    runtime/grammar/trial.py
    compiled here    on a stack deep enough for its recursion                  runtime/grammar/deep_stack.py
    kept             within a limit on memory                                  runtime/grammar/kept.py

Knows nothing of HTTP or of the engine. `guide` runs on the request's thread, so a bad constraint is refused at once.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTimeError
from typing import TYPE_CHECKING

from runtime.core import Constraint, ConstraintKind
from runtime.errors import Overloaded, Unavailable
from runtime.grammar.deep_stack import NoThreadError, on_deep_stack
from runtime.grammar.guide import GrammarGuide, Mask, mask_of
from runtime.grammar.helper import MAX_FORESEEN_CHARS
from runtime.grammar.kept import Compiled, KeptGrammars, SharedLexer
from runtime.grammar.limits import checked, is_simple, refused
from runtime.grammar.notation import Vocabulary, new_matcher, problem_of, to_lark
from runtime.grammar.trial import GrammarTrials, Lane, Tried
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SIMPLE_BYTES_PER_CHAR = 512
"""Memory that a simple constraint takes for each of its characters, measured for objects of optional properties."""
PATIENCE_S = 10.0
"""Longest wait for a compilation that passed its trial; only a very busy machine takes so long."""
NUM_MASK_THREADS = 2

log = logging.getLogger(__name__)


class GrammarCompiler:
    """Makes the guides of one model's requests. Every method may be called from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
        lanes: Sequence[Lane] | None = None,
    ) -> None:
        """`vocab_size` is the model's, which may be padded beyond the tokenizer's. `lanes` are the limits of trials."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lanes = lanes
        self._opening = threading.Lock()
        self._opened: tuple[Vocabulary, GrammarTrials] | None = None
        self._view: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._under_way: dict[tuple[ConstraintKind, str, str], Future[Compiled]] = {}
        self._kept = KeptGrammars()
        self._pool = ThreadPoolExecutor(NUM_MASK_THREADS, thread_name_prefix="mask")

    def guide(self, constraint: Constraint) -> GrammarGuide:
        """A guide at the beginning of an answer.

        Raises InvalidRequest, naming the field and what is wrong, for a constraint that is malformed, unsupported, too
        large, too slow to compile or to follow, or that no text satisfies; Overloaded if others leave no time or
        memory for it; Unavailable if it cannot be tried out at all.
        """
        if not self._eos_ids:
            raise refused(constraint, "cannot be used: this model has no end-of-text token to end it with")
        compiled = self._kept.find((constraint.kind, constraint.source)) or self._compiled_once(constraint)
        return GrammarGuide(
            compiled.matcher.deep_copy(), compiled.first, self._pool, param=constraint.param, lexer=compiled.lexer
        )

    def prepare(self) -> None:
        """Make llguidance's view of the vocabulary now, and start the process for trials. The view takes 0.4 s for
        49,152 tokens and 2 s for 150,000, and no other Python thread runs meanwhile: better now than in a request."""
        if not self._eos_ids:
            return
        try:
            self._open()[1].start()
        except Unavailable as error:  # a request that needs it will hear of it
            log.warning("%s", error)
        self._tokens()

    def close(self) -> None:
        """End the threads that compute masks, and the process for trials. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._opening:
            if self._opened is not None:
                self._opened[1].close()

    def _compiled_once(self, constraint: Constraint) -> Compiled:
        """Compile a constraint, or wait for the thread that is compiling the same one."""
        key = (constraint.kind, constraint.source, constraint.param)
        with self._lock:
            done = self._under_way.get(key)
            is_ours = done is None
            if done is None:
                done = self._under_way[key] = Future()
        if is_ours:
            try:
                compiled = self._compile(constraint)
                self._kept.keep((constraint.kind, constraint.source), compiled)
                done.set_result(compiled)
            except BaseException as error:
                done.set_exception(error)
            finally:
                with self._lock:
                    del self._under_way[key]
        return done.result()

    def _compile(self, constraint: Constraint) -> Compiled:
        fit = checked(constraint)
        if is_simple(fit):
            grammar = to_lark(fit.kind, fit.source)
            tried = Tried(grammar, SIMPLE_BYTES_PER_CHAR * len(fit.source), len(fit.source) <= MAX_FORESEEN_CHARS)
        else:
            tried = self._open()[1].try_out(fit)
        self._kept.make_room(tried.num_bytes)
        try:
            matcher, first = on_deep_stack(lambda: self._begin(tried.grammar), name="grammar").result(PATIENCE_S)
        except (NotInTimeError, NoThreadError):
            raise Overloaded(
                "there is no time or thread to compile a grammar now; try again later", retry_after=5
            ) from None
        if matcher.is_error():
            raise refused(constraint, problem_of(matcher))
        return Compiled(matcher, first, SharedLexer(tried.num_bytes, has_foresight=tried.has_foresight))

    def _begin(self, grammar: str) -> "tuple[LLMatcher, Mask]":
        matcher = new_matcher(self._tokens(), grammar)
        return matcher, mask_of(matcher, self._vocab_size)

    def _open(self) -> tuple[Vocabulary, GrammarTrials]:
        with self._opening:
            if self._opened is None:
                vocabulary = Vocabulary.of(self._tokenizer, vocab_size=self._vocab_size, eos_ids=self._eos_ids)
                self._opened = vocabulary, GrammarTrials(vocabulary, self._lanes)
            return self._opened

    def _tokens(self) -> "LLTokenizer":
        """llguidance's view of the vocabulary, made on first use."""
        vocabulary, _ = self._open()
        with self._opening:
            if self._view is None:
                self._view = vocabulary.view()
            return self._view
