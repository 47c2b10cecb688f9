"""`--ask`: put one question to a loaded model and print the answer as it arrives. `make run` uses it."""

import time
from collections.abc import Callable

from runtime.core import SamplingParams
from runtime.errors import EngineFailed
from runtime.text_model import TextModel

MAX_TOKENS = 200
"""Enough for a paragraph. A small model that never ends would fill the context."""


def ask(model: TextModel, question: str, url: str, write: Callable[[str], object]) -> None:
    """Write the question, the answer, its speed and the server's URL. Raises HeadraceError."""
    write(f"\n> {question}\n\n")
    started_s = time.perf_counter()
    prompt_ids = model.encode_chat([{"role": "user", "content": question}])
    max_tokens = max(1, min(MAX_TOKENS, model.max_len - len(prompt_ids)))
    times_s = []
    with model.generate(prompt_ids, SamplingParams(max_tokens=max_tokens, temperature=0)) as generation:
        for event in generation:
            if event.error is not None:
                raise EngineFailed(event.error)
            if event.token_id is not None:
                times_s.append(time.perf_counter() - started_s)
            write(event.text)
    speed = f"{len(times_s)} tokens"
    if times_s:
        speed += f", the first after {times_s[0]:.2f} s"
    if len(times_s) > 1 and times_s[-1] > times_s[0]:
        speed += f", then {(len(times_s) - 1) / (times_s[-1] - times_s[0]):.0f} tokens/s"
    write(f"\n\n[{speed}; {url}/v1]\n")
