"""A model that turns text into text: tokenizer, chat template, engine and its thread, put together.

What `serve` and `headrace generate` use. Knows nothing about HTTP or terminals.
"""

import itertools
import queue
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from runtime.artifact.manifest import open_artifact
from runtime.artifact.model_card import model_card
from runtime.backends.backend import Backend
from runtime.backends.draft_session import beside_draft, open_draft, open_draft_session
from runtime.backends.registry import BACKENDS, check_settings, check_speculation, open_session
from runtime.core import (
    DEFAULT_OPTIONS,
    EngineObserver,
    EngineStats,
    Request,
    RequestOptions,
    SamplingParams,
    TextStream,
    TokenEvent,
    Usage,
)
from runtime.engine.engine import Engine
from runtime.engine.speculation.draft_model import DraftModel
from runtime.engine.speculation.speculator import Speculator
from runtime.engine.thread import EngineThread
from runtime.errors import InvalidRequest, InvalidSetting, PromptTooLong
from runtime.grammar.grammar import GrammarCompiler
from runtime.machine.memory import PREFIX_CACHE_FRACTION, default_budget
from runtime.machine.sizes import format_bytes
from runtime.session.session import Session
from runtime.settings import EngineSettings
from runtime.text.chat.options import DEFAULT_CHAT, REASONING, ChatOptions
from runtime.text.chat.prompt import ChatPrompts
from runtime.text.chat.template import TEMPLATE_FILE, ChatTemplate, load_chat_template
from runtime.text.stop_strings import RequestText
from runtime.text.tokenizer import Tokenizer
from runtime.text.tools.formats import TOOL_FORMATS, Tool, detect_format
from runtime.text.tools.one_call import OneCallText
from runtime.text.tools.parser import ToolCallParser


class Generation(Iterator[TokenEvent]):
    """The events of one request, as they come. Iterating blocks; it ends after the event with a
    `finish_reason`, and `usage` is complete then.

    One consumer; `close` may be called from any thread.
    """

    def __init__(self, thread: EngineThread, request_id: str, num_prompt: int) -> None:
        self.request_id = request_id
        self.usage = Usage()
        self.prompt_tokens = num_prompt
        self._thread = thread
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self._last: TokenEvent | None = None

    def put(self, event: TokenEvent) -> None:
        """The request's sink: called by the engine."""
        self._events.put(event)

    def next_event(self, timeout_s: float | None = None) -> TokenEvent | None:
        """The next event, None if none comes within `timeout_s` seconds. After the last, that one again."""
        if self._last is not None:
            return self._last
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if event.finish_reason is not None:
            self._last = event
        return event

    def __next__(self) -> TokenEvent:
        if self._last is not None:
            raise StopIteration
        event = self.next_event()
        assert event is not None
        return event

    def close(self) -> None:
        """Cancel the request if it still runs; its slot is free at the next step boundary. Idempotent."""
        if self._last is None:
            self._thread.cancel(self.request_id)

    def __enter__(self) -> "Generation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MemoryUse(NamedTuple):
    """Most bytes that a model's caches may take: K and V of all slots, and the prompt beginnings kept for reuse."""

    kv_bytes: int
    prefix_cache_bytes: int


