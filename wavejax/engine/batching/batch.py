"""One room's slots: their state, who sits where, and calls of the compiled step."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from models.parameters import Params
from wavejax.engine import penalties, slots
from wavejax.engine.batching import watching
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.call import Call, hand_out
from wavejax.engine.batching.drawing import Drawing
from wavejax.engine.batching.ended import Ended, ended
from wavejax.engine.batching.levels import Level, level_of
from wavejax.engine.batching.reads import begin_reads, copy_counters, reads_in
from wavejax.engine.batching.rooms import Room
from wavejax.engine.batching.tolerances import begin_slot, copy_log, met_in
from wavejax.engine.generator import Generator
from wavejax.engine.sampling import Sampler
from wavejax.engine.state import DecodeState, was_donated


class Batch:
    """Slots of one room. A slot is free, kept for a prompt that is being read, or has an answer.

    Args:
        generator: what generates.
        params: the model's parameters.
        room: the slots' size, and how many there are.
        reuse_slots: whether what free slots hold is noted, for prompts that begin with it.
    """

    def __init__(self, generator: Generator, params: Params, room: Room, reuse_slots: bool = False):
        self.generator, self.params, self.room = generator, params, room
        self._reuse_slots, self._have_left = reuse_slots, 0
        self.ended: dict[int, Ended] = {}  # by slot, of free ones
        self.engine = generator.engine
        self.state: DecodeState | None = None
        self.seats: list[Answer | None] = [None] * room.slots
        self.kept: set[int] = set()
        self.calls: list[Call] = []
        self._to_release: set[int] = set()
        self._drawn: Array | None = None  # the next step's tokens, if they were handed out
        self._drawing = Drawing(self.engine)
        self._level = Level()
        self._samplers: list[Sampler] = []

    @property
    def answers(self) -> list[Answer]:
        """Who sits in a slot and wants more steps."""
        return [answer for answer in self.seats if answer is not None]

    @property
    def idle(self) -> bool:
        """Whether nobody sits here, nobody is to, and no call is under way."""
        return not (self.answers or self.kept or self.calls)

    @property
    def key(self) -> Hashable:
        """The kind of the next call: those of a kind take about as long a step."""
        watched = any(answer.watched for answer in self.answers)
        return "decode", self.room, self._level, watched

    @property
    def lost(self) -> bool:
        """Whether the state was given to a call that failed."""
        return was_donated(self.state and self.engine.arrays_of(self.state.attention_state))

    def allocate(self) -> None:
        """Make the state, if there is none."""
        if self.state is None:
            room, dtype = self.room, self.params["params"]["embedding"].dtype
            sizes = room.slots, room.prompt_tokens, room.new_tokens
            self._level, self._samplers = Level(), []
            self.state = slots.allocate(self.engine, *sizes, dtype, [])

    def drop(self) -> None:
        """Give the state's memory back."""
        self.state = self._drawn = None
        self._drawing.forget()
        self.ended.clear()
        self.calls.clear()
        self._to_release.clear()

    def free_slots(self) -> list[int]:
        """List the slots that a prompt may take, those first that no prompt goes on from soon."""
        free = [
            slot
            for slot, answer in enumerate(self.seats)
            if answer is None and slot not in self.kept
        ]

        def number(slot: int) -> int:
            held = self.ended.get(slot)
            return 0 if held is None or held.unusable else held.number

        return sorted(free, key=number)

    def keep(self, slot: int) -> None:
        """Keep a slot for a prompt: nothing goes on from what it holds."""
        self.kept.add(slot)
        self.ended.pop(slot, None)

    def seat(self, slot: int, answer: Answer) -> None:
        """Begin an answer in a slot whose prompt has been read."""
        request: Any = answer.request
        self.kept.discard(slot)
        self.ended.pop(slot, None)
        self._to_release.discard(slot)
        self.seats[slot] = answer
        self._set_sampling()
        state, vocab = self.whole_state, self._vocab
        rows: dict[str, Any] = {name: getattr(state, name) for name in _ROWS}
        row: dict[str, Any] = {
            "finished": np.zeros(1, bool),
            "seed": np.asarray([request.seed], np.int32),
            "step": np.zeros(1, np.int32),
            "sequences": np.asarray([request.sequence], np.int32),
            "nonfinite": np.zeros(1, bool),
            "counts": state.counts and penalties.count_prompts([request.prompt], vocab),
        }
        state = dataclasses.replace(state, **_set_row(rows, np.int32(slot), row))
        state = begin_slot(state, slot, request.tolerance, self.engine.attention)
        self.state = begin_reads(state, slot)
        answer.met = lambda: met_in(copy_log(self.state), slot)
        answer.reads = lambda: reads_in(copy_counters(self.state, slot))

    def leave(self, answer: Answer) -> None:
        """Free an answer's slot: before the next call."""
        for slot, sitting in enumerate(self.seats):
            if sitting is answer:
                if not answer.has_ended():  # the slot's next one counts anew, and may come first
                    answer.met = functools.partial(met_in, copy_log(self.state), slot)
                    answer.reads = functools.partial(reads_in, copy_counters(self.state, slot))
                self.seats[slot] = None
                self._to_release.add(slot)
                self._note_ended(slot, answer)

    def _note_ended(self, slot: int, answer: Answer) -> None:
        if not self._reuse_slots:
            return
        self._have_left += 1
        left = ended(self.engine, self.state, slot, answer, self._have_left)
        if left is not None:
            self.ended[slot] = left

    @property
    def waits_for_tokens(self) -> bool:
        """Whether a call's tokens must be known before the next: someone has a constraint."""
        return any(answer.request.constraint is not None for answer in self.answers)

    @property
    def begins_answers(self) -> bool:
        """Whether someone waits for a first token."""
        return any(answer.dispatched == 0 for answer in self.answers)

    @property
    def draws_ahead(self) -> bool:
        """Whether `draw_ahead` can be called: nobody's logits are looked at by the host."""
        return self.engine.draws_ahead and not any(answer.watched for answer in self.answers)

    def draw_behind(self) -> None:
        """Begin to draw what `draw_ahead` gives, if nothing changes until then; does not wait."""
        if self.draws_ahead:
            self._drawing.behind(self.whole_state, self._level)

    def draw_ahead(self, now: Callable[[], float]) -> list[Answer]:
        """Draw and hand out the next step's tokens, which it is then given by `dispatch`.

        Nobody then waits for the step, which blocks its caller until it has run. All calls must
        have been collected.

        Args:
            now: gives the time.

        Returns:
            the answers that ended by them. Their slots are free.
        """
        self.release()
        _, self._drawn, shown = self._drawing.take(self.whole_state, self._level)
        for answer in self.answers:
            answer.dispatched += 1
        return self._give(self.seats, np.asarray(shown), None, now())

    def dispatch(self, steps: int, now: Callable[[], float]) -> list[Answer]:
        """Call the step; `collect` has the tokens that have not been handed out.

        One step if anyone is watched, or if its tokens were drawn ahead.

        Args:
            steps: of the call.
            now: gives the time.

        Returns:
            the answers that ended before it: their constraints failed.
        """
        allowed, ended = watching.ask(self.seats, self._vocab, now())
        for answer in ended:
            self.leave(answer)
        self.release()
        seats, state, scores = tuple(self.seats), self.whole_state, None
        drawn, self._drawn = self._drawn, None
        self._drawing.forget()
        if not self.answers:
            return ended
        watched = any(answer.watched for answer in self.answers)
        if watched or drawn is not None:
            steps = 1
        if watched:
            logits, state = watching.enter(state, allowed)
        at = now()
        state, tokens = self.engine.decode_n(self.params, state, steps, drawn)
        if watched:
            scores = watching.score(logits, tokens[0])
        self.state = state
        tokens.copy_to_host_async()
        if drawn is not None:  # and handed out
            seats = (None,) * len(seats)
        self.calls.append(Call(seats, tokens, scores, at, self.key, steps))
        for answer in self.answers if drawn is None else ():
            answer.dispatched += steps
            if answer.left <= 0:
                self.leave(answer)
        return ended

    def collect(self, now: Callable[[], float]) -> list[Answer]:
        """Hand the tokens of the oldest call out; waits for it.

        Args:
            now: gives the time, once the tokens are there.

        Returns:
            the answers that ended by it. Their slots are free.
        """
        call = self.calls.pop(0)
        tokens = np.asarray(call.tokens)
        return self._give(call.seats, tokens, call.scores, now())

    def _give(
        self,
        seats: Sequence[Answer | None],
        tokens: np.ndarray,
        scores: watching.Scores | None,
        came: float,
    ) -> list[Answer]:
        """Hand tokens `[steps, batch]` out; return the answers that ended by them, and leave."""
        ended: list[Answer] = []
        for slot, answer in enumerate(tuple(seats)):
            if answer is None or answer.has_ended():
                continue
            try:
                told = watching.of_slot(scores, slot, answer)
                hand_out(answer, tokens[:, slot].tolist(), told, came)
            except Exception as error:  # its own: of its constraint, or its text
                answer.end("error", came, error)
            if answer.has_ended():
                self.leave(answer)
                ended.append(answer)
        return ended

    @property
    def _vocab(self) -> int:
        return self.generator.model_config.vocab_size

    @property
    def whole_state(self) -> DecodeState:
        """The state, of a batch that has one."""
        assert self.state is not None
        return self.state

    def release(self) -> None:
        """End the sequences whose answers have left; `dispatch` does so too."""
        for slot in sorted(self._to_release):
            self.state = slots.release(self.whole_state, slot)
        self._to_release.clear()
        self._set_sampling()

    def _set_sampling(self) -> None:
        """Make the settings of those who sit here, at the lowest level that has their fields."""
        greedy = Sampler()
        samplers = [greedy if one is None else one.request.sampler for one in self.seats]
        if samplers == self._samplers:
            return
        level = level_of(samplers, self._vocab)
        changes = level.changes(self.whole_state, samplers, self._vocab)
        self._level, self._samplers = level, samplers
        self.state = dataclasses.replace(self.whole_state, **changes)


_ROWS = ("finished", "seed", "step", "sequences", "nonfinite", "counts")


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(rows: Any, slot: Array, row: Any) -> Any:
    return jax.tree.map(lambda all_rows, one: all_rows.at[slot].set(one[0]), rows, row)
