"""The two ends of a request: the engine's, and the one that its reader holds."""

import queue
import threading
import time
from collections.abc import Callable, Iterator

from wavejax.engine.batching.request import Completion, Event, Piece, Request, completion_of


class Channel:
    """The engine's end: takes events, and says whether the reader has gone.

    It knows no `Handle`, so that a handle that nobody holds is deleted, and cancels.

    Args:
        on_event: called for each event, in the engine's thread; None keeps them for iteration.
            One that raises counts as a reader that has gone: it is not called again.
    """

    def __init__(self, on_event: Callable[[Event], None] | None = None):
        self._on_event = on_event
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.cancelled = self._gone = False
        self.wake: Callable[[], None] = lambda: None

    def put(self, event: Event) -> None:
        """Hand an event to the reader."""
        last = isinstance(event, Piece) and event.finish_reason is not None
        if last:
            # Before the reader hears of it: who asks then is told so.
            self.ended.set()
        if self._on_event is None:
            self.events.put(event)
        elif not self._gone:
            try:
                self._on_event(event)
            except Exception:  # whatever a reader does is no concern of the other requests
                self._gone = self.cancelled = True

    def cancel(self) -> None:
        """Say that nobody wants the answer any more."""
        if not self.cancelled and not self.ended.is_set():
            self.cancelled = True
            self.wake()


class Handle:
    """A request that was taken: its answer as it comes. One reader at a time.

    A handle that is dropped before its end cancels its request.

    Attributes:
        id: its number, from 0, in the order of `submit`.
        request: as it was checked.
    """

    def __init__(self, number: int, request: Request, channel: Channel):
        self.id, self.request = number, request
        self._channel = channel
        self._pieces: list[Piece] = []

    @property
    def done(self) -> bool:
        """Whether the answer has ended, read or not."""
        return self._channel.ended.is_set()

    def cancel(self) -> None:
        """End the answer; from any thread. Its last piece says "interrupted"."""
        self._channel.cancel()

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield events as they come, to the last piece. Not with `on_event`.

        Args:
            timeout: seconds to wait for each; None: any time.

        Raises:
            TimeoutError: none came in time.
        """
        while not (self._pieces and self._pieces[-1].finish_reason):
            try:
                event = self._channel.events.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"request {self.id}: nothing came in {timeout} s") from None
            if isinstance(event, Piece):
                self._pieces.append(event)
            yield event

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces as they come."""
        for event in self.events():
            if isinstance(event, Piece):
                yield event

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end, and return the whole answer.

        Args:
            timeout: seconds; None: any time.

        Raises:
            TimeoutError: the answer has not ended in time. It goes on.
            Exception: the request's own error.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (self._pieces and self._pieces[-1].finish_reason):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            next(self.events(left), None)
        return completion_of(self._pieces)

    def __del__(self) -> None:
        self.cancel()
