"""The real TextModel, engine and byte tokenizer over the fake session: what the server's tests run on."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from runtime.core import EngineObserver, SamplingParams
from runtime.session.session import Batch
from runtime.settings import EngineSettings
from runtime.text.chat.template import ChatTemplate
from runtime.text.model_text import ModelText
from runtime.text.tokenizer import Tokenizer
from runtime.text_model import ModelFacts, TextModel
from tests.support.byte_tokenizer import EOS, byte_tokenizer
from tests.support.fake_session import FakeSession, ScriptedSession

NAME = "fake"
VOCAB_SIZE = 258
"""256 bytes and two special tokens."""
EOS_ID = 257
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPT_END = "\nassistant: "


def fake_text_model(
    *,
    name: str = NAME,
    num_slots: int = 4,
    capacity: int = 256,
    max_waiting: int = 64,
    step_s: float = 0.0,
    on_run: Callable[[Batch], None] | None = None,
    has_template: bool = True,
    observer: EngineObserver | None = None,
    script: str | None = None,
    prefix_cache: int = 0,
    template: str = TEMPLATE,
    **settings: Any,
) -> TextModel:
    """A model that answers with random bytes, the same for a prompt; every run takes `step_s` seconds.

    With a `script` it answers every chat with that text.
    """

    def run(batch: Batch) -> None:
        if step_s:
            time.sleep(step_s)
        if on_run is not None:
            on_run(batch)

    tokenizer = byte_tokenizer()
    options: dict[str, Any] = {"num_slots": num_slots, "capacity": capacity, "vocab_size": VOCAB_SIZE, "on_run": run}
    session = FakeSession(**options)
    if script is not None:
        session = ScriptedSession([*tokenizer.encode(script), EOS_ID], tokenizer.encode(PROMPT_END), **options)
    chat_template = ChatTemplate(template, {"eos_token": EOS}) if has_template else None
    engine = EngineSettings(
        max_batch=num_slots, max_waiting=max_waiting, prefill_chunk=64, prefix_cache=prefix_cache, **settings
    )
    return TextModel(
        ModelFacts(
            name,
            frozenset([EOS_ID]),
            card={"precision": "fp32", "context_length": capacity, "receipt": {"passed": True, "checks": []}},
        ),
        session=session,
        text=_text(tokenizer, chat_template, engine, vocab_size=VOCAB_SIZE),
        settings=engine,
        observer=observer,
    )


def _text(
    tokenizer: Tokenizer, template: ChatTemplate | None, settings: EngineSettings, *, vocab_size: int
) -> ModelText:
    return ModelText(tokenizer, template, settings, vocab_size=vocab_size, eos_ids=frozenset([EOS_ID]))


@contextmanager
def running(session: FakeSession, *, max_waiting: int = 64, template: str | None = None) -> Iterator[TextModel]:
    """A text model over the session, started; closed when the block ends."""
    tokenizer, settings = byte_tokenizer(), EngineSettings(max_waiting=max_waiting)
    chat_template = None if template is None else ChatTemplate(template, tokenizer.special_tokens)
    model = TextModel(
        ModelFacts(NAME, frozenset({EOS_ID})),
        session=session,
        text=_text(tokenizer, chat_template, settings, vocab_size=session.info.vocab_size),
        settings=settings,
    )
    model.start()
    try:
        yield model
    finally:
        model.close()
        assert session.is_closed


def greedy_to_the_end(max_tokens: int, stop: tuple[str, ...] = ()) -> SamplingParams:
    """Greedy, and past every end of text."""
    return SamplingParams(max_tokens=max_tokens, temperature=0, stop=stop, ignore_eos=True)
