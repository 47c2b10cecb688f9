"""The process in which constraints are compiled on trial. It holds no model and no request, so it may end at any time.

    server  --- vocabulary, once; a socket for each trial --->  this process: reads the vocabulary, answers "ready"
    server  <--- the answer; how the child ended ------------   a child for each trial: limits itself, compiles, follows

A child is forked with the vocabulary in place: it starts in milliseconds, leaves nothing behind, and may run out of
time, memory or stack without harm. The kernel ends it by timers that the child sets for itself. This process ends with
the server, when its socket closes. It imports neither ONNX Runtime nor numpy.
"""

import contextlib
import json
import os
import random
import resource
import selectors
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runtime.grammar.deep_stack import STACK_BYTES, NoThreadError, on_deep_stack
from runtime.grammar.notation import UNFORCED, Vocabulary, brief, new_matcher, problem_of, to_lark
from runtime.machine.freed_memory import give_back_freed

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

READY = b"\x01"
HEADER_BYTES = 8
TRIAL_STACK_BYTES = STACK_BYTES * 3 // 4
"""Less than the server has: a grammar that passes here cannot overflow the stack there."""
FOLLOW_STACK_BYTES = 2**20
"""Grammars are followed on ordinary threads, which have 2 MB at least."""
HEAP_BYTES = 192 * 2**20
"""Memory for one compilation. The largest ordinary ones take 60 MB."""
ARENA_BYTES = 128 * 2**20
"""Address space that glibc's allocator reserves for a second thread."""
MAX_GRAMMAR_BYTES = 64 * 2**20
"""Largest compiled grammar. 1,900 properties take 25 MB."""
MAX_FORESEEN_CHARS = 10_000
"""Longest source whose forced text is searched for: see `UNFORCED`."""
MAX_SEARCH_S = 0.01
"""Longest search for forced text at the beginning. Ordinary ones take 10 us; a count such as `(abc){100000}` makes a
short source long."""
NUM_STEPS = 16
MAX_STEP_S = 0.02
"""Longest mean time of the first NUM_STEPS tokens; the batch waits for it. Ordinary tokens take 20 to 200 us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one trial. The verdict depends on processor time; wall time only bounds how long a place is held on a
    busy machine. Without `may_force` nothing searches for forced text."""

    cpu_s: float
    wall_s: float
    niceness: int = 0
    may_force: bool = True
    heap_bytes: int = HEAP_BYTES
    stack_bytes: int = TRIAL_STACK_BYTES


@dataclass(frozen=True, slots=True)
class Job:
    """One trial: a `ConstraintKind`, its checked source, and limits."""

    kind: str
    source: str
    limits: Limits

    def packed(self) -> bytes:
        """Bytes for the child."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpacked(cls, data: bytes) -> "Job":
        """What `packed` gave."""
        found = json.loads(data)
        return cls(found["kind"], found["source"], Limits(**found["limits"]))


class RefusedError(Exception):
    """The grammar is not to be used, for this reason."""


def main() -> int:
    """Serve trials on the socket that is standard input, until it ends."""
    control = socket.socket(fileno=sys.stdin.fileno())
    # A terminal sends ^C and its own end to every process of the server, and the second may mean a reload. SIGTERM to
    # all of them means the end: a server that drains takes no new constraints.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        size = int.from_bytes(_receive(control, HEADER_BYTES), "big")
        view = Vocabulary.unpacked(_receive(control, size)).view()
        _warm_up(view)
        control.sendall(READY)
    except ConnectionError:
        return 0
    _Trials(control, view).serve()
    return 0


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        piece = connection.recv(min(num_bytes - len(data), 2**20))
        if not piece:
            raise ConnectionResetError("the server has ended")
        data += piece
    return bytes(data)


def _warm_up(view: "LLTokenizer") -> None:
    """Do the set-up of the first grammar now, so that no child measures it."""
    new_matcher(view, 'start: %json {"type": "object"}').compute_bitmask()


class _Trials:
    """Forks a child for each socket that arrives, and reports to the server how it ended."""

    def __init__(self, control: socket.socket, view: "LLTokenizer") -> None:
        self._control = control
        self._view = view
        self._children: dict[int, socket.socket] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    def serve(self) -> None:
        """Return when the server's end of the control socket is closed; no child is left then."""
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            is_served = True
            while is_served:
                for key, _ in selector.select():
                    if key.fileobj is self._control:
                        is_served = self._take()
                    else:
                        os.read(self._wake_read, 512)
                        self._reap()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def _take(self) -> bool:
        """Begin the trial that arrived. False if the server has ended."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
        except ConnectionError:
            return False
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            try:
                pid = os.fork()
            except OSError as error:  # no process or no memory to be had
                _tell(connection, {"busy": error.strerror})
                connection.close()
                continue
            if pid == 0:
                self._be_child(connection)
            self._children[pid] = connection
        return bool(data)

    def _be_child(self, connection: socket.socket) -> NoReturn:
        """Run one trial and exit. Closes the parent's sockets: the server waits for their end."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (self._control, *self._children.values()):
                other.close()
            data = bytearray()
            while piece := connection.recv(2**20):
                data += piece
            _write(connection, tried(self._view, Job.unpacked(bytes(data))))
        finally:
            os._exit(0)

    def _reap(self) -> None:
        while self._children:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._children.pop(pid)
            _tell(connection, {"signal": os.WTERMSIG(status), "cpu_s": usage.ru_utime + usage.ru_stime})
            connection.close()


