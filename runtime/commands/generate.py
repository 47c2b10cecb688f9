"""`headrace generate`: stream an answer. Text goes to standard output, figures to standard error."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runtime.backends.registry import add_engine_flags, engine_settings
from runtime.core import FinishReason, SamplingParams, Usage
from runtime.errors import EngineFailed, InvalidRequest
from runtime.settings import add_flags, from_namespace

if TYPE_CHECKING:
    from runtime.engine.generation import Generation
    from runtime.text_model import TextModel

DEFAULT_MAX_TOKENS = 512
"""Long enough for an answer, and a bound on one that never ends. Cut to the rest of the context."""
NO_LIMIT = -1
"""All tokens that the context leaves."""

# One request: nothing to batch, no queue, no tools.
_ENGINE_SKIPPED = ("max_batch", "max_waiting", "max_queue_wait", "request_timeout", "prefix_cache", "tool_format")
# Greedy by default: the same command prints the same text. No output shows log-probabilities, and no flag can hold a
# grammar.
_SAMPLING_DEFAULTS = {"temperature": 0.0, "max_tokens": None}
_SAMPLING_SKIPPED = ("logprobs", "prompt_logprobs", "constraint")


def make_parser() -> argparse.ArgumentParser:
    """The command line of the verb; sampling and engine flags come from their settings classes."""
    parser = argparse.ArgumentParser(prog="headrace generate", description="Stream an answer to the terminal.")
    parser.add_argument("artifact", help="directory written by `headrace export`")
    parser.add_argument("-p", "--prompt", required=True, help="the prompt; - reads it from standard input")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without chat template")
    parser.add_argument("--allow-failed", action="store_true", help="use an artifact that failed its accuracy gate")
    sampling = parser.add_argument_group("sampling")
    add_flags(sampling, SamplingParams, skip=_SAMPLING_SKIPPED, defaults=_SAMPLING_DEFAULTS)
    add_engine_flags(parser.add_argument_group("engine"), skip=_ENGINE_SKIPPED)
    return parser


def main(argv: list[str]) -> int:
    """Run the verb. 0 when the answer is complete or its reader has gone, 130 on Ctrl-C."""
    args = make_parser().parse_args(argv)
    if args.raw and args.system is not None:
        raise InvalidRequest("--system is part of a chat and --raw leaves the chat template out; give one of them")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    settings = engine_settings(args, max_batch=1, prefix_cache=0)
    # Check the sampling flags before loading the model; the real limit needs the prompt's length.
    from_namespace(SamplingParams, args, max_tokens=1 if args.max_tokens in (None, NO_LIMIT) else args.max_tokens)

    from runtime.text_model import open_text_model

    with _prefill_bar() as bar:
        model = open_text_model(args.artifact, settings, allow_failed=args.allow_failed, observer=bar)
        sys.stderr.write(f"{model.name}: {model.describe()}\n")
        try:
            model.start()
            prompt_ids = encode_prompt(model, prompt, system=args.system, is_raw=args.raw)
            bar.expect(len(prompt_ids))
            params = from_namespace(
                SamplingParams, args, max_tokens=_max_tokens(args.max_tokens, model.max_len - len(prompt_ids))
            )
            return stream(model.generate(prompt_ids, params))
        finally:
            model.close()


def encode_prompt(model: "TextModel", prompt: str, *, system: str | None, is_raw: bool) -> list[int]:
    """Token ids of a raw prompt, or of a chat of one question."""
    if is_raw:
        return model.encode(prompt)
    messages = [] if system is None else [{"role": "system", "content": system}]
    return model.encode_chat([*messages, {"role": "user", "content": prompt}])


def stream(generation: "Generation") -> int:
    """Write the answer as it comes, then TTFT and speed. Returns the exit status. Raises EngineFailed."""
    started_s, first_s, num_tokens = time.perf_counter(), None, 0
    try:
        with generation:
            for event in generation:
                first_s = first_s or time.perf_counter()
                num_tokens += event.token_id is not None
                sys.stdout.write(event.text)
                sys.stdout.flush()
                if event.finish_reason is FinishReason.ERROR:
                    raise EngineFailed(str(event.error))
    except BrokenPipeError:
        # `| head` has ended. Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return 130
    sys.stdout.write("\n")
    sys.stderr.write(_figures(generation.prompt_tokens, num_tokens, started_s, first_s) + "\n")
    return 0


def _max_tokens(asked: int | None, room: int) -> int:
    """The limit asked for, or the default cut to `room`. At least 1, so that a full context is refused."""
    if asked == NO_LIMIT:
        return max(1, room)
    return asked if asked is not None else max(1, min(DEFAULT_MAX_TOKENS, room))


def _figures(num_prompt: int, num_tokens: int, started_s: float, first_s: float | None) -> str:
    text = f"{num_prompt} prompt tokens, {num_tokens} tokens"
    if first_s is None:
        return text
    text += f", TTFT {(first_s - started_s) * 1000:.0f} ms"
    decode_s = time.perf_counter() - first_s
    return f"{text}, {(num_tokens - 1) / decode_s:.1f} tokens/s" if num_tokens > 1 and decode_s > 0 else text


class _PrefillBar:
    """An `EngineObserver` that shows the progress of a long prompt after two seconds."""

    def __init__(self) -> None:
        self._bar: Any = None

    def expect(self, num_tokens: int) -> None:
        """Start a bar over so many prompt tokens."""
        from tqdm import tqdm

        self._bar = tqdm(total=num_tokens, desc="prompt", unit="token", delay=2, leave=False, file=sys.stderr)

    def close(self) -> None:
        """Take the bar away. Idempotent."""
        if self._bar is not None:
            self._bar.close()

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        if self._bar is not None and num_prefill_tokens:
            self._bar.update(num_prefill_tokens)

    def on_first_token(self, *, ttft_s: float) -> None:
        self.close()

    def on_finish(
        self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None, usage: Usage
    ) -> None:
        self.close()


@contextmanager
def _prefill_bar() -> Iterator[_PrefillBar]:
    bar = _PrefillBar()
    try:
        yield bar
    finally:
        bar.close()
