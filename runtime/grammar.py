"""Constraints to grammars: checked, compiled within bounds, kept for the next request.

llguidance does the work: it needs neither torch nor transformers, compiles a schema in milliseconds and computes masks
lazily, so that nothing is precomputed over the vocabulary (xgrammar's package requires torch, transformers and triton).
Its limits hold for grammars; sizes, `multipleOf` and time are bounded here, since anybody may send a schema.
Knows nothing of HTTP or of the engine. `compile` runs on the thread of the request, so that a bad constraint is told at
once.
"""

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTimeError
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest, Overloaded
from runtime.token_guide import GrammarGuide, Mask, brief, mask_of
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_SOURCE_CHARS = 100_000
"""Longest schema, expression or grammar. 2,000 optional properties fill it, and compile in a second."""
MAX_MULTIPLE = 20_000
"""Bounds the states of an automaton that divides: `multipleOf: 9973` compiles in 60 ms, 100 million in an hour. Holds
for the sum and for the least common multiple of all of a schema's, counted in units of their last decimal place."""
MAX_FORESEEN_CHARS = 10_000
"""Longest source whose forced tokens are searched for, by the engine's thread: a constant of 100,000 characters would
hold it up for 0.3 s before `MAX_FORESIGHT_S` is noticed."""
COMPILE_TIMEOUT_S = 5.0
MAX_COMPILING = 4
"""Compilations at once. One that runs out of time goes on until llguidance's own limits end it, and keeps its place."""
MAX_KEPT = 32
"""Compiled grammars kept. Ordinary ones take kilobytes, the largest that pass the limits some 50 MB."""
NUM_MASK_THREADS = 2
JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""JSON allows any amount between tokens, and a small model that has begun to indent may never stop."""


class _Compiled(NamedTuple):
    """A matcher at its beginning, to be copied for each request, and its first mask."""

    matcher: "LLMatcher"
    first: Mask


class GrammarCompiler:
    """Makes the guides of one model. Every method may be called from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
        compile_timeout_s: float = COMPILE_TIMEOUT_S,
    ) -> None:
        """`vocab_size` is the model's, which may be padded beyond the tokenizer's."""
        self._compile_timeout_s = compile_timeout_s
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[ConstraintKind, str], _Compiled] = OrderedDict()
        self._places = threading.Semaphore(MAX_COMPILING)
        self._pool = ThreadPoolExecutor(NUM_MASK_THREADS, thread_name_prefix="mask")

    def guide(self, constraint: Constraint) -> GrammarGuide:
        """A guide at the beginning of an answer.

        Raises InvalidRequest, naming the field and what is wrong, for a constraint that is malformed, unsupported,
        too large, too slow to compile or that no text satisfies; Overloaded if too many are being compiled.
        """
        if not self._eos_ids:
            raise _refused(constraint, "cannot be used: this model has no end-of-text token to end it with")
        key = (constraint.kind, constraint.source)
        with self._lock:
            compiled = self._kept.get(key)
            if compiled is not None:
                self._kept.move_to_end(key)
        if compiled is None:
            compiled = self._compile_in_time(constraint)
            with self._lock:
                self._kept[key] = compiled
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
        return GrammarGuide(
            compiled.matcher.deep_copy(),
            compiled.first,
            self._pool,
            param=constraint.param,
            has_foresight=len(constraint.source) <= MAX_FORESEEN_CHARS,
        )

    def prepare(self) -> None:
        """Make llguidance's view of the vocabulary now. It takes 0.4 s for 49,152 tokens and 2 s for 150,000, in which
        no other Python thread runs: better before requests come than with the first that has a constraint."""
        if self._eos_ids:
            self._tokens()

    def close(self) -> None:
        """End the threads that compute masks. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile_in_time(self, constraint: Constraint) -> _Compiled:
        if not self._places.acquire(timeout=self._compile_timeout_s):
            raise Overloaded("too many grammars are being compiled; try again later", retry_after=5)
        done: Future[_Compiled] = Future()

        def work() -> None:
            try:
                done.set_result(self._compile(constraint))
            except BaseException as error:
                done.set_exception(error)
            finally:
                self._places.release()

        # A daemon, not the pool's: a compilation that does not end must hold up neither masks nor the exit.
        threading.Thread(target=work, name="grammar", daemon=True).start()
        try:
            return done.result(self._compile_timeout_s)
        except NotInTimeError:
            raise _refused(constraint, f"does not compile in {self._compile_timeout_s:g} s; make it simpler") from None

    def _compile(self, constraint: Constraint) -> _Compiled:
        from llguidance import LLMatcher

        check_size(constraint)
        tokens = self._tokens()
        try:
            matcher = LLMatcher(tokens, _to_llguidance(constraint), log_level=0, limits=_limits())
        except Exception as error:  # ValueError of the JSON reader; IndexError, RecursionError... of the GBNF reader
            raise _refused(constraint, f"cannot be read: {brief(str(error))}") from None
        if not matcher.is_error():
            first = mask_of(matcher, self._vocab_size)
        if matcher.is_error():
            message = brief(matcher.get_error())
            if message.startswith("NoExtension"):
                message = "no text satisfies it"
            raise _refused(constraint, f"cannot be used: {message}")
        return _Compiled(matcher, first)

    def _tokens(self) -> "LLTokenizer":
        """llguidance's view of the vocabulary, made on first use."""
        from llguidance import LLTokenizer

        with self._making:
            if self._ll_tokenizer is None:
                vocabulary: Any = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
                self._ll_tokenizer = LLTokenizer(
                    vocabulary, n_vocab=self._vocab_size, eos_token=sorted(self._eos_ids), slices=None
                )
            return self._ll_tokenizer