def _write(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _tell(connection: socket.socket, news: dict[str, Any]) -> None:
    """Write without waiting: if an answer fills the socket, how the child ended does not matter."""
    with contextlib.suppress(OSError):
        connection.send(json.dumps(news).encode() + b"\n", socket.MSG_DONTWAIT)


def tried(view: "LLTokenizer", job: Job) -> dict[str, Any]:
    """Compile and follow a grammar within the job's limits. The answer has either `refused`, the reason, or `grammar`
    to compile in the server, `num_bytes` of memory, and `has_foresight`: whether forced text is searched for."""
    try:
        _limit(job.limits)
        before = _resident_bytes()
        grammar, is_forced, matcher = on_deep_stack(
            lambda: _compiled(view, job), name="compile", stack_bytes=job.limits.stack_bytes
        ).result()
        on_deep_stack(lambda: _follow(matcher), name="follow", stack_bytes=FOLLOW_STACK_BYTES).result()
        give_back_freed()  # or it would be measured
        num_bytes = max(0, _resident_bytes() - before)
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise RefusedError(
                f"takes {num_bytes / 1e6:.0f} MB when it is compiled; at most {MAX_GRAMMAR_BYTES / 1e6:.0f} are given"
            )
    except RefusedError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": too_large(job.limits.heap_bytes)}
    except NoThreadError as error:
        return {"busy": str(error)}
    except Exception as error:
        return {"refused": f"cannot be compiled: {brief(str(error))}"}
    return {"grammar": grammar, "num_bytes": num_bytes, "has_foresight": is_forced}


def too_large(heap_bytes: int) -> str:
    """The reason for refusing a grammar that ran out of memory."""
    return f"needs more than {heap_bytes / 1e6:.0f} MB to be compiled; make it simpler"


def _limit(limits: Limits) -> None:
    with contextlib.suppress(OSError):  # if memory runs out, the kernel ends this process first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    os.nice(limits.niceness)
    address_bytes = _pages(0) * resource.getpagesize() + limits.stack_bytes + ARENA_BYTES + limits.heap_bytes
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or address_bytes < most:
        resource.setrlimit(resource.RLIMIT_AS, (address_bytes, address_bytes))
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s)  # SIGALRM
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)  # SIGPROF


def _pages(column: int) -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[column])


def _resident_bytes() -> int:
    """Resident memory of this process that belongs to no file."""
    return (_pages(1) - _pages(2)) * resource.getpagesize()


def _compiled(view: "LLTokenizer", job: Job) -> tuple[str, bool, "LLMatcher"]:
    """The grammar in Lark's notation, whether forced text is searched for, and a matcher that has its first mask."""
    try:
        grammar = to_lark(job.kind, job.source)
    except Exception as error:  # ValueError of the JSON reader; IndexError, RecursionError... of the GBNF reader
        raise RefusedError(f"cannot be read: {brief(str(error))}") from None
    if job.limits.may_force and len(job.source) <= MAX_FORESEEN_CHARS:
        matcher = _sound(new_matcher(view, grammar))
        started_s = time.thread_time()
        matcher.compute_ff_tokens()
        taken_s = time.thread_time() - started_s
        matcher.compute_bitmask()
        if not matcher.is_error() and taken_s <= MAX_SEARCH_S:
            return grammar, True, matcher
        del matcher
    matcher = _sound(new_matcher(view, UNFORCED + grammar))
    matcher.compute_bitmask()
    return UNFORCED + grammar, False, _sound(matcher)


def _sound(matcher: "LLMatcher") -> "LLMatcher":
    if matcher.is_error():
        raise RefusedError(problem_of(matcher))
    return matcher


def _follow(matcher: "LLMatcher") -> None:
    """Take random allowed tokens, forward and back, and measure the time. Failures are left to the request's limits."""
    way = matcher.deep_copy()
    rng = random.Random(0)  # noqa: S311 - no secret
    started_s = time.thread_time()
    for _ in range(NUM_STEPS):
        token_id = _any_allowed(way.compute_bitmask(), rng)
        if way.is_stopped() or token_id is None or not way.consume_token(token_id):
            break
        way.validate_tokens([token_id, token_id])
        way.rollback(1)
        way.consume_token(token_id)
    step_s = (time.thread_time() - started_s) / NUM_STEPS
    if step_s > MAX_STEP_S:
        raise RefusedError(
            f"takes {1e3 * step_s:.0f} ms to follow for each token; at most {1e3 * MAX_STEP_S:.0f} ms are given"
        )


def _any_allowed(mask: bytes, rng: random.Random) -> int | None:
    start = rng.randrange(len(mask))
    for offset in range(len(mask)):
        place = (start + offset) % len(mask)
        if mask[place]:
            return place * 8 + (mask[place] & -mask[place]).bit_length() - 1
    return None


if __name__ == "__main__":
    sys.exit(main())
