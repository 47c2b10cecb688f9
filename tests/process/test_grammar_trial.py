"""Constraints are compiled on trial in a process of their own: what ends a trial, and that it ends nothing else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.core import Constraint, ConstraintKind
from runtime.errors import HeadraceError, InvalidRequest, Overloaded, Unavailable
from runtime.grammar import trial as grammar_trial
from runtime.grammar.grammar import GrammarCompiler
from runtime.grammar.helper import Limits
from runtime.grammar.notation import Vocabulary
from runtime.grammar.trial import GrammarTrials, Lane
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.schemas.bombs import rules, same_property
from tests.support.server_process import ROOT, children_of, eventually

EOS_ID, VOCAB_SIZE = 257, 300
PATTERN = Constraint(ConstraintKind.REGEX, "[a-z]+-[0-9]{4}", "field")
ENDLESS = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(same_property(30)), "field")
DEEP = Constraint(ConstraintKind.GRAMMAR, rules(4400, 'r{i}: "a" r{j} | "b"', 'r{i}: "c"'), "field")
LARGE = Constraint(ConstraintKind.REGEX, "a?" * 20_000 + "a" * 20_000, "field")
PLENTY = Limits(cpu_s=20.0, wall_s=60.0)


@contextmanager
def trials(*lanes: Lane) -> Iterator[GrammarTrials]:
    vocabulary = Vocabulary.of(byte_tokenizer(), vocab_size=VOCAB_SIZE, eos_ids=frozenset([EOS_ID]))
    opened = GrammarTrials(vocabulary, lanes or (Lane(2, PLENTY),))
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def plenty() -> Iterator[GrammarTrials]:
    with trials() as opened:
        yield opened


def limited(**limits: Any) -> Lane:
    return Lane(1, Limits(**{"cpu_s": 20.0, "wall_s": 60.0, **limits}))


def helper_pid(opened: GrammarTrials) -> int:
    assert opened._helper is not None
    return opened._helper.process.pid


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_trial_returns_the_grammar_to_compile_and_its_size(plenty: GrammarTrials) -> None:
    tried = plenty.try_out(Constraint(ConstraintKind.GRAMMAR, 'root ::= "a" b\nb ::= [0-9]+', "field"))
    assert "start: " in tried.grammar and "::=" not in tried.grammar
    assert tried.has_foresight and tried.num_bytes < 2**20
    large = plenty.try_out(Constraint(ConstraintKind.REGEX, "|".join(map(str, range(10_000))), "field"))
    assert not large.has_foresight and large.num_bytes > 2 * 2**20


def test_deep_recursion_passes_and_leaves_the_process_alone(plenty: GrammarTrials) -> None:
    plenty.try_out(PATTERN)
    pid = helper_pid(plenty)
    assert plenty.try_out(DEEP).grammar.endswith(DEEP.source)
    assert helper_pid(plenty) == pid
    eventually(lambda: children_of(pid) == [], "nothing is left behind")


@pytest.mark.parametrize(
    ("lane", "constraint", "words"),
    [
        (limited(cpu_s=0.1), ENDLESS, "does not compile in 0.1 s of processor time"),
        (limited(heap_bytes=2**20), LARGE, "needs more than 1 MB to be compiled"),
        (limited(stack_bytes=2**20), DEEP, "nested too deeply"),
    ],
    ids=["time", "memory", "stack"],
)
def test_a_trial_that_exceeds_its_limits_is_the_requests_fault(lane: Lane, constraint: Constraint, words: str) -> None:
    with trials(lane) as opened:
        with pytest.raises(InvalidRequest, match=words) as refused:
            opened.try_out(constraint)
        assert refused.value.param == "field" and str(refused.value).startswith("field: the ")
        pid = helper_pid(opened)
        assert opened.try_out(PATTERN).grammar, "the next finds the place free"
        assert helper_pid(opened) == pid


def test_a_busy_machine_and_the_trials_of_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with trials(limited(wall_s=0.2)) as opened, pytest.raises(Overloaded) as refused:
        opened.try_out(ENDLESS)
    assert refused.value.retry_after > 0 and "try again" in str(refused.value)
    monkeypatch.setattr(grammar_trial, "MAX_WAIT_S", 0.01)
    with trials(Lane(0, PLENTY)) as opened, pytest.raises(Overloaded, match="too many grammars"):
        opened.try_out(PATTERN)


def test_a_trial_that_never_ends_delays_no_other() -> None:
    """Three bombs at once fill the patient lane, which has two places; another one's trial is over long before."""
    lanes = (Lane(2, Limits(cpu_s=0.05, wall_s=20.0)), Lane(2, Limits(cpu_s=0.5, wall_s=60.0)))
    with trials(*lanes) as opened, ThreadPoolExecutor(3) as pool:
        bombs = [pool.submit(opened.try_out, ENDLESS) for _ in range(3)]
        eventually(lambda: lanes[1].places._value == 0, "the patient lane is full")
        assert opened.try_out(PATTERN).grammar
        assert not all(bomb.done() for bomb in bombs)
        assert all(isinstance(bomb.exception(), InvalidRequest | Overloaded) for bomb in bombs)


def test_a_trial_without_time_for_foresight_is_repeated_without_it() -> None:
    count = Constraint(ConstraintKind.REGEX, "(xyz ){1000000}", "field")
    with trials(limited(cpu_s=0.1), limited(cpu_s=20.0)) as opened:
        assert not opened.try_out(count).has_foresight
        assert opened.try_out(PATTERN).has_foresight


