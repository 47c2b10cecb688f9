"""The choices of one HTTP request: submitted together, merged into one stream, cancelled when the client goes.

Knows the model's `generate` and the client's socket, nothing of JSON. There is one way to generate: a stream is what
`Choices` yields, and a whole reply is a fold over it.
"""

import select
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from runtime.core import DEFAULT_OPTIONS, FinishReason, RequestOptions, SamplingParams, TokenEvent
from runtime.engine.generation import Generation
from runtime.errors import EngineFailed, HeadraceError, InvalidRequest, TimedOut, Unavailable
from runtime.text_model import TextModel

CLIENT_CHECK_S = 0.25
"""How often the socket is checked. Bounds how long a lost client keeps its slot."""
ROTATE_S = 0.05
"""With several choices: how long to wait for one choice before trying the next."""

FAILURES: dict[FinishReason, tuple[type[HeadraceError], str]] = {
    FinishReason.ERROR: (EngineFailed, "the engine stopped"),
    FinishReason.CANCELLED: (Unavailable, "the server is stopping and did not finish this request"),
    FinishReason.TIMEOUT: (TimedOut, "the request's time was up"),
    FinishReason.QUEUE_TIMEOUT: (Unavailable, "no slot was free in time"),
}
"""The error for each way to end without an answer. The message is used if the engine gave none."""


class ClientGoneError(Exception):
    """The client closed its connection before the reply was complete. Nobody reads the answer to this error."""


class ChoiceEvent(NamedTuple):
    """A token event and the index of the choice it belongs to."""

    choice_idx: int
    event: TokenEvent


class Client:
    """The client's end of the connection.

    A client that closed its connection, or shut down its sending side, counts as gone, as in other servers. The kernel
    reports this even while there are unread bytes. Without a socket (Flask's test client) the client never goes.
    """

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection
        self._next_look = time.monotonic() + CLIENT_CHECK_S

    def check(self) -> None:
        """Raise ClientGoneError if the client is gone. Checks at most every CLIENT_CHECK_S seconds."""
        if self._connection is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + CLIENT_CHECK_S
            if _is_closed(self._connection):
                raise ClientGoneError("the client closed the connection")


def _is_closed(connection: socket.socket) -> bool:
    poller = select.poll()
    try:
        poller.register(connection, select.POLLRDHUP)
    except ValueError:  # closed on our side
        return True
    # poll reports POLLHUP, POLLERR and POLLNVAL in any case.
    return bool(poller.poll(0))


class Choices:
    """The generations of one request. Iterate to get their events; `close` cancels those that still run."""

    def __init__(self, generations: Sequence[Generation], num_prompts: int, client: Client) -> None:
        self._generations = generations
        self._client = client
        per_prompt = len(generations) // num_prompts
        self.num_prompt_tokens = sum(generation.prompt_tokens for generation in generations[::per_prompt])
        self.num_generated_tokens = 0
        self.first_token_s: float | None = None
        """When the first token came, by `time.monotonic`."""
        self._per_prompt = per_prompt
        self._abort_reason: HeadraceError | None = None
        self._events = self._checked()
        self._waited_for: list[ChoiceEvent] = []

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache. A prompt counts once, with the figure of its first choice."""
        return sum(generation.usage.num_cached for generation in self._generations[:: self._per_prompt])

    @property
    def num_accepted_tokens(self) -> int:
        """Draft tokens that were accepted, over all choices."""
        return sum(generation.usage.num_accepted for generation in self._generations)

    @property
    def num_rejected_tokens(self) -> int:
        """Draft tokens that were rejected, over all choices."""
        return sum(generation.usage.num_drafted for generation in self._generations) - self.num_accepted_tokens

    def __len__(self) -> int:
        return len(self._generations)

    def wait_for_first(self) -> None:
        """Wait for the first event. Raises what iterating raises, while it can still become an HTTP status."""
        self._waited_for += islice(self._events, 1)

    def __iter__(self) -> Iterator[ChoiceEvent]:
        """The events in the order they arrive, until every choice has ended. Can be iterated once.

        Raises EngineFailed, InvalidRequest (a constraint turned out to be too complex), TimedOut, ClientGoneError,
        Unavailable (the server drains, or no slot came free in time), or the reason given to `abort`. An error, and
        closing the iterator early, cancels the other choices.
        """
        return chain(self._waited_for, self._events)

    def _checked(self) -> Iterator[ChoiceEvent]:
        try:
            for item in _merge(self._generations, self._client):
                event = item.event
                if event.finish_reason is FinishReason.ERROR and event.error_param is not None:
                    raise InvalidRequest(event.error or "", param=event.error_param)
                if event.finish_reason in FAILURES and self._abort_reason is not None:
                    raise self._abort_reason
                if event.finish_reason in FAILURES:
                    failure, message = FAILURES[event.finish_reason]
                    raise failure(event.error or message)
                if event.token_id is not None:
                    self.num_generated_tokens += 1
                    self.first_token_s = self.first_token_s or time.monotonic()
                yield item
        finally:
            self.close()

    def abort(self, reason: HeadraceError) -> None:
        """Cancel every choice that still runs, from any thread. Iterating then raises `reason`."""
        self._abort_reason = reason
        self.close()

    def close(self) -> None:
        """Cancel every choice that still runs. Idempotent."""
        for generation in self._generations:
            generation.close()


def submit(
    model: TextModel,
    prompts: Sequence[tuple[list[int], Sequence[SamplingParams]]],
    client: Client,
    *,
    options: RequestOptions = DEFAULT_OPTIONS,
    one_call_of: Collection[str] = (),
) -> Choices:
    """Submit a generation for each prompt and each of its parameters; every prompt has equally many.

    A generation ends with its first call of a function in `one_call_of`. Raises what `TextModel.generate` raises; then
    nothing of this request is left in the engine.
    """
    generations: list[Generation] = []
    try:
        for prompt_ids, choices in prompts:
            for params in choices:
                generations.append(model.generate(prompt_ids, params, options=options, one_call_of=one_call_of))
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    return Choices(generations, len(prompts), client)


def _merge(generations: Sequence[Generation], client: Client) -> Iterator[ChoiceEvent]:
    """The events of several generations, without a thread for each.

    Every running request gets its token in the same step. So this waits for one running generation and then collects
    from the rest. A generation without an event for ROTATE_S is probably still queued; then the next one is tried.
    """
    live = dict(enumerate(generations))
    watched = 0
    while live:
        event = live[watched].next_event(CLIENT_CHECK_S if len(live) == 1 else ROTATE_S)
        client.check()
        news = [] if event is None else [ChoiceEvent(watched, event)]
        if news:
            others = (index for index in live if index != watched)
            news += [ChoiceEvent(index, event) for index in others for event in _ready(live[index])]
        for item in news:
            yield item
            if item.event.finish_reason is not None:
                del live[item.choice_idx]
        if live and (event is None or watched not in live):
            watched = min((index for index in live if index > watched), default=min(live))


def _ready(generation: Generation) -> Iterator[TokenEvent]:
    """The events that have already arrived."""
    while (event := generation.next_event(0)) is not None:
        yield event
        if event.finish_reason is not None:
            return