class TextModel:
    """A loaded model and its engine. `start` it, `generate` from any thread, `close` it."""

    def __init__(
        self,
        *,
        name: str,
        session: Session,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        eos_ids: frozenset[int],
        settings: EngineSettings,
        observer: EngineObserver | None = None,
        precision: str = "",
        draft_session: Session | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.card = card or {}
        """What the artifact says of itself, for people and clients; see runtime/artifact/model_card.py."""
        self.max_len = session.info.capacity
        self.vocab_size = session.info.vocab_size
        self._session = session
        self._draft_session = draft_session
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._eos_ids = eos_ids
        self._precision = precision
        template = None if chat_template is None else chat_template.with_tools.source
        self.tool_format = TOOL_FORMATS.get(settings.tool_format) or detect_format(template)
        self._chats = None
        if chat_template is not None:
            trusts = settings.trust_special_tokens
            self._chats = ChatPrompts(tokenizer, chat_template, self.tool_format, trust_special_tokens=trusts)
        self._draft_model = None if draft_session is None else DraftModel(draft_session)
        self._engine = Engine(
            session,
            prefill_chunk=settings.prefill_chunk,
            prefix_cache=settings.prefix_cache or 0,
            max_queue_wait_s=settings.max_queue_wait,
            speculator=Speculator(self._draft_model) if settings.speculate or self._draft_model else None,
            observer=observer,
        )
        self._thread = EngineThread(self._engine, max_waiting=settings.max_waiting)
        self._request_timeout = settings.request_timeout
        self._prefix_cache_bytes = settings.prefix_cache or 0
        self._grammars = GrammarCompiler(tokenizer, vocab_size=self.vocab_size, eos_ids=eos_ids)
        self._request_numbers = itertools.count()

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of a prompt, with the special tokens the model expects around it.

        Raises PromptTooLong, before most of it is tokenized, for a text that certainly has more than `max_tokens`
        tokens, by default those of the context.
        """
        max_tokens = self.max_len if max_tokens is None else max_tokens
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] = (),
        options: ChatOptions = DEFAULT_CHAT,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a chat, up to where the assistant speaks. Control tokens in messages and tools are text
        (runtime/text/chat/prompt.py). InvalidRequest without a chat template, or for options that cannot be had with
        it; PromptTooLong for a chat that certainly has more than `max_tokens`, by default those of the context.
        """
        if self._chats is None:
            raise InvalidRequest(
                f"the model {self.name} has no chat template; use /v1/completions with a prompt",
                param="messages",
            )
        return self._chats.encode(messages, tools=tools, options=options, max_tokens=max_tokens or self.max_len)

    @property
    def has_short_call_ids(self) -> bool:
        """Whether the ids of calls have to be nine letters and digits, as Mistral's chat templates want them."""
        return self._chat_template is not None and self._chat_template.with_tools.has_short_ids

    def unread_fields(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[str]:
        """The fields of a chat that are without effect, since this model's chat template does not read them."""
        if self._chat_template is None:
            return []
        fields = options.unread(self._chat_template.reads | self._chat_template.with_tools.reads)
        if not self._chat_template.knows_reasoning:
            found = {name for message in messages for name in REASONING if name in message}
            fields += [f"messages[].{name}" for name in sorted(found)]
        return fields

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text: possibly a part of a character; empty for a special token."""
        return self._tokenizer.token_bytes(token_id)

    def shown_bytes(self, token_id: int) -> bytes:
        """The same, with special tokens by their names."""
        return self._tokenizer.shown_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """A token for people: a special token by its name, a part of a character as U+FFFD."""
        return self._tokenizer.token_text(token_id)

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
        one_call_of: Collection[str] = (),
    ) -> Generation:
        """Start generating; returns at once. The answer ends with its first call of one of the functions
        `one_call_of`.

        Raises PromptTooLong if prompt and max_tokens do not fit (both numbers), InvalidRequest for an empty
        prompt, a token id outside the vocabulary or a constraint that cannot be used, Overloaded if too many wait,
        Unavailable if the engine does not accept.
        """
        for token_id in (*params.logit_bias, *params.stop_token_ids):
            if not 0 <= token_id < self.vocab_size:
                param = "logit_bias" if token_id in params.logit_bias else "stop_token_ids"
                raise InvalidRequest(
                    f"{param}: token id {token_id} is not in the vocabulary, 0 to {self.vocab_size - 1}",
                    param=param,
                )
        named = self._named_stops(params)
        params = replace(params, stop_token_ids=params.stop_token_ids | named.keys()) if named else params
        request_id = f"request-{next(self._request_numbers)}" if request_id is None else request_id
        generation = Generation(self._thread, request_id, len(prompt_ids))
        request = Request(
            request_id=request_id,
            prompt_ids=list(prompt_ids),
            params=params,
            eos_ids=self._eos_ids,
            sink=generation.put,
            text=self._text_stream(prompt_ids, params, named, one_call_of),
            options=self._bounded(options),
            usage=generation.usage,
            guide=None if params.constraint is None else self._grammars.guide(params.constraint),
        )
        self._thread.submit(request)
        return generation

    def _named_stops(self, params: SamplingParams) -> dict[int, str]:
        """The stop strings that are names of special tokens, by the ids of those: they end at the token, for it may add
        no text."""
        ids = self._tokenizer.special_id_of
        return {ids[stop]: stop for stop in params.stop if stop in ids}

    def _text_stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        named_stops: Mapping[int, str],
        one_call_of: Collection[str],
    ) -> TextStream:
        text = RequestText(
            self._tokenizer.detokenizer(prompt_ids, skips_special=params.skip_special_tokens),
            params.stop,
            min_tokens=params.min_tokens,
            keeps_end=params.include_stop_str_in_output,
            end_texts=named_stops if params.skip_special_tokens else None,
        )
        return OneCallText(text, ToolCallParser(self.tool_format, one_call_of)) if one_call_of else text

    def encode_prediction(self, text: str) -> list[int]:
        """Token ids of an expected answer, for `RequestOptions.prediction_ids`. Empty if nothing is speculated here,
        or if the text is longer than any answer can be: as drafts they would have no effect, or little."""
        if not self._engine.is_speculating:
            return []
        try:
            return self.encode(text, add_special_tokens=False)[: self.max_len]
        except PromptTooLong:
            return []

    def _bounded(self, options: RequestOptions) -> RequestOptions:
        """The request's own time limit, or the server's if that is less."""
        limits = [limit for limit in (options.timeout_s, self._request_timeout) if limit is not None]
        return replace(options, timeout_s=min(limits, default=None))

    def stats(self) -> EngineStats:
        """Queue lengths and cache use at this moment."""
        return self._thread.stats()

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_ready

    @property
    def failure(self) -> str | None:
        """Why the engine died, if it did."""
        return self._thread.failure

    def memory_use(self) -> MemoryUse:
        """What its caches may take, filled or not."""
        infos = [session.info for session in (self._session, self._draft_session) if session is not None]
        kv_bytes = sum(info.num_slots * info.capacity * info.kv_bytes_per_token for info in infos)
        return MemoryUse(kv_bytes, self._prefix_cache_bytes)

    def describe(self) -> str:
        """One line for the start: slots, their length, memory, precision and device."""
        info = self._session.info
        size = format_bytes(self.memory_use().kv_bytes)
        slots = "slot" if info.num_slots == 1 else "slots"
        text = f"{info.num_slots} KV {slots} of {info.capacity:,} tokens, {size} at most"
        return ", ".join(filter(None, (text, self._precision, f"on {info.device}")))

    def prepare_constraints(self) -> None:
        """Get ready for requests with constraints, which would otherwise hold up everybody once."""
        self._grammars.prepare()
        if self._chats is not None:
            self._chats.prepare()

    def start(self) -> None:
        """Start the engine's thread. Once only."""
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Stop accepting, wait for what runs, cancel the rest in the end. True if all finished in time."""
        return self._thread.drain(timeout_s)

    def close(self) -> None:
        """Cancel everything, end the thread and release the model. Idempotent."""
        self._thread.close()
        self._grammars.close()
        self._session.close()
        if self._draft_model is not None:
            self._draft_model.close()


def open_text_model(
    path: str | Path,
    settings: EngineSettings,
    *,
    name: str | None = None,
    allow_failed: bool = False,
    observer: EngineObserver | None = None,
    backends: Sequence[Backend] | None = None,
) -> TextModel:
    """Open an artifact for text generation; the result is not started.

    `backends` are those of runtime/backends/registry.py unless given. Raises InvalidArtifact, InvalidSetting if the
    settings do not fit the model or the memory, DeviceUnavailable or DeviceFailed if the device cannot be used.
    """
    check_settings(settings)
    artifact = open_artifact(path, allow_failed=allow_failed)
    manifest = artifact.manifest
    if settings.max_len is not None and settings.max_len > manifest.dims.max_len:
        raise InvalidSetting(
            f"--max-len {settings.max_len:,} is beyond the {manifest.dims.max_len:,} of {manifest.name}; lower it"
        )
    if settings.prefix_cache is None:
        share = default_budget(weight_bytes=artifact.weight_bytes, fraction=PREFIX_CACHE_FRACTION)
        settings = replace(settings, prefix_cache=share)
    check_speculation(artifact, settings)
    draft = None
    if settings.draft is not None:
        draft = open_draft(settings.draft, artifact, settings)
        settings = beside_draft(settings, artifact, draft)
    tokenizer = Tokenizer.from_artifact(artifact)
    template = load_chat_template(artifact.listed(TEMPLATE_FILE), tokenizer.config, tokenizer.special_tokens)
    session = open_session(artifact, settings, backends=BACKENDS if backends is None else backends)
    try:
        check_speculation(artifact, settings, session.info)
    except InvalidSetting:
        session.close()
        raise
    return TextModel(
        name=name or manifest.name,
        session=session,
        tokenizer=tokenizer,
        chat_template=template,
        eos_ids=frozenset(manifest.eos_ids),
        settings=settings,
        observer=observer,
        precision=manifest.precision + ("" if artifact.passed else ", which FAILED its accuracy gate"),
        draft_session=None if draft is None else open_draft_session(draft, session.info, settings),
        card=model_card(artifact),
    )
