"""Compiles constraints on trial in a disposable process: the server's side of `runtime/grammar/helper.py`.

Two lanes, so that ordinary trials do not wait for endless ones. Every trial gets a short time first, of which most need
a hundredth. One that runs out of time starts again in the patient lane, where bombs wait only for each other:

    quick      2 at once    0.3 s of processor time
    patient    2 at once    2 s, at a lower priority than the streams that run meanwhile

Knows nothing of llguidance.
"""

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from runtime.core import Constraint
from runtime.errors import HeadraceError, Overloaded, Unavailable
from runtime.grammar.helper import HEADER_BYTES, READY, Job, Limits, too_large
from runtime.grammar.limits import refused
from runtime.grammar.notation import Vocabulary

MAX_WAIT_S = 5.0
"""Longest wait for a place in a lane."""
START_TIMEOUT_S = 60.0
"""Longest time to read the vocabulary: 0.4 s for 49,152 tokens on an idle machine."""
SILENCE_S = 10.0
"""A process that is silent for so long after a trial's time was up is replaced."""
RETRY_AFTER_S = 5
BEGIN = "import sys; sys.path[:] = sys.argv[1:]; from runtime.grammar.helper import main; sys.exit(main())"
OUT_OF_TIME = (signal.SIGALRM, signal.SIGPROF)

log = logging.getLogger(__name__)


class Tried(NamedTuple):
    """A passed trial: the grammar in Lark's notation, the memory it takes when compiled, and whether forced text is
    found quickly."""

    grammar: str
    num_bytes: int
    has_foresight: bool


class Lane:
    """Places for trials with the same limits."""

    def __init__(self, num_places: int, limits: Limits) -> None:
        self.limits = limits
        self.places = threading.Semaphore(num_places)


def standard_lanes() -> tuple[Lane, ...]:
    """The two lanes of one model."""
    return (
        Lane(2, Limits(cpu_s=0.3, wall_s=1.0)),
        Lane(2, Limits(cpu_s=2.0, wall_s=4.0, niceness=5)),
    )


class _Helper(NamedTuple):
    process: "subprocess.Popen[bytes]"
    control: socket.socket


