"""The client's side of a request: its events in the order in which they come."""

import queue
from collections.abc import Iterator
from types import TracebackType

from runtime.core import TokenEvent, Usage
from runtime.engine.thread import EngineThread


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
