"""The replies: OpenAI's objects, as the chunks of a stream or folded into one object.

Knows the shapes of https://platform.openai.com/docs/api-reference, nothing of HTTP or of the engine.
"""

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from runtime.core import TokenEvent, TokenLogprob
from runtime.text_model import TextModel
from serve.replies.choices import Choices
from serve.replies.tools import ToolDeltas
from serve.replies.unenforced import AnswerChecks

Json = dict[str, Any]

LEAST_LOGPROB = -9999.0
"""OpenAI's value for "very unlikely". JSON has no minus infinity."""


class ReplyShape(ABC):
    """How one kind of request is answered. `chunks_of` calls `opening`, `pieces` and `usage`, in this order."""

    def __init__(self, model: TextModel, prefix: str, kind: str, chunk_kind: str) -> None:
        """`prefix` begins the reply's id; `kind` and `chunk_kind` are the `object` of a whole reply and of a chunk."""
        self._model = model
        self._head: Json = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": None,
        }
        self._chunk_head = {**self._head, "object": chunk_kind}

    @abstractmethod
    def opening(self, num_choices: int) -> Iterator[Json]:
        """The chunks before the first token."""

    @abstractmethod
    def pieces(self, index: int, event: TokenEvent) -> Iterator[Json]:
        """The chunks for one event of one choice; none for a token whose text is held back."""

    @abstractmethod
    def _opened(self, piece: Json) -> Json:
        """A choice of the whole reply, from its first piece. Its texts are lists, so that nothing is copied."""

    @abstractmethod
    def _grow(self, choice: Json, piece: Json) -> None:
        """Add the text of a piece to a choice."""

    @abstractmethod
    def _close(self, choice: Json) -> None:
        """Join the texts of a choice."""

    def usage(self, choices: Choices) -> Json:
        """The chunk after the last token; it has no choices."""
        return {**self._chunk_head, "choices": [], "usage": usage(choices)}

    def fold(self, chunks: Iterable[Json]) -> Json:
        """The whole reply, from all chunks of a stream, the usage included."""
        whole: dict[int, Json] = {}
        counts = None
        for chunk in chunks:
            counts = chunk["usage"]
            for piece in chunk["choices"]:
                choice = whole.get(piece["index"])
                if choice is None:
                    whole[piece["index"]] = self._opened(piece)
                    continue
                self._grow(choice, piece)
                choice["logprobs"] = _joined(choice["logprobs"], piece["logprobs"])
                choice["finish_reason"] = piece["finish_reason"]
                if "schema_check" in piece:
                    choice["schema_check"] = piece["schema_check"]
        for choice in whole.values():
            self._close(choice)
        return {**self._head, "choices": [whole[index] for index in sorted(whole)], "usage": counts}

    def _chunk(self, index: int, content: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        choice = {**content, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._chunk_head, "choices": [choice], "usage": None}


def chunks_of(choices: Choices, shape: ReplyShape, checks: AnswerChecks) -> Iterator[Json]:
    """Every chunk of a reply. Raises what iterating `choices` raises. Closing the iterator cancels the request."""
    yield from shape.opening(len(choices))
    for index, event in choices:
        for chunk in shape.pieces(index, event):
            if event.prompt_logprobs is None:
                checks.see(*chunk["choices"])
            yield chunk
    yield shape.usage(choices)


class Echo(NamedTuple):
    """A prompt that is repeated before the answer, as text and as tokens."""

    text: str
    token_ids: Sequence[int]


class CompletionShape(ReplyShape):
    """Answers of POST /v1/completions.

    echo: the prompt of each choice, if the reply repeats it
    is_scored: the prompt's log-probabilities will come, and its text with them
    shows_special: special tokens are part of the text
    """

    def __init__(
        self, model: TextModel, echo: Sequence[Echo] = (), *, is_scored: bool = False, shows_special: bool = False
    ) -> None:
        super().__init__(model, "cmpl", "text_completion", "text_completion")
        self._echo = echo
        self._is_scored = is_scored
        self._bytes_in_text = model.shown_bytes if shows_special else model.token_bytes
        self._offsets: dict[int, TextOffset] = {}

    def opening(self, num_choices: int) -> Iterator[Json]:
        for index, echo in enumerate(self._echo):
            if not self._is_scored:
                self._offsets[index] = TextOffset(len(echo.text))
                yield self._chunk(index, {"text": echo.text}, None, None)

    def pieces(self, index: int, event: TokenEvent) -> Iterator[Json]:
        if event.prompt_logprobs is not None:
            if self._is_scored:
                scores = self._prompt_logprobs(index, event)
                yield self._chunk(index, {"text": self._echo[index].text}, scores, None)
            return
        logprobs = None if event.logprob is None else self._logprobs(index, event)
        if event.text or logprobs or event.finish_reason:
            yield self._chunk(index, {"text": event.text}, logprobs, event.finish_reason)

    def _opened(self, piece: Json) -> Json:
        return {**piece, "text": [piece["text"]]}

    def _grow(self, choice: Json, piece: Json) -> None:
        choice["text"].append(piece["text"])

    def _close(self, choice: Json) -> None:
        choice["text"] = "".join(choice["text"])

    def _prompt_logprobs(self, index: int, event: TokenEvent) -> Json:
        """Every token of the prompt. The first has no probability, because nothing precedes it."""
        assert event.prompt_logprobs is not None
        first, *others = self._echo[index].token_ids
        joined = self._token(index, first, None, None)
        for token_id, (logprob, top) in zip(others, event.prompt_logprobs, strict=True):
            token = TokenLogprob(token_id, logprob)
            _joined(joined, self._token(index, token_id, logprob, self._top(token, top)))
        return joined

    def _logprobs(self, index: int, event: TokenEvent) -> Json:
        assert event.token_id is not None and event.logprob is not None
        top = self._top(TokenLogprob(event.token_id, event.logprob), event.top_logprobs)
        return self._token(index, event.token_id, event.logprob, top)

    def _top(self, chosen: TokenLogprob, most_likely: Sequence[TokenLogprob]) -> dict[str, float]:
        top: dict[str, float] = {}
        # Different tokens can have the same text. The dictionary has one entry for them: the most likely one.
        for item in (chosen, *most_likely):
            text = token_text(self._model, item.token_id, prefix="bytes:")
            top[text] = max(top.get(text, LEAST_LOGPROB), item.logprob)
        return top

    def _token(self, index: int, token_id: int, logprob: float | None, top: dict[str, float] | None) -> Json:
        offset = self._offsets.setdefault(index, TextOffset(0))
        return {
            "tokens": [token_text(self._model, token_id, prefix="bytes:")],
            "token_logprobs": [logprob if logprob is None else max(logprob, LEAST_LOGPROB)],
            "top_logprobs": [top],
            "text_offset": [offset.advance(self._bytes_in_text(token_id))],
        }


class ChatShape(ReplyShape):
    """Answers of POST /v1/chat/completions.

    tool_names: the functions whose calls are parsed
    may_call_or_answer: a grammar allows nothing but calls or text of a form
    """

    def __init__(self, model: TextModel, tool_names: Sequence[str] = (), *, may_call_or_answer: bool = False) -> None:
        super().__init__(model, "chatcmpl", "chat.completion", "chat.completion.chunk")
        self._tool_names = tool_names
        self._may_answer = may_call_or_answer
        self._tools: dict[int, ToolDeltas] = {}

    def opening(self, num_choices: int) -> Iterator[Json]:
        for index in range(num_choices):
            if self._tool_names:
                self._tools[index] = ToolDeltas(
                    self._model.tool_format,
                    self._tool_names,
                    may_answer=self._may_answer,
                    has_short_ids=self._model.has_short_call_ids,
                )
            yield self._chunk(index, {"delta": {"role": "assistant", "content": "", "refusal": None}}, None, None)

    def pieces(self, index: int, event: TokenEvent) -> Iterator[Json]:
        logprobs = None if event.logprob is None else self._logprobs(event)
        tools = self._tools.get(index)
        deltas = [{"content": event.text}] if event.text else []
        if tools is not None:
            deltas = list(tools.of(event))
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield self._chunk(index, {"delta": delta}, logprobs, None)
            logprobs = None
        if event.finish_reason is not None:
            reason = event.finish_reason if tools is None else tools.finish_reason(event.finish_reason)
            yield self._chunk(index, {"delta": {}}, None, reason)

    def _opened(self, piece: Json) -> Json:
        message = {**piece["delta"], "content": [piece["delta"]["content"]]}
        return {"index": piece["index"], "message": message, "logprobs": None, "finish_reason": None}

    def _grow(self, choice: Json, piece: Json) -> None:
        message, delta = choice["message"], piece["delta"]
        message["content"].append(delta.get("content", ""))
        for part in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if part["index"] == len(calls):
                function = {"name": part["function"]["name"], "arguments": [part["function"]["arguments"]]}
                calls.append({"id": part["id"], "type": part["type"], "function": function})
            else:
                calls[part["index"]]["function"]["arguments"].append(part["function"]["arguments"])

    def _close(self, choice: Json) -> None:
        message = choice["message"]
        content, calls = "".join(message["content"]), message.get("tool_calls", ())
        for call in calls:
            call["function"]["arguments"] = "".join(call["function"]["arguments"])
        message["content"] = None if calls and not content else content

    def _logprobs(self, event: TokenEvent) -> Json:
        assert event.token_id is not None and event.logprob is not None
        entry = self._entry(TokenLogprob(event.token_id, event.logprob))
        entry["top_logprobs"] = [self._entry(item) for item in event.top_logprobs]
        return {"content": [entry], "refusal": None}

    def _entry(self, item: TokenLogprob) -> Json:
        spelled = self._model.token_bytes(item.token_id)
        return {
            "token": token_text(self._model, item.token_id),
            "logprob": max(item.logprob, LEAST_LOGPROB),
            "bytes": list(spelled) if spelled else None,
        }


class TextOffset:
    """Counts where each token begins in the text, in characters."""

    def __init__(self, start: int) -> None:
        self._num_chars = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, token: bytes) -> int:
        """The offset of `token`, which is added to the text."""
        offset = self._num_chars
        self._num_chars += len(self._decoder.decode(token))
        return offset


def token_text(model: TextModel, token_id: int, *, prefix: str = "") -> str:
    r"""A token as OpenAI writes it: text, a special token's name, or part of a character as escaped bytes.

    Escaped bytes look like `\xf0\x9f` and follow `prefix`: completions have `bytes:\xf0\x9f`.
    """
    spelled = model.token_bytes(token_id)
    try:
        return spelled.decode("utf-8") or model.token_text(token_id)
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in spelled)


def usage(choices: Choices) -> Json:
    """OpenAI's usage. A prompt counts once, even with several choices."""
    prompt, generated = choices.num_prompt_tokens, choices.num_generated_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": choices.num_cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": choices.num_accepted_tokens,
            "rejected_prediction_tokens": choices.num_rejected_tokens,
        },
    }


def model_object(name: str, created: int, max_len: int) -> Json:
    """One entry of GET /v1/models. Other servers have `max_model_len` too."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "headrace",
        "max_model_len": max_len,
    }


def _joined(left: Json | None, right: Json | None) -> Json | None:
    """The log-probabilities of two pieces of one choice. Extends the lists of `left`."""
    if left is None or right is None:
        return left or right
    for name, values in left.items():
        if values is not None:
            values.extend(right[name])
    return left
