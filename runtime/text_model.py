"""A text model: tokenizer, chat template, grammars, engine and its thread in one object, for `serve` and `generate`.

Knows nothing about HTTP or terminals.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from runtime.artifact.manifest import Artifact, open_artifact
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
)
from runtime.engine.engine import Engine
from runtime.engine.generation import Generation
from runtime.engine.planning.chunk import LatencyBounds
from runtime.engine.speculation.draft_model import DraftModel
from runtime.engine.speculation.speculator import Speculator
from runtime.engine.thread import EngineThread
from runtime.errors import InvalidRequest, InvalidSetting, PromptTooLong
from runtime.machine.memory import PREFIX_CACHE_FRACTION, default_budget
from runtime.machine.sizes import format_bytes
from runtime.session.session import Session
from runtime.settings import EngineSettings
from runtime.text.chat.options import DEFAULT_CHAT, REASONING, ChatOptions
from runtime.text.chat.template import TEMPLATE_FILE, load_chat_template
from runtime.text.model_text import ModelText
from runtime.text.stop_strings import RequestText
from runtime.text.tokenizer import Tokenizer
from runtime.text.tools.formats import Tool
from runtime.text.tools.one_call import OneCallText
from runtime.text.tools.parser import ToolCallParser


class MemoryUse(NamedTuple):
    """Most bytes of a model's caches: K and V of all slots together with the prompt beginnings kept for reuse, and of
    the latter alone."""

    kv_bytes: int
    prefix_cache_bytes: int


class ModelFacts(NamedTuple):
    """What an artifact says of its model. `card` is its description for clients (runtime/artifact/model_card.py)."""

    name: str
    eos_ids: frozenset[int]
    precision: str = ""
    card: Mapping[str, Any] = MappingProxyType({})


class TextModel:
    """A loaded model and its engine. `start` it, `generate` from any thread, `close` it."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        session: Session,
        text: ModelText,
        settings: EngineSettings,
        observer: EngineObserver | None = None,
        draft_session: Session | None = None,
    ) -> None:
        self.name = facts.name
        self.card = facts.card
        self.vocab_size = session.info.vocab_size
        self._session = session
        self._draft_session = draft_session
        self._text = text
        self._tokenizer, self._chat_template = text.tokenizer, text.chat_template
        self.tool_format = text.tool_format
        self._facts = facts
        self._draft_model = None if draft_session is None else DraftModel(draft_session)
        self._engine = Engine(
            session,
            prefill_chunk=settings.prefill_chunk,
            bounds=LatencyBounds(settings.ttft / 1000, settings.tpot / 1000),
            prefix_cache=settings.prefix_cache or 0,
            max_queue_wait_s=settings.max_queue_wait,
            drafter=Speculator(self._draft_model) if settings.speculate or self._draft_model else None,
            observer=observer,
        )
        self.max_len = self._engine.max_len
        self._thread = EngineThread(self._engine, max_waiting=settings.max_waiting)
        self._request_timeout = settings.request_timeout
        self._prefix_cache_bytes = settings.prefix_cache or 0
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
        if self._text.chats is None:
            raise InvalidRequest(
                f"the model {self.name} has no chat template; use /v1/completions with a prompt",
                param="messages",
            )
        return self._text.chats.encode(messages, tools=tools, options=options, max_tokens=max_tokens or self.max_len)

    @property
    def has_short_call_ids(self) -> bool:
        """Whether ids of calls must be nine letters and digits, as in Mistral's chat templates."""
        return self._chat_template is not None and self._chat_template.with_tools.has_short_ids

    def unread_fields(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[str]:
        """The fields of a chat that have no effect because this model's chat template does not read them."""
        if self._chat_template is None:
            return []
        fields = options.unread(self._chat_template.reads | self._chat_template.with_tools.reads)
        if not self._chat_template.knows_reasoning:
            found = {name for message in messages for name in REASONING if name in message}
            fields += [f"messages[].{name}" for name in sorted(found)]
        return fields

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text, perhaps part of a character; empty for a special token."""
        return self._tokenizer.token_bytes(token_id)

    def shown_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, but a special token gives its name."""
        return self._tokenizer.shown_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """A token for display: a special token by its name, a part of a character as U+FFFD."""
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
            eos_ids=self._facts.eos_ids,
            sink=generation.put,
            text=self._text_stream(prompt_ids, params, named, one_call_of),
            options=self._bounded(options),
            usage=generation.usage,
            guide=None if params.constraint is None else self._text.grammars.guide(params.constraint),
        )
        self._thread.submit(request)
        return generation

    def _named_stops(self, params: SamplingParams) -> dict[int, str]:
        """The stop strings that name special tokens, by token id. They stop at the token itself, which may add no
        text."""
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
        """Token ids of an expected answer, for `RequestOptions.prediction_ids`. Empty without speculation, and for a
        text
        longer than any answer: as drafts these would have little or no effect."""
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
        """Memory that its caches may take, filled or not."""
        infos = [session.info for session in (self._session, self._draft_session) if session is not None]
        return MemoryUse(sum(info.kv_bytes for info in infos), self._prefix_cache_bytes)

    def describe(self) -> str:
        """One line for the log: requests at a time, their length, memory and its pages, threads, precision, device."""
        info = self._session.info
        slots = "1 slot" if info.num_slots == 1 else f"{info.num_slots} slots"
        size, layout = format_bytes(self.memory_use().kv_bytes), info.kv_layout
        memory = f"{size} of KV memory"
        if layout is not None:
            memory = f"up to {memory}, taken in pages of {layout.page_bytes // 1024} KiB as tokens come"
        of_context = "" if self.max_len == info.capacity else f" (of {info.capacity:,}: --kv-memory)"
        threads = None if info.threads is None else f"{info.threads} thread" + "s" * (info.threads > 1)
        texts = (f"{slots} of {self.max_len:,} tokens{of_context}", memory, threads, self._facts.precision)
        return ", ".join(filter(None, (*texts, f"on {info.device}")))

    def start(self) -> None:
        """Start the engine's thread. Once only."""
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Stop accepting, wait for running requests, then cancel the rest. True if all finished in time."""
        return self._thread.drain(timeout_s)

    def close(self) -> None:
        """Cancel everything, end the thread and release the model. Idempotent."""
        self._thread.close()
        self._text.close()
        self._session.close()
        if self._draft_model is not None:
            self._draft_model.close()


def open_text_model(
    path: str | Path,
    settings: EngineSettings,
    *,
    name: str | None = None,
    allow_failed: bool = False,
    prepares: bool = False,
    observer: EngineObserver | None = None,
    backends: Sequence[Backend] | None = None,
) -> TextModel:
    """Open an artifact for text generation; the result is not started.

    Tokenizer and grammars are made while the model loads, which takes a core and does not hold Python's lock.
    prepares: also makes now what the first request with a constraint would wait for
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
    with ExitStack() as unfinished, ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
        loading = loader.submit(open_session, artifact, settings, backends=BACKENDS if backends is None else backends)
        unfinished.callback(_close_loaded, loading)
        text = _text_of(artifact, settings)
        unfinished.callback(text.close)
        if prepares:
            text.prepare()
        session = loading.result()
        check_speculation(artifact, settings, session.info)
        draft_session = None if draft is None else open_draft_session(draft, session.info, settings)
        unfinished.pop_all()
    precision = manifest.precision + ("" if artifact.passed else ", which FAILED its accuracy gate")
    return TextModel(
        ModelFacts(name or manifest.name, frozenset(manifest.eos_ids), precision, model_card(artifact)),
        session=session,
        text=text,
        settings=settings,
        observer=observer,
        draft_session=draft_session,
    )


def _close_loaded(loading: "Future[Session]") -> None:
    if loading.exception() is None:
        loading.result().close()


def _text_of(artifact: Artifact, settings: EngineSettings) -> ModelText:
    manifest, tokenizer = artifact.manifest, Tokenizer.from_artifact(artifact)
    template = load_chat_template(artifact.listed(TEMPLATE_FILE), tokenizer.config, tokenizer.special_tokens)
    return ModelText(
        tokenizer, template, settings, vocab_size=manifest.dims.vocab_size, eos_ids=frozenset(manifest.eos_ids)
    )
