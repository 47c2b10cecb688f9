"""Measures an artifact's speed at a given workload, on this machine. Knows nothing about precisions or gates."""

from dataclasses import dataclass
from typing import NamedTuple

from runtime.artifact.manifest import Artifact
from runtime.backends.ort.native import has_native_graph
from runtime.backends.ort.native_session import open_cpu_session
from runtime.machine.memory import default_budget

# Timed decode steps. The mean settles within a few, and a step of a large model takes a second.
_TIMED_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`rows` requests at once, each a prompt of `prompt_len` tokens and an answer of `new_tokens`."""

    rows: int
    prompt_len: int
    new_tokens: int

    def fitted(self, max_len: int) -> "Workload":
        """The same with prompts and answers that a model of `max_len` tokens can hold."""
        prompt_len = min(self.prompt_len, max(1, max_len // 2))
        return Workload(rows=self.rows, prompt_len=prompt_len, new_tokens=min(self.new_tokens, max_len - prompt_len))

    def describe(self) -> str:
        requests = "one request at a time" if self.rows == 1 else f"{self.rows} requests together"
        return f"{requests}, {self.prompt_len} tokens of prompt and {self.new_tokens} of answer each"


class Speed(NamedTuple):
    """Seconds for one prompt, and for one step that gives every row a token."""

    prefill_s: float
    step_s: float

    def seconds(self, work: Workload) -> float:
        """Seconds for the whole workload: prompts one after another, then all answers together."""
        return work.rows * self.prefill_s + work.new_tokens * self.step_s


def measure_speed(artifact: Artifact, work: Workload) -> Speed:
    """One measurement, warm, in a session of its own that is closed again. InvalidArtifact if it cannot be loaded.

    If memory does not hold all rows' caches, fewer rows are decoded together, and the time is scaled to all of them.
    """
    from runtime.commands.bench_runs import decode, prefill

    capacity = min(work.prompt_len + max(work.new_tokens, 1), artifact.manifest.dims.max_len)
    dialect = "native" if has_native_graph(artifact) else "ort"
    rows = max(1, min(work.rows, int(default_budget() // (capacity * artifact.kv_bytes_per_token(dialect)))))
    session = open_cpu_session(artifact, dialect, num_slots=rows, capacity=capacity)
    try:
        prefill(session, work.prompt_len)  # the first run of a length allocates
        for slot in range(1, rows):  # a cache that was never written costs no bandwidth to read
            session.copy_slot(0, slot, work.prompt_len)
        steps = min(_TIMED_STEPS, work.new_tokens)
        prefill_s = min(prefill(session, work.prompt_len) for _ in range(2))
        decode(session, rows, work.prompt_len, 1)
        return Speed(prefill_s, decode(session, rows, work.prompt_len, steps) * work.rows / rows)
    finally:
        session.close()
