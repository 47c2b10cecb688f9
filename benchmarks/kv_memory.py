"""KV memory by tokens, on a model with the KV cache of Qwen3-0.6B: 28 layers, 8 KV heads of 128, context 32,768.

usage: python -m benchmarks.kv_memory [--kv-memory 16GB] [--only chats,long,pressure] [--device cpu]

The weights are random and the hidden size is 128, because memory and attention alone are measured. The artifact is
exported into the cache once. Situations:

    chats      64 requests of 500 + 200 tokens at once: does anybody wait for a slot, what memory do they take
    long       16 short streams beside a prompt of 30,000 tokens: p99 between two tokens of a stream, and the bound of
               benchmarks/fairness.py: medians of a decode step and of a piece of the prompt. All but the prompt's last
               tokens are put into its slot without computing them: attention alone would take an hour on two cores
    pressure   10,000 requests of random lengths on little memory that changes, without a model (the tests' fake
               session): none is lost, each gets the tokens that it gets alone, the budget holds after every step

Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.registry import open_session
from runtime.commands.roofline import describe_machine
from runtime.core import FinishReason, Request, SamplingParams, TokenEvent
from runtime.engine.engine import Engine
from runtime.machine.sizes import format_bytes
from runtime.machine.user_cache import cache_dir
from runtime.session.host_rows import HostRows
from runtime.session.session import Session
from runtime.settings import EngineSettings, parse_bytes
from tests.support.engine_requests import Recorder, add, alone, check_memory, check_slots
from tests.support.fake_session import LAYOUT, FakeSession
from tests.support.tiny.checkpoint import config_of, write_checkpoint

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "num_attention_heads": 8,
    "head_dim": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 32_768,
}
SLACK = 1.5
"""Of the bound, as in benchmarks/fairness.py."""
BLOCK = 1000
"""Positions written at once where a prompt's beginning is put into its slot."""


def artifact_of_shape() -> Artifact:
    """The artifact, exported at the first call."""
    path = cache_dir() / "benchmarks" / "qwen3-0.6b-kv"
    if not (path / "manifest.json").exists():
        source = write_checkpoint(path.with_name("qwen3-0.6b-kv-checkpoint"), config_of("qwen3", **SHAPE))
        export_model(ExportOptions(model=str(source), out=path, force=True))
    return open_artifact(path, allow_failed=True)


class Times(list[float]):
    """A sink that notes when tokens come."""

    last: TokenEvent | None = None

    def __call__(self, event: TokenEvent) -> None:
        self.append(time.perf_counter())
        self.last = event


def ask(engine: Engine, name: str, length: int, num_tokens: int) -> Times:
    """Submit a random prompt."""
    times = Times()
    ids = np.random.default_rng(len(name)).integers(3, 320, length).tolist()
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    request = Request(request_id=name, prompt_ids=ids, params=params, eos_ids=frozenset(), sink=times)
    engine.add(engine.prepare(request))
    return times


def chats(session: Session, num: int = 64) -> dict[str, Any]:
    """All at once: how many wait once the first step has begun, and what they take when they are longest."""
    engine, started_s = Engine(session), time.perf_counter()
    times = [ask(engine, f"chat {idx}", 500, 200) for idx in range(num)]
    most_waiting, most_bytes, most_tokens = 0, 0, 0
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        most_waiting = max(most_waiting, stats.num_waiting)
        if stats.kv_used_bytes > most_bytes:
            most_bytes, most_tokens = stats.kv_used_bytes, stats.kv_used_tokens
    assert all(item.last is not None and item.last.finish_reason is FinishReason.LENGTH for item in times)
    return {
        "requests": num,
        "waited for a slot": most_waiting,
        "preempted": engine.stats().num_preempted,
        "bytes": most_bytes,
        "bytes a token": most_bytes / most_tokens,
        "seconds": time.perf_counter() - started_s,
    }