def test_a_process_that_was_ended_is_replaced() -> None:
    with trials() as opened:
        opened.try_out(PATTERN)
        pid = helper_pid(opened)
        os.kill(pid, signal.SIGKILL)
        assert opened.try_out(PATTERN).grammar and helper_pid(opened) != pid


def test_the_end_of_one_trial_from_outside_is_not_the_requests_fault() -> None:
    with trials() as opened, ThreadPoolExecutor(1) as pool:
        bomb = pool.submit(opened.try_out, ENDLESS)
        eventually(lambda: opened._is_ready and children_of(helper_pid(opened)) != [], "the trial runs")
        (child,) = children_of(helper_pid(opened))
        os.kill(child, signal.SIGKILL)
        assert isinstance(bomb.exception(), Overloaded)


def test_closing_ends_the_process_and_what_runs_in_it() -> None:
    with trials() as opened, ThreadPoolExecutor(1) as pool:
        bomb = pool.submit(opened.try_out, ENDLESS)
        eventually(lambda: opened._is_ready and children_of(helper_pid(opened)) != [], "the trial runs")
        pids = [helper_pid(opened), *children_of(helper_pid(opened))]
        opened.close()
        assert isinstance(bomb.exception(), Unavailable)
        eventually(lambda: not any(map(is_running, pids)), "all have ended")


def test_the_end_of_the_whole_group_is_its_end_too() -> None:
    """Who stops a server by its process group is to find nothing of it alive; the next constraint begins anew."""
    with trials() as opened:
        opened.try_out(PATTERN)
        pid = helper_pid(opened)
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not is_running(pid), "it has ended")
        assert opened.try_out(PATTERN).grammar and helper_pid(opened) != pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_of_a_terminal_leave_it_to_the_server(plenty: GrammarTrials, number: signal.Signals) -> None:
    """A server that was told to stop may have requests to finish."""
    plenty.try_out(PATTERN)
    pid = helper_pid(plenty)
    os.kill(pid, number)
    assert plenty.try_out(PATTERN).grammar and helper_pid(plenty) == pid


OUTLIVED = """
import sys, threading, time
from tests.process.test_grammar_trial import *
with trials() as opened:
    threading.Thread(target=opened.try_out, args=(ENDLESS,), daemon=True).start()
    while not (opened._is_ready and children_of(helper_pid(opened))):
        time.sleep(0.01)
    print(helper_pid(opened), *children_of(helper_pid(opened)), flush=True)
    time.sleep(60)
"""


def test_it_does_not_outlive_the_server() -> None:
    with subprocess.Popen([sys.executable, "-c", OUTLIVED], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = [int(word) for word in server.stdout.readline().split()]
        are_running = [is_running(pid) for pid in pids]
        server.kill()
    assert are_running == [True, True]
    eventually(lambda: not any(map(is_running, pids)), "process and trial have ended")


def test_it_is_light_and_knows_no_model(plenty: GrammarTrials) -> None:
    plenty.try_out(PATTERN)
    maps = Path(f"/proc/{helper_pid(plenty)}/maps").read_text()
    assert "llguidance" in maps
    assert not any(name in maps for name in ("onnxruntime", "numpy", "tokenizers", "torch"))


def test_where_it_cannot_be_started_the_request_is_told_and_simple_ones_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trial, "BEGIN", "raise SystemExit(1)")
    compiler = GrammarCompiler(byte_tokenizer(), vocab_size=VOCAB_SIZE, eos_ids=frozenset([EOS_ID]))
    compiler.prepare()
    assert compiler.guide(Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}', "field"))
    with pytest.raises(Unavailable, match="cannot be started"):
        compiler.guide(PATTERN)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(Unavailable, match="No such file"):
        compiler.guide(PATTERN)
    compiler.close()


def test_simple_constraints_need_no_process() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), vocab_size=VOCAB_SIZE, eos_ids=frozenset([EOS_ID]))
    compiler.guide(Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object","properties":{"a":{}}}', "field"))
    compiler.guide(Constraint(ConstraintKind.CHOICE, '["a","b"]', "field"))
    assert compiler._opened is not None and compiler._opened[1]._helper is None
    compiler.close()


def test_a_thread_that_cannot_be_had_is_not_the_requests_fault() -> None:
    """A stack of 100 TB fits into no process."""
    with trials(limited(stack_bytes=100 * 2**40)) as opened, pytest.raises(Overloaded):
        opened.try_out(PATTERN)


def test_every_refusal_is_one_of_ours() -> None:
    for ending in ({}, {"signal": 0}, {"signal": signal.SIGBUS, "cpu_s": 0.0}, {"busy": "no memory"}):
        error = grammar_trial._verdict(PATTERN, ending, PLENTY)
        assert isinstance(error, HeadraceError) and isinstance(error, Overloaded)


def test_bombs_are_bounded_in_time_memory_and_stack() -> None:
    """Every bomb in a process of its own limits: 60 s of processor time and 3 GB of address space for all together,
    and threads with a stack of 1 MB to follow them on. One that got through would end the process, or the test."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.schemas.bombs"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) > 60 and all(line.rpartition(": ")[2] in ("refused", "followed") for line in lines)
    assert sum(line.endswith(": refused") for line in lines) > 20