class _Vocabulary:
    """What llguidance wants to know about a tokenizer; the names are its own. Padding has no bytes and is never
    allowed."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(eos_ids)
        known = min(tokenizer.vocab_size, vocab_size)
        # What ends the text is never text, even where its token is an ordinary one.
        self.special_token_ids = [i for i in range(known) if tokenizer.is_special(i) or i in eos_ids]
        specials = frozenset(self.special_token_ids)
        self.tokens = [
            tokenizer.token_text(i).encode() if i in specials else tokenizer.token_bytes(i) for i in range(known)
        ]
        self.tokens += [b""] * (vocab_size - known)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def check_size(constraint: Constraint) -> None:
    """Refuse what llguidance's own limits let through. Raises InvalidRequest."""
    num_chars = len(constraint.source)
    if num_chars > MAX_SOURCE_CHARS:
        raise _refused(constraint, f"has {num_chars:,} characters; at most {MAX_SOURCE_CHARS:,} are taken")
    schemas: list[Any] = []
    if constraint.kind is ConstraintKind.JSON_SCHEMA:
        schemas = [json.loads(constraint.source)]
    elif constraint.kind is ConstraintKind.GRAMMAR:
        schemas = list(_embedded_schemas(constraint.source))
    multiples = [value for schema in schemas for value in _multiples(schema)]
    if not multiples:
        return
    places = max(-int(value.as_tuple().exponent) for value in multiples)
    scaled = [int(abs(value).scaleb(max(0, places))) for value in multiples]
    if sum(scaled) > MAX_MULTIPLE or math.lcm(*scaled) > MAX_MULTIPLE:
        raise _refused(constraint, f"has a multipleOf that is too large; the limit is {MAX_MULTIPLE:,} steps")


def _embedded_schemas(grammar: str) -> Iterator[Any]:
    """The JSON behind every `%json` of a Lark grammar; other text behind one is left to llguidance to refuse."""
    decoder = json.JSONDecoder()
    for piece in grammar.split("%json")[1:]:
        try:
            yield decoder.raw_decode(piece.lstrip())[0]
        except (ValueError, RecursionError):
            continue


def _multiples(schema: Any) -> Iterator[Decimal]:
    """The value of every `multipleOf` in a schema, wherever it stands."""
    pending = [schema]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            value = item.get("multipleOf")
            if isinstance(value, int | float) and math.isfinite(value):
                yield Decimal(str(value))
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _to_llguidance(constraint: Constraint) -> str:
    """The constraint in llguidance's notation; anything may be raised by a source that cannot be read."""
    from llguidance import LLMatcher

    source = constraint.source
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": JSON_WHITESPACE})
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(source)
        case ConstraintKind.CHOICE:
            # One terminal, not one for each: the lexer then walks all of them at once.
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
            return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(choices))
    if "::=" not in source:
        return LLMatcher.grammar_from_lark(source)
    from llguidance.gbnf_to_lark import any_to_lark

    return LLMatcher.grammar_from_lark(any_to_lark(source))


def _limits() -> "LLParserLimits":
    """Below llguidance's defaults where those allow a step of more than about 100 ms, or hundreds of megabytes."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _refused(constraint: Constraint, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{constraint.param}: the {constraint.kind} {problem}", param=constraint.param)