def long_prompt(session: Session, length: int = 30_000, computed: int = 1024) -> dict[str, Any]:
    """Gaps of 16 streams while the last tokens of a long prompt are computed."""
    engine = Engine(session)
    streams = [ask(engine, f"stream {idx}", 100, 2000) for idx in range(16)]
    while not all(len(times) > 3 for times in streams):
        engine.step()
    alone = [len(times) for times in streams]
    for _ in range(10):
        engine.step()
    decode_s = statistics.median(
        b - a for times, n in zip(streams, alone, strict=True) for a, b in zip(times[n - 1 :], times[n:], strict=False)
    )
    prompt = ask(engine, "long", length, 1)
    engine.step()
    fill_slot(engine, session, "long", length - computed)
    before, pieces = [len(times) for times in streams], list[float]()
    bytes_used = 0
    while not prompt:
        bytes_used = engine.stats().kv_used_bytes
        started_s = time.perf_counter()
        engine.step()
        pieces.append(time.perf_counter() - started_s - decode_s)
    gaps = [
        b - a for times, n in zip(streams, before, strict=True) for a, b in zip(times[n:], times[n + 1 :], strict=False)
    ]
    for request_id in list(engine.live):
        engine.cancel(request_id)
    bound_s = decode_s + statistics.median(pieces)
    p50, p99 = np.quantile(gaps, [0.5, 0.99])
    return {
        "decode ms": 1000 * decode_s,
        "gap p50 ms": 1000 * float(p50),
        "gap p99 ms": 1000 * float(p99),
        "bound ms": 1000 * bound_s,
        "is within": bool(p99 <= SLACK * bound_s),
        "gaps": len(gaps),
        "steps": len(pieces),
        "bytes": bytes_used,
    }


def fill_slot(engine: Engine, session: Session, name: str, stop: int) -> None:
    """Put a beginning into a request's slot that nobody computed: its values do not change the work."""
    slot, slots = engine.live[name].slot, engine._scheduler.slots
    assert slot is not None
    first = int(slots.past_len[slot])
    shapes = [array.shape for array in session.read_slot(slot, 0, 1).arrays]  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    part = [rng.standard_normal((heads, BLOCK, dim), np.float32) for heads, _, dim in shapes]
    for start in range(first, stop, BLOCK):
        num = min(BLOCK, stop - start)
        session.write_slot(slot, start, HostRows([array[:, :num] for array in part]))
    slots.past_len[slot] = stop
    slots.fill(slot)


def pressure(num: int = 10_000) -> dict[str, Any]:
    """Random requests on a fake session, with one budget after the other."""
    rng, preempted, started_s = np.random.default_rng(0), 0, time.perf_counter()
    capacity, vocab, budgets = 160, 50, (160, 200, 300, 600, 1500)
    for budget in budgets:
        session = FakeSession(
            num_slots=32, capacity=capacity, vocab_size=vocab, memory=3, kv_budget=LAYOUT.committed(budget)
        )
        engine, recorders = Engine(session, prefix_cache=2000), list[Recorder]()
        asked: list[tuple[list[int], SamplingParams]] = []
        while len(asked) < num // len(budgets) or engine.has_work:
            for _ in range(int(rng.integers(0, 5)) if len(asked) < num // len(budgets) else 0):
                prompt, is_open = rng.integers(0, vocab, rng.integers(1, 60)).tolist(), rng.random() < 0.3
                params = SamplingParams(
                    max_tokens=capacity - len(prompt) if is_open else int(rng.integers(1, 60)),
                    temperature=float(rng.integers(0, 2)),
                    seed=int(rng.integers(0, 100)),
                    stop_token_ids=frozenset(range(3)) if is_open else frozenset(),
                )
                recorders.append(add(engine, str(len(asked)), prompt, params))
                asked.append((prompt, params))
            engine.step()
            check_slots(engine)
            check_memory(engine, session)
        preempted += engine.stats().num_preempted
        for recorder, (prompt, params) in zip(recorders, asked, strict=True):
            assert recorder.events == alone(prompt, params, memory=3), "another answer than alone"
        assert all(recorder.reason in (FinishReason.STOP, FinishReason.LENGTH) for recorder in recorders), "one is lost"
    return {
        "requests": num // len(budgets) * len(budgets),
        "preempted": preempted,
        "seconds": time.perf_counter() - started_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-memory", type=parse_bytes, default=16 * 10**9)
    parser.add_argument("--only", default="chats,long,pressure", help="which situations, with commas between")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    names = args.only.split(",")
    if "pressure" in names:
        found["pressure"] = pressure()
    if {"chats", "long"} & set(names):
        settings = EngineSettings(device=args.device, max_batch=64, kv_memory=args.kv_memory)
        session = open_session(artifact_of_shape(), settings)
        for name, measure in (("chats", chats), ("long", long_prompt)):
            if name in names:
                found[name] = measure(session)
        session.close()
    for name, figures in found.items():
        for what, value in figures.items():
            shown = (
                format_bytes(int(value)) if "bytes" in what else f"{value:.1f}" if isinstance(value, float) else value
            )
            print(f"{name:10}{what:20}{shown}")
    machine = describe_machine()._asdict()
    print(json.dumps({"benchmark": "kv_memory", "machine": machine, "kv_memory": args.kv_memory, "found": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
