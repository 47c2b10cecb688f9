"""`headrace generate`: its flags and refusals, and streaming to a terminal, a pipe and a reader that leaves."""

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import headrace
from runtime.commands.generate import encode_prompt, make_parser, stream
from runtime.core import SamplingParams
from runtime.errors import EngineFailed
from runtime.session.session import Batch
from runtime.settings import EngineSettings, flag_name
from tests.support.fake_session import FakeSession
from tests.support.fake_text_model import VOCAB_SIZE, greedy_to_the_end, running

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"

STREAM_FOREVER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
from runtime.commands.generate import stream
from tests.support.fake_session import FakeSession
from tests.support.fake_text_model import VOCAB_SIZE, greedy_to_the_end, running
session = FakeSession(vocab_size=VOCAB_SIZE, num_slots=1, capacity=10**6, on_run=lambda batch: time.sleep(0.001))
with running(session) as model:
    sys.exit(stream(model.generate([1], greedy_to_the_end(900_000))))
"""


def test_every_setting_is_a_flag_of_the_verb() -> None:
    options = set(make_parser()._option_string_actions)
    left_out = {"logprobs", "prompt_logprobs", "constraint", "max_batch", "max_waiting", "max_queue_wait"}
    left_out |= {"request_timeout", "prefix_cache", "tool_format"}
    wanted = {f.name for cls in (SamplingParams, EngineSettings) for f in fields(cls)} - left_out
    assert {flag_name(name) for name in wanted} <= options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "-p", "x"], "nowhere is not a directory"),
        (["nowhere", "-p", "x", "--temperature", "5"], "temperature must be at least 0 and at most 2, got 5.0"),
        (["nowhere", "-p", "x", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["nowhere", "-p", "x", "--max-tokens", "-1", "--top-k", "-1", "--top-p", "0"], "nowhere is not a directory"),
        (["nowhere", "-p", "x", "--typical-p", "0"], "typical_p must be greater than 0 and at most 1, got 0.0"),
        (["nowhere", "-p", "x", "--prefill-chunk", "0"], "--prefill-chunk must be at least 1, got 0"),
        (["nowhere", "-p", "x", "--raw", "--system", "y"], "give one of them"),
    ],
)
def test_mistakes_are_told_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert headrace.main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err and err.startswith("headrace generate: ") and err.count("\n") == 1


def test_the_text_goes_to_stdout_and_the_figures_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with running(FakeSession(vocab_size=VOCAB_SIZE)) as model:
        expected = "".join(event.text for event in model.generate([1, 2], greedy_to_the_end(12)))
        assert stream(model.generate([1, 2], greedy_to_the_end(12))) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert err.startswith("2 prompt tokens, 12 tokens, TTFT ") and err.endswith(" tokens/s\n")


def test_a_failed_engine_is_an_error_with_the_reason() -> None:
    def fail(batch: Batch) -> None:
        raise MemoryError("out of cache")

    with (
        running(FakeSession(vocab_size=VOCAB_SIZE, on_run=fail)) as model,
        pytest.raises(EngineFailed, match="out of cache"),
    ):
        stream(model.generate([1], greedy_to_the_end(2)))


def test_a_prompt_is_a_chat_unless_it_is_raw() -> None:
    with running(FakeSession(vocab_size=VOCAB_SIZE), template=TEMPLATE) as model:

        def text(system: str | None, *, is_raw: bool) -> str:
            ids = encode_prompt(model, "hi", system=system, is_raw=is_raw)
            return b"".join(model.token_bytes(i) for i in ids).decode()

        assert text(None, is_raw=True) == "hi"
        assert text(None, is_raw=False) == "u:hi;"
        assert text("be kind", is_raw=False) == "s:be kind;u:hi;"


def start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", STREAM_FOREVER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_reader_that_leaves_ends_the_answer_quietly() -> None:
    with start() as process:
        assert process.stdout is not None and process.stderr is not None
        assert os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


def test_ctrl_c_ends_the_answer_quietly() -> None:
    with start() as process:
        assert process.stdout is not None and process.stderr is not None
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert err == b""
