"""The scheduler: one turn after another, who is read and who is decoded."""

import collections
import threading
from collections.abc import Callable, Sequence

from models.parameters import Params
from wavejax.engine.batching import continued_reading
from wavejax.engine.batching.admission import reused_by
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.kept_reading import KeptReading
from wavejax.engine.batching.line import Blocked, Line
from wavejax.engine.batching.pace import Pace, reads_whole
from wavejax.engine.batching.placing import Place, Placing
from wavejax.engine.batching.reading import Reading
from wavejax.engine.batching.request import FinishReason
from wavejax.engine.batching.rooms import Room
from wavejax.engine.batching.sharing import like, seat_beside
from wavejax.engine.batching.slot_reading import SlotReading
from wavejax.engine.batching.turn import read_all
from wavejax.engine.generator import Generator
from wavejax.engine.prompts import bucket

MARGIN = 0.9  # Of the time that streams may wait, what is planned with.


class Scheduler:
    """What `BatchEngine` does in its thread, turn after turn.

    One turn:

    1. Requests that nobody wants any more leave.
    2. Those in line take free slots, by the line's rule: one short prompt and one long one are read
       at a time.
    3. Each room's step is called, for all who sit there.
    4. Prompts are read, for as long as answers may wait.

    Args:
        generator, params, rooms, memory, reuse_slots, queue_limit, most_passes, steps, clock: as of
            `BatchEngine`.
        is_short: whether a prompt is short of which so many tokens are to be read.
        stall: seconds that answers may wait.
        lock: guards what `BatchEngine.submit` and `stats` see.
    """

    def __init__(
        self,
        generator: Generator,
        params: Params,
        rooms: Sequence[Room],
        *,
        memory: int | None,
        reuse_slots: bool,
        is_short: Callable[[int], bool],
        stall: float,
        queue_limit: int,
        most_passes: int,
        steps: int,
        clock: Callable[[], float],
        lock: threading.Condition,
    ):
        self.generator = generator
        self.batches = [Batch(generator, params, room, reuse_slots) for room in rooms]
        self.line = Line(queue_limit, most_passes)
        self.readings: dict[bool, SlotReading] = {}  # by whether its prompt is short
        self.running: set[Answer] = set()
        self.finished: collections.Counter[FinishReason] = collections.Counter()
        self.counts = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "decode_calls", "read_parts"), 0
        )
        self.longest_stall = 0.0
        self.pace, self.stall, self.clock = Pace(), stall, clock
        self._rooms, self._lock = Placing(self.batches, memory), lock
        self._reuse_slots, self._is_short = reuse_slots, is_short
        self.step_sizes = [2**i for i in range(steps.bit_length())]
        self._came: dict[int, float] = {}  # of each batch whose answers come, its last tokens
        self._short_first = True

    @property
    def busy(self) -> bool:
        """Whether anyone waits, is read or runs."""
        return bool(len(self.line) or self.readings or self.running)

    def turn(self) -> None:
        """Do one turn; see the class."""
        self._sweep()
        self._admit()
        self._decode()
        self._read()

    def end_all(self, reason: FinishReason, error: Exception | None) -> None:
        """End all requests, and gives all memory back."""
        reading = [one.answer for one in self.readings.values()]
        for answer in [*self.line, *reading, *self.running]:
            self._end(answer, reason, error)
        for batch in self.batches:
            batch.drop()

    def _sweep(self) -> None:
        """End those that nobody wants any more."""
        reading = [one.answer for one in self.readings.values()]
        for answer in [*self.line, *reading, *self.running]:
            if answer.channel.cancelled:
                self._end(answer, "interrupted")

    def _admit(self) -> None:
        """Begin to read those in line whose turn it is."""
        while True:
            waited = self.batches if len(self.line) else ()  # before the lock is taken
            for batch, error in continued_reading.wait_for_ended(waited):
                self._fail_batch(batch, error)
            with self._lock:
                self._tell_short()
                taken = self.line.take(self._place)
                if taken is None:
                    return
                answer, (batch, slot) = taken
                self.readings[answer.short] = self._reading(batch, slot, answer)
            answer.started = self.clock()
            try:
                self._rooms.allocate(batch)
                self.readings[answer.short].prepare()
            except Exception as error:  # memory that the planner knew nothing of
                self._fail(batch, answer, error)

    def _tell_short(self) -> None:
        """Say anew who in line is short: a long conversation's next turn is, if it adds little."""
        if not self._reuse_slots:
            return
        for answer in self.line:
            continued = continued_reading.slot_to_continue(self.batches, answer)
            saved = max(continued[0] if continued else 0, reused_by(answer.request))
            answer.short = self._is_short(answer.prompt_tokens - saved)

    def _place(self, answer: Answer) -> Place | Blocked:
        """Find a request its slot, or say why there is none now."""
        return "reading" if answer.short in self.readings else self._rooms.place(answer)

    def _reading(self, batch: Batch, slot: int, answer: Answer) -> SlotReading:
        """Choose how a prompt gets into its slot."""
        held = batch.ended.get(slot)
        if held is not None and (reused := held.reused(answer.request)):
            free = held.free_after(reused)
            return continued_reading.ContinuedReading(batch, slot, answer, reused, free)
        if answer.request.kept is not None:
            return KeptReading(batch, slot, answer)
        padded, config = bucket(answer.prompt_tokens), self.generator.model_config
        whole = reads_whole(self.pace, config, padded, self.stall / 2)
        return Reading(batch, slot, answer, whole)

    def _decode(self) -> None:
        """Call each room's step, and hand tokens out: a call behind, while nothing is read."""
        for batch in self.batches:
            # A prompt's parts are timed, so the device must have nothing else to do.
            behind = not self.readings and not batch.waits_for_tokens
            if batch.waits_for_tokens:
                self._collect(batch, 0)
            if batch.answers:
                try:
                    # Not while parts of prompts are timed: the step would run on amid them.
                    if batch.begins_answers and batch.draws_ahead and not self.readings:
                        self._collect(batch, 0)
                        self._count(batch.draw_ahead(self.clock))
                        self._note_tokens(batch)
                    ended = batch.dispatch(self._steps_of(batch), self.clock)
                except Exception as error:
                    self._fail_batch(batch, error)
                    continue
                self._count(ended)
            self._collect(batch, 1 if behind else 0)

    def _note_tokens(self, batch: Batch) -> None:
        """Note that a room's answers have got tokens just now."""
        now, last = self.clock(), self._came.get(id(batch))
        if last is not None:
            with self._lock:
                self.longest_stall = max(self.longest_stall, now - last)
        self._came[id(batch)] = now

    def _collect(self, batch: Batch, left: int) -> None:
        """Hand the tokens of a room's calls out, but for the newest `left` while anyone sits."""
        while len(batch.calls) > (left if batch.answers else 0):
            call, last = batch.calls[0], self._came.get(id(batch))
            try:
                ended = batch.collect(self.clock)
            except Exception as error:
                self._fail_batch(batch, error)
                return
            now = self.clock()
            began = call.at if last is None else max(call.at, last)
            self.pace.note(call.key, call.steps, now - began)
            with self._lock:
                self.counts["decode_calls"] += 1
            if any(seat is not None for seat in call.seats):
                self._note_tokens(batch)
            self._count(ended)
        if not batch.answers:
            self._came.pop(id(batch), None)

    def _count(self, ended: Sequence[Answer]) -> None:
        for answer in ended:
            assert answer.reason is not None
            self._finish(answer, answer.reason)

    def _steps_of(self, batch: Batch) -> int:
        """Choose the steps of the next call: one for a first token, else as many as time allows.

        A power of two: of how many tokens are taken out of a call's result is a tiny program.
        """
        if batch.begins_answers:
            return 1
        left = max((answer.left for answer in batch.answers), default=1)
        steps = next((n for n in self.step_sizes if n >= left), self.step_sizes[-1])
        each = self.pace.seconds(batch.key)
        if each is None:
            return steps
        seconds = self.stall * (0.5 if self.readings or len(self.line) else MARGIN)
        return max(n for n in self.step_sizes if n == 1 or (n <= steps and n * each <= seconds))

    def _read(self) -> None:
        """Read prompts, for as long as answers may wait; short ones one after another."""
        seconds, start = self.stall * MARGIN, self.clock()
        for batch in self.batches:
            if batch.answers:
                seconds -= self._steps_of(batch) * (self.pace.seconds(batch.key) or 0.0)
        while self.readings:
            left = max(0.0, start + seconds - self.clock())
            readings = [self.readings[key] for key in sorted(self.readings)]
            if self._short_first:
                readings.reverse()
            self._short_first = not self._short_first
            for one in readings:
                one.alone = len(readings) == 1 and not len(self.line)
            parts = read_all(readings, left, self.pace, self.clock)
            with self._lock:
                self.counts["read_parts"] += parts
            done = [one for one in readings if one.done]
            for reading in done:
                self._seated(reading)
            if not done or self.clock() >= start + seconds:
                return
            self._admit()

    def _seated(self, reading: SlotReading) -> None:
        """Let the answers run whose prompt has been read; end the one that failed to read it."""
        batch, answer = reading.batch, reading.answer
        if reading.error is not None:
            self._fail(batch, answer, reading.error)
            return
        answer.read = self.clock()
        with self._lock:
            self.readings.pop(answer.short)
            others = like(reading, self.line)
            for other in others:
                self.line.remove(other)
            self.running.update((answer, *others))
            self.counts["prompt_tokens"] += answer.prompt_tokens * (1 + len(others))
        for other, error in seat_beside(batch, reading.slot, others, self.clock()):
            self._fail(batch, other, error)

    def _fail(self, batch: Batch, answer: Answer, error: Exception) -> None:
        """End an answer whose slot could not be filled; the others if their state is lost."""
        self._end(answer, "error", error)
        if batch.lost:
            self._fail_batch(batch, error)

    def _fail_batch(self, batch: Batch, error: Exception) -> None:
        """End all whose state is lost."""
        called = {one for call in batch.calls for one in call.seats if one is not None}
        reading = {one.answer for one in self.readings.values() if one.batch is batch}
        for answer in {*batch.answers, *called} & self.running | reading:
            self._end(answer, "error", error)
        # Those that ended meanwhile sit nowhere any more.
        self._count([answer for answer in self.running if answer.has_ended()])
        batch.drop()
        self._came.pop(id(batch), None)

    def _end(self, answer: Answer, reason: FinishReason, error: Exception | None = None) -> None:
        """End an answer, wherever it is: in line, being read, or running."""
        reading = self.readings.get(answer.short)
        if reading is not None and reading.answer is answer:
            reading.abandon()
        for batch in self.batches:
            batch.leave(answer)
        self._finish(answer, reason)
        answer.end(reason, self.clock(), error)

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        """Count an answer's end: it is in none of the places any more."""
        with self._lock:
            if answer in self.line:
                self.line.remove(answer)
            reading = self.readings.get(answer.short)
            if reading is not None and reading.answer is answer:
                del self.readings[answer.short]
            self.running.discard(answer)
            self.finished[reason] += 1
            self.counts["generated_tokens"] += answer.tokens
