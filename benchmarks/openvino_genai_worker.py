"""OpenVINO GenAI's side of the comparisons, run by its own Python: JSON lines in, JSON lines out.

openvino_genai_worker.py MODEL   says {"version": v} when OpenVINO is imported, then answers
    {"batch": b, "prompt": p, "new_tokens": n} -> {"prefill_s": s, "step_s": s, "settings": what it chose}
    {"clients": c, "prompts": [[id, ...], ...], "new_tokens": n}
                                               -> {"seconds": s, "times": [[s, ...], ...], "settings": what it chose}

The second is a closed loop: as many requests run as there are clients, and the next prompt is asked when one has
ended; `times` are each request's seconds from its arrival to each token. The first question of a kind tries the ways
of SETTINGS and keeps what is fastest; the answer names it. Everything else is as the tool has it: threads, an 8-bit
KV cache, activations quantized dynamically.
"""

import json
import os
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import openvino
import openvino_genai

VOCABULARY = (1000, 40_000)
CACHE_GB = 3
IS_CPU_TIME = os.environ.get("HEADRACE_CPU_TIME") == "1"
"""One thread, and its seconds of CPU instead of the clock's."""
clock = time.process_time if IS_CPU_TIME else time.perf_counter


class Settings(NamedTuple):
    """Tokens of a step at most, and whether prompts are cut to fill it."""

    max_tokens: int
    is_split: bool

    def __str__(self) -> str:
        return f"{self.max_tokens} tokens a step{', prompts cut' if self.is_split else ''}"


SETTINGS = (Settings(256, is_split=True), Settings(2048, is_split=False), Settings(8192, is_split=False))


class Pipeline:
    """A continuous-batching pipeline of the model; greedy, nothing ends before its length."""

    def __init__(self, model: str, settings: Settings) -> None:
        config = openvino_genai.SchedulerConfig()
        config.max_num_batched_tokens = settings.max_tokens
        config.dynamic_split_fuse = settings.is_split
        config.cache_size = CACHE_GB
        threads = {"INFERENCE_NUM_THREADS": 1} if IS_CPU_TIME else {}
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(model, config, "CPU", threads)
        self._count = 0

    def ask(self, ids: Any, new_tokens: int) -> Any:
        """Add a request; its handle, without which the request ends at once."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        self._count += 1
        return self._pipeline.add_request(self._count, openvino.Tensor(np.asarray([ids], np.int64)), config)

    def drain(self) -> None:
        """Run until nothing is left."""
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def measure(self, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
        """A prompt up to its first token, or steps once every prompt has its first."""
        prompts = np.random.default_rng(self._count).integers(*VOCABULARY, (batch, prompt))
        started_s = clock()
        if not new_tokens:
            handle = self.ask(prompts[0], 1)
            self.drain()
            if not handle.can_read():
                raise SystemExit("the prompt was not run")
            return {"prefill_s": clock() - started_s}
        waiting = handles = [self.ask(ids, new_tokens + 64) for ids in prompts]
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        started_s = clock()
        for _ in range(new_tokens):
            self._pipeline.step()
        step_s = (clock() - started_s) / new_tokens
        for handle in handles:
            handle.cancel()
        self.drain()
        return {"step_s": step_s}

    def serve(self, clients: int, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """All prompts in a closed loop."""
        waiting = iter(prompts)
        running: list[tuple[float, list[float], Any]] = []
        finished: list[list[float]] = []
        started_s = now_s = time.perf_counter()
        while len(finished) < len(prompts):
            while len(running) < clients and (ids := next(waiting, None)) is not None:
                running.append((now_s, [], self.ask(ids, new_tokens)))
            self._pipeline.step()
            now_s = time.perf_counter()
            for asked_s, times, handle in running:
                if handle.can_read():
                    num_new = sum(len(output.generated_ids) for output in handle.read().values())
                    times.extend([now_s - asked_s] * num_new)
            finished += [times for _, times, _ in running if len(times) >= new_tokens]
            running = [entry for entry in running if len(entry[1]) < new_tokens]
        self.drain()
        return {"seconds": now_s - started_s, "times": finished}


class Model:
    """The model, and for each kind of question the pipeline that was fastest. One pipeline is kept at a time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._chosen: dict[str, Settings] = {}
        self._open: tuple[Settings, Pipeline] | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Measure with the fastest settings, found when a question of its kind first comes."""
        is_served = "clients" in question
        kind = f"{question['clients']} clients" if is_served else str(question)
        if kind not in self._chosen:
            self._chosen[kind] = min(SETTINGS, key=lambda settings: self._seconds(settings, question))
        settings = self._chosen[kind]
        return {**self._measure(settings, question), "settings": str(settings)}

    def _seconds(self, settings: Settings, question: dict[str, Any]) -> float:
        """The first run warms up; of the second, what counts."""
        self._measure(settings, question)
        found = self._measure(settings, question)
        return float(found.get("seconds") or found.get("step_s") or found["prefill_s"])

    def _measure(self, settings: Settings, question: dict[str, Any]) -> dict[str, Any]:
        if self._open is None or self._open[0] != settings:
            self._open = None  # two caches at once would not fit everywhere
            self._open = (settings, Pipeline(self._path, settings))
        pipeline = self._open[1]
        return pipeline.serve(**question) if "clients" in question else pipeline.measure(**question)


def main() -> None:
    model = Model(sys.argv[1])
    print(json.dumps({"version": openvino_genai.__version__.partition("-")[0]}), flush=True)
    for line in sys.stdin:
        print(json.dumps(model.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