class GrammarTrials:
    """The process and the lanes of one model. Every method may be called from any thread."""

    def __init__(self, vocabulary: Vocabulary, lanes: Sequence[Lane] | None = None) -> None:
        self._vocabulary = vocabulary
        self._lanes = standard_lanes() if lanes is None else lanes
        self._lock = threading.Lock()
        self._helper: _Helper | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._is_ready = False
        self._is_closed = False

    def start(self) -> None:
        """Start the process without waiting until it is ready, if it does not run. Raises Unavailable."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the process and what runs in it. Idempotent; no trial is taken any more."""
        with self._lock:
            self._is_closed = True
            self._drop()

    def try_out(self, constraint: Constraint) -> Tried:
        """Compile a checked constraint and follow it a little, within limits.

        Raises InvalidRequest if it cannot be used or takes more time, memory or stack than is given; Overloaded if the
        trials of others, or a busy machine, leave none; Unavailable if the process cannot be started.
        """
        may_force = True
        for lane in self._lanes:
            if not lane.places.acquire(timeout=MAX_WAIT_S):
                raise _overloaded("too many grammars are being compiled")
            try:
                answer = self._run(constraint, replace(lane.limits, may_force=may_force))
            finally:
                lane.places.release()
            if "grammar" in answer:
                return Tried(answer["grammar"], answer["num_bytes"], answer["has_foresight"])
            if "refused" in answer:
                raise refused(constraint, answer["refused"])
            if answer.get("signal") not in OUT_OF_TIME:
                break
            # The search for forced text may have taken the time; everything works without it.
            may_force = answer["signal"] != signal.SIGPROF
        raise _verdict(constraint, answer, lane.limits)

    def _run(self, constraint: Constraint, limits: Limits) -> dict[str, Any]:
        """The answer of one trial, or the signal that ended it and its processor time, or nothing."""
        job = Job(str(constraint.kind), constraint.source, limits)
        for _ in range(2):
            helper = self._running()
            ours, theirs = socket.socketpair()
            with ours, theirs, contextlib.suppress(OSError):
                socket.send_fds(helper.control, [b"\x00"], [theirs.fileno()])
                theirs.close()
                ours.settimeout(limits.wall_s + SILENCE_S)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then its answer says why
                    ours.sendall(job.packed())
                    ours.shutdown(socket.SHUT_WR)
                if line := _first_line(ours):
                    return dict(json.loads(line))
            self._replace(helper)
        return {}

    def _running(self) -> _Helper:
        """The process, started and ready."""
        with self._lock:
            helper = self._start()
            self._wait_until_ready(helper)
            return helper

    def _replace(self, helper: _Helper) -> None:
        """Drop a process that failed, unless another thread has done so."""
        with self._lock:
            if self._helper is helper:
                log.warning("the process that compiles grammars ended or hung; another one is started")
                self._drop()

    def _start(self) -> _Helper:
        if self._is_closed:
            raise Unavailable("the model is being closed; try again later")
        if self._helper is None:
            ours, theirs = socket.socketpair()
            paths = [str(Path(__file__).parents[2]), *sys.path]
            try:
                with theirs:
                    process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                        [sys.executable, "-c", BEGIN, *paths],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
            except OSError as error:
                ours.close()
                raise _no_process(error) from error
            self._helper, self._is_ready = _Helper(process, ours), False
            # Ends with the interpreter too, if `close` is not called.
            self._finalizer = weakref.finalize(self, _end, self._helper)
            data = self._vocabulary.packed()
            with contextlib.suppress(OSError):  # `_wait_until_ready` meets it again
                ours.settimeout(START_TIMEOUT_S)
                ours.sendall(len(data).to_bytes(HEADER_BYTES, "big") + data)
        return self._helper

    def _wait_until_ready(self, helper: _Helper) -> None:
        if self._is_ready:
            return
        try:
            self._is_ready = helper.control.recv(1) == READY
        except OSError as error:
            self._drop()
            raise _no_process(error) from error
        if not self._is_ready:
            self._drop()
            raise _no_process("it ended at once")

    def _drop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._helper = self._finalizer = None


def _end(helper: _Helper) -> None:
    helper.control.close()
    try:
        helper.process.wait(1.0)
    except subprocess.TimeoutExpired:
        helper.process.kill()
        helper.process.wait()


def _first_line(connection: socket.socket) -> bytes:
    """Bytes up to the first line end, or all of them if there is none."""
    data = bytearray()
    while (piece := connection.recv(2**16)) and b"\n" not in piece:
        data += piece
    return bytes(data + piece.partition(b"\n")[0])


def _verdict(constraint: Constraint, ending: dict[str, Any], limits: Limits) -> HeadraceError:
    """The error for a trial without an answer: `ending` says which signal ended it, after how much processor time."""
    number, cpu_s = ending.get("signal"), ending.get("cpu_s", 0.0)
    if number in OUT_OF_TIME and cpu_s >= limits.cpu_s / 2:
        return refused(constraint, f"does not compile in {limits.cpu_s:g} s of processor time; make it simpler")
    if number == signal.SIGABRT:
        return refused(constraint, too_large(limits.heap_bytes))
    if number == signal.SIGSEGV:
        return refused(constraint, "is nested too deeply: compiling it crashed; make it simpler")
    return _overloaded("there is no time or memory to compile a grammar now")


def _overloaded(reason: str) -> Overloaded:
    return Overloaded(f"{reason}; try again later", retry_after=RETRY_AFTER_S)


def _no_process(reason: object) -> Unavailable:
    return Unavailable(f"the process that compiles grammars cannot be started: {reason}; try again later")
