"""The engine: takes requests in any thread, and answers them in one of its own."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from models.errors import InputError
from models.parameters import Params
from models.text.tokenizer import Tokenizer
from wavejax.engine.batching.admission import check_room, reused_by
from wavejax.engine.batching.answer import Answer, decoder_of
from wavejax.engine.batching.handle import Channel, Handle
from wavejax.engine.batching.request import EngineClosed, Event, Request
from wavejax.engine.batching.rooms import Room, as_rooms, check_context
from wavejax.engine.batching.scheduler import Scheduler
from wavejax.engine.batching.stats import Stats, held_by
from wavejax.engine.batching.warmup import warm
from wavejax.engine.checks import real_number, whole_number
from wavejax.engine.generator import Generator
from wavejax.engine.modes import own_modes
from wavejax.engine.prompts import bucket
from wavejax.engine.sampling import Sampler
from wavejax.engine.state_checks import check_params


class BatchEngine:
    """Answers requests side by side: each joins and leaves between calls of one compiled step.

    A request gets the tokens that `Generator` gives it alone, whoever joins or leaves. Prompts are
    read in parts between the calls, so that answers that come never wait long.

    It works in a thread of its own, from `start` to `close`, or within a `with` block.

    Args:
        generator: model, attention, and the stop tokens of requests that name none.
        params: the model's parameters.
        rooms: the sizes of slots. A request goes to the smallest that holds it. One room is one
            compiled step; sequences of two rooms are decoded in turns.
        tokenizer: makes text of tokens; None gives pieces without text, and takes no stop strings.
        max_context: the most tokens of a request, prompt and answer; None: as the model has it.
        memory: bytes that the rooms' states may take together; None: as many as all take. A room
            has memory from its first request on, and gives it back when idle and another needs it.
        reuse_slots: whether a prompt that begins with what a free slot still holds goes on from
            there, as `Generator.append` does: a chat's next turn costs its own tokens. A request
            then gets what its conversation gives, not what it gets alone.
        max_stall_ms: the longest that an answer waits from one call's tokens to the next one's
            while prompts are read. What compiles meanwhile takes longer: see `warmup`.
        queue_limit: the most requests that wait.
        short_tokens: prompts of up to this number of tokens are short: they need not wait for a
            long prompt that is being read (`line.Line`).
        most_passes: how many short requests may pass one that waits for a slot.
        steps: the most tokens of an answer in one call of the step; rounded down to a power of two.
        clock: seconds, rising.

    Raises:
        InputError: an argument is none that can be used.
    """

    def __init__(
        self,
        generator: Generator,
        params: Params,
        rooms: Sequence[Room],
        *,
        tokenizer: Tokenizer | None = None,
        max_context: int | None = None,
        memory: int | None = None,
        reuse_slots: bool = False,
        max_stall_ms: float = 250.0,
        queue_limit: int = 64,
        short_tokens: int = 2048,
        most_passes: int = 8,
        steps: int = 8,
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_params(params, generator.model_config)
        stall = real_number("`max_stall_ms`", max_stall_ms)
        if not 0 < stall < float("inf"):
            raise InputError(f"`max_stall_ms` is {max_stall_ms}; it must be above 0")
        self.rooms = as_rooms(rooms)
        context = generator.model_config.max_context if max_context is None else max_context
        self.max_context = whole_number("`max_context`", context, 1)
        self._memory = None if memory is None else whole_number("`memory`", memory, 0)
        self.stop_tokens = generator.stop_tokens
        self._short = bucket(whole_number("`short_tokens`", short_tokens, 1))
        self._tokenizer, self._clock = tokenizer, clock
        # Each request has its own stop tokens, which the host looks for.
        generator = dataclasses.replace(generator, stop_tokens=(), sampler=Sampler())
        self._generator, self._params = generator, params
        self._changed = threading.Condition()  # its lock guards all that follows
        self._scheduler = Scheduler(
            generator,
            params,
            self.rooms,
            memory=self._memory,
            reuse_slots=reuse_slots,
            is_short=self._is_short,
            stall=stall / 1000,
            queue_limit=whole_number("`queue_limit`", queue_limit, 1),
            most_passes=whole_number("`most_passes`", most_passes, 0),
            steps=whole_number("`steps`", steps, 1),
            clock=clock,
            lock=self._changed,
        )
        self._submitted = self._refused = 0
        self._draining = self._closing = False
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Handle:
        """Take a request; from any thread. Returns at once.

        Keep the handle: one that is dropped before the end cancels its request.

        Args:
            request: what to answer.
            on_event: called for each event, in the engine's thread; None: read the handle. It must
                return soon: all requests wait for it.

        Raises:
            InputError: a number is none that can be used, or the request fits no room that there
                can be; with both numbers.
            QueueFull: no more requests can wait.
            EngineClosed: it drains, was closed, or has failed.
        """
        with self._changed:
            try:
                return self._submit(request, on_event)
            except Exception:
                self._refused += 1
                raise

    def _submit(self, request: Request, on_event: Callable[[Event], None] | None) -> Handle:
        if self._draining or self._closing or self.failure is not None:
            state = "drains" if self._draining and not self._closing else "is closed"
            raise EngineClosed(f"the engine {state}, and takes no more requests")
        if not isinstance(request, Request):
            raise InputError(f"the request is of type {type(request).__name__}; give a Request")
        model, attention = self._generator.model_config, self._generator.attention
        request = request.checked(model.vocab_size, self.stop_tokens, attention)
        if request.stop and self._tokenizer is None:
            raise InputError("stop texts need a tokenizer: give the engine one, or `stop_tokens`")
        prompt_tokens = len(request.prompt)
        check_context(self.max_context, prompt_tokens, request.max_new_tokens)
        check_room(request, attention, self.rooms, self._memory)
        channel = Channel(on_event)
        channel.wake = self._wake
        answer = Answer(
            self._submitted,
            request,
            channel,
            self._clock(),
            self._is_short(prompt_tokens - reused_by(request)),
            decoder_of(self._tokenizer, request),
        )
        self._scheduler.line.push(answer)
        self._submitted += 1
        self._changed.notify_all()
        return Handle(answer.number, request, channel)

    def _is_short(self, tokens: int) -> bool:
        """Tell whether a prompt is short of which so many tokens are to be read."""
        return bucket(tokens) <= self._short

    def start(self) -> "BatchEngine":
        """Begin to work, in a thread of its own; of no effect if it does."""
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine is closed, and cannot be started again")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="wavejax-engine", daemon=True
                )
                self._thread.start()
        return self

    def turn(self) -> bool:
        """Do one turn of the work in this thread: for engines that were not started.

        Returns:
            whether there is more to do.
        """
        with own_modes():
            self._scheduler.turn()
        return self._scheduler.busy

    def warmup(
        self,
        samplers: Sequence[Sampler] = (Sampler(),),
        prompt_tokens: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
        appended: bool = False,
    ) -> None:
        """Compile ahead, and measure how long prompts take to read; before `start`.

        Args:
            samplers: what requests will be drawn by: whether any draws at random, ranks tokens, or
                penalises. Each kind is a program; other numbers are not.
            prompt_tokens: lengths to read prompts of; None: all that have programs of their own.
            progress: called with (programs' runs done, in all).
            appended: whether prompts will go on from what was kept, or what a slot holds.

        Raises:
            EngineClosed: it was started.
        """
        if self._thread is not None or self._closing:
            raise EngineClosed("the engine works already: `warmup` comes before `start`")
        with own_modes():
            warm(self._scheduler, samplers, prompt_tokens, progress, appended)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for all to end.

        Args:
            timeout: seconds; None: any time.

        Returns:
            whether all have ended.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            return (
                self._changed.wait_for(lambda: not self._scheduler.busy or not self.alive, timeout)
                and not self._scheduler.busy
            )

    def close(self) -> None:
        """End all requests as "interrupted", and the thread. May be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            self._scheduler.end_all("interrupted", None)
        elif thread is not threading.current_thread():
            thread.join()

    @property
    def alive(self) -> bool:
        """Whether its thread works. `failure` says why not, if it failed."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    @property
    def generator(self) -> Generator:
        """What generates: documents that requests go on from are to be loaded for it."""
        return self._generator

    def stats(self) -> Stats:
        """Return what it has done so far, and does; from any thread."""
        with self._changed:
            scheduler = self._scheduler
            return Stats(
                submitted=self._submitted,
                refused=self._refused,
                finished=dict(scheduler.finished),
                waiting=len(scheduler.line),
                reading=len(scheduler.readings),
                running=len(scheduler.running),
                longest_stall_seconds=scheduler.longest_stall,
                **held_by(scheduler.batches, scheduler.readings.values(), scheduler.running),
                **scheduler.counts,
            )

    def __enter__(self) -> "BatchEngine":
        return self.start()

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with own_modes():
                while self._wait():
                    self._scheduler.turn()
        except BaseException as error:
            with self._changed:  # no request is taken after it
                self.failure = error
        finally:
            failure = self.failure
            if failure is None or isinstance(failure, Exception):
                self._scheduler.end_all("interrupted" if failure is None else "error", failure)
            else:
                self._scheduler.end_all("interrupted", None)
            self._wake()

    def _wait(self) -> bool:
        """Wait for work; False when the engine is to end."""
        with self._changed:
            if not self._scheduler.busy:
                self._changed.notify_all()  # who drains
            self._changed.wait_for(lambda: self._closing or self._scheduler.busy)
            return not self._closing
