"""The choices of one HTTP request: submitted all or none, merged, cancelled when the client goes.

Knows the model's `generate` and the client's socket, nothing of JSON. There is one way to generate: a stream
is what `Choices` yields, and a whole reply is a fold over the same.
"""

import select
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from runtime.core import DEFAULT_OPTIONS, FinishReason, RequestOptions, SamplingParams, TokenEvent
from runtime.engine.generation import Generation
from runtime.errors import (
    EngineFailed,
    HeadraceError,
    InvalidRequest,
    TimedOut,
    Unavailable,
)
from runtime.text_model import TextModel

CLIENT_CHECK_S = 0.25
"""How often the socket is looked at: bounds how long a slot stays taken by a client that went away."""
ROTATE_S = 0.05
"""With several choices: how long to wait for one before trying the next."""


FAILURES: dict[FinishReason, tuple[type[HeadraceError], str]] = {
    FinishReason.ERROR: (EngineFailed, "the engine stopped"),
    FinishReason.CANCELLED: (Unavailable, "the server is stopping and did not finish this request"),
    FinishReason.TIMEOUT: (TimedOut, "the request's time was up"),
    FinishReason.QUEUE_TIMEOUT: (Unavailable, "no slot was free in time"),
}
"""What the client is told of an end without an answer, where the engine gave no reason."""


class ChoiceEvent(NamedTuple):
    """A token event and the index of the choice it belongs to."""

    choice_idx: int
    event: TokenEvent


class Client:
    """The client's end of the connection, as far as gunicorn lets us see it.

    The kernel says when the client closed or at least shut down its side, also behind bytes that nobody has read; as
    in other servers either counts as gone. Without a socket (Flask's test client) nobody ever goes.
    """

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection
        self._next_look = time.monotonic() + CLIENT_CHECK_S

    def check(self) -> None:
        """Raise ClientGoneError if the client went away; looks at most every CLIENT_CHECK_S seconds."""
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
    # POLLHUP, POLLERR and POLLNVAL come unasked. What the client may have sent besides is not looked at.
    return bool(poller.poll(0))


class Choices:
    """Running generations of one request. Iterate to get their events; `close` cancels what still runs."""

    def __init__(self, generations: Sequence[Generation], num_prompts: int, client: Client) -> None:
        self._generations = generations
        self._client = client
        per_prompt = len(generations) // num_prompts
        self.num_prompt_tokens = sum(generation.prompt_tokens for generation in generations[::per_prompt])
        self.num_generated_tokens = 0
        self.first_token_s: float | None = None
        """When the first token came, in seconds of `time.monotonic`."""
        self._per_prompt = per_prompt
        self._abort_reason: HeadraceError | None = None
        self._events = self._checked()
        self._waited_for: list[ChoiceEvent] = []

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; a prompt counts once, as its first choice met it."""
        return sum(generation.usage.num_cached for generation in self._generations[:: self._per_prompt])

    @property
    def num_accepted_tokens(self) -> int:
        """Drafted tokens that were right, over all choices."""
        return sum(generation.usage.num_accepted for generation in self._generations)

    @property
    def num_rejected_tokens(self) -> int:
        """Drafted tokens that were wrong."""
        return sum(generation.usage.num_drafted for generation in self._generations) - self.num_accepted_tokens

    def __len__(self) -> int:
        return len(self._generations)

    def wait_for_first(self) -> None:
        """Wait until there is an event. Raises what iterating raises: here it can still become an HTTP status."""
        self._waited_for += islice(self._events, 1)

    def __iter__(self) -> Iterator[ChoiceEvent]:
        """Events in the order they come, until every choice has ended. Once only.

        Raises EngineFailed, InvalidRequest (a constraint turned out to be too complex), TimedOut, ClientGoneError or
        Unavailable (the server gave up on the request as it drained, or had no slot for it in time), or what `abort`
        was given; in each case, and when the iterator is closed early, the other choices are cancelled.
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
        """Cancel every choice that still runs, from any thread; who iterates gets this reason."""
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
    """Submit one generation per prompt and parameters, in that order; every prompt has as many choices. Each ends with
    its first call of one of the functions `one_call_of`.

    Raises what `TextModel.generate` raises; nothing of this request is left in the engine then.
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
    """Events of several generations without a thread for each.

    Every running request gets a token in the same step, so it is enough to block on one that runs and then
    to collect from the rest; one that yields nothing for ROTATE_S is probably still queued, and the next is
    tried.
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
    """What has already arrived, without waiting."""
    while (event := generation.next_event(0)) is not None:
        yield event
        if event.finish_reason is not None:
            return


class ClientGoneError(Exception):
    """The client closed its connection before the reply was whole; nobody reads the answer to this."""
