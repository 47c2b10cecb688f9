"""The measurements of the benchmarks: prefill and decode steps on a session, and requests through the whole engine.

`runtime/commands/bench.py` and the scripts in benchmarks/ share these, so that a figure has one definition. Knows
nothing of flags or tables. Token ids are random or made up: the work does not depend on them.
"""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.artifact.manifest import Artifact
from runtime.backends.registry import open_session
from runtime.core import FinishReason, SamplingParams, Usage
from runtime.errors import EngineFailed, InvalidSetting
from runtime.machine.kv_pages import PAGE_BYTES
from runtime.machine.memory import default_budget
from runtime.machine.sizes import format_bytes
from runtime.session.session import Batch, Session
from runtime.settings import EngineSettings
from runtime.text.model_text import ModelText
from runtime.text.tokenizer import Tokenizer
from runtime.text_model import ModelFacts, TextModel

PEAK_FIELD = "VmHWM:"


def random_ids(num_rows: int, length: int, vocab_size: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """The same ids int64 [num_rows, length] at every call, different in every row."""
    return np.random.default_rng(0).integers(0, vocab_size, (num_rows, length))


def prefill(session: Session, length: int, *, slot: int = 0) -> float:
    """Seconds to run one prompt of `length` tokens in a slot, up to its last token's logits and the greedy choice."""
    ids = random_ids(slot + 1, length, session.info.vocab_size)[slot:]
    batch = Batch(slot, ids, np.zeros(1, np.int32), np.full(1, length, np.int32), np.array([length - 1]))
    started_s = time.perf_counter()
    session.run(batch).argmax(-1)
    return time.perf_counter() - started_s


def decode(session: Session, batch: int, context: int, num_tokens: int) -> float:
    """Mean seconds of a greedy decode step of `batch` rows, `num_tokens` steps from `context` cached tokens on.

    The caller has filled the slots (`prefill`): a cache that was never written is one zero page to the kernel, and
    reading it costs no bandwidth.
    """
    ids = random_ids(batch, 1, session.info.vocab_size)
    past, ones, wanted = np.full(batch, context, np.int32), np.ones(batch, np.int32), np.arange(batch)
    started_s = time.perf_counter()
    for _ in range(num_tokens):
        ids = session.run(Batch(0, ids, past, ones, wanted)).argmax(-1)[:, None]
        past += 1
    return (time.perf_counter() - started_s) / num_tokens


class StepTimes:
    """An EngineObserver that keeps what it hears, in seconds. Cleared and read between runs, while the engine idles."""

    def __init__(self) -> None:
        self._heard = threading.Condition()
        self.clear()

    def clear(self) -> None:
        """Forget everything heard so far."""
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []
        self._steps: list[tuple[int, float, float]] = []
        self._num_finished = self._num_settled = 0

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        with self._heard:
            if not num_prefill_tokens:
                self._steps.append((num_decode, step_s, model_s))
            self._num_settled = self._num_finished
            self._heard.notify_all()

    def on_first_token(self, *, ttft_s: float) -> None:
        self.ttft_s.append(ttft_s)

    def on_finish(
        self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None, usage: Usage
    ) -> None:
        self._num_finished += 1
        if tpot_s is not None:
            self.tpot_s.append(tpot_s)

    def settle(self, num_requests: int) -> None:
        """Wait until so many requests have ended and their last step was told: their readers hear of the end first."""
        with self._heard:
            self._heard.wait_for(lambda: self._num_settled >= num_requests)

    def overhead_share(self, batch: int) -> float | None:
        """Share of the time of decode steps of `batch` rows spent outside the session; None if there was none."""
        full = [(step_s, model_s) for num, step_s, model_s in self._steps if num == batch]
        return 1 - sum(model_s for _, model_s in full) / sum(step_s for step_s, _ in full) if full else None


class EngineRun(NamedTuple):
    """Requests that ran together: seconds in all, medians of TTFT and TPOT, share of a step outside the model.

    None: too few tokens for a time between two, or no step in which all of them decoded.
    """

    seconds: float
    ttft_s: float
    tpot_s: float | None
    overhead_share: float | None


@contextmanager
def opened(
    artifact: Artifact, *, batch: int, capacity: int, threads: int | None = None, device: str = "cpu"
) -> Iterator[tuple[Session, TextModel, StepTimes]]:
    """One session of `batch` slots on a CPU's backend, and a started engine on it; use them in turn.

    Raises InvalidArtifact without a tokenizer (requests of the engine carry text), InvalidSetting if the cache does not
    fit in memory: with fewer slots the engine would measure something else.
    """
    slot_bytes = capacity * artifact.kv_bytes_per_token() + artifact.manifest.state_bytes
    wanted, room = batch * slot_bytes, default_budget()
    if wanted > room:
        raise InvalidSetting(
            f"{batch} rows of {capacity:,} tokens take {format_bytes(wanted)} of KV cache and {format_bytes(room)} "
            "may be used; ask for fewer rows or tokens"
        )
    times, eos_ids = StepTimes(), frozenset(artifact.manifest.eos_ids)
    dims = artifact.manifest.dims
    rounding = batch * 2 * len(dims.kv_layers) * dims.num_kv_heads * PAGE_BYTES
    settings = EngineSettings(
        device=device,
        max_batch=batch,
        max_waiting=batch,
        max_len=capacity,
        threads=threads,
        kv_memory=wanted + rounding,
    )
    text = ModelText(
        Tokenizer.from_artifact(artifact),
        None,
        settings,
        vocab_size=artifact.manifest.dims.vocab_size,
        eos_ids=eos_ids,
    )
    session = open_session(artifact, settings)
    model = TextModel(
        ModelFacts(artifact.manifest.name, eos_ids),
        session=session,
        text=text,
        settings=settings,
        observer=times,
    )
    model.start()
    try:
        yield session, model, times
    finally:
        model.close()


def run_requests(
    model: TextModel, times: StepTimes, *, batch: int, prompt: int, params: SamplingParams, together: bool = True
) -> EngineRun:
    """Run `batch` requests of `prompt` tokens through the engine, together or one after another.

    `params` ends them by length (`ignore_eos`). EngineFailed if one ends otherwise.
    """
    times.clear()
    prompts = random_ids(batch, prompt, model.vocab_size).tolist()
    started_s = time.perf_counter()
    for group in [prompts] if together else [[ids] for ids in prompts]:
        for generation in [model.generate(ids, params) for ids in group]:
            last = list(generation)[-1]
            if last.finish_reason is not FinishReason.LENGTH:
                raise EngineFailed(f"the engine ended a request with {last.finish_reason}: {last.error}")
    seconds = time.perf_counter() - started_s
    times.settle(batch)
    tpot_s = statistics.median(times.tpot_s) if times.tpot_s else None
    return EngineRun(seconds, statistics.median(times.ttft_s), tpot_s, times.overhead_share(batch if together else 1))


def peak_memory() -> int:
    """Most bytes this process was ever resident in. Not getrusage's: that one starts at the parent's peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(PEAK_FIELD))
