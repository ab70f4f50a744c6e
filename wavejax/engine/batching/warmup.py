"""Warming up: programs are compiled, and prompts' layers measured, before the first request."""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from wavejax.engine import appending
from wavejax.engine.batching.admission import parks
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.continued_reading import cut_slot
from wavejax.engine.batching.handle import Channel
from wavejax.engine.batching.levels import Level, level_of
from wavejax.engine.batching.pace import seconds_of_layer
from wavejax.engine.batching.reading import Reading, let_hold
from wavejax.engine.batching.request import Request
from wavejax.engine.batching.scheduler import Scheduler
from wavejax.engine.batching.sharing import copies, copy_slot
from wavejax.engine.prompts import bucket
from wavejax.engine.sampling import Sampler

# Of the time that a layer may take, what is surely fast enough: what was measured may be slower
# later on.
SURELY_FAST = 0.7


def warm(
    scheduler: Scheduler,
    samplers: Sequence[Sampler],
    prompt_tokens: Sequence[int] | None,
    progress: Callable[[int, int], None] | None,
    appended: bool,
) -> None:
    """Run every program that requests will need, twice; see `BatchEngine.warmup`."""
    vocab = scheduler.generator.model_config.vocab_size
    by_level: dict[Level, Sampler] = {level_of([one], vocab): one for one in samplers}
    work = [
        (batch, length)
        for number, batch in enumerate(scheduler.batches)
        for length in _lengths(scheduler.batches, number, prompt_tokens)
    ]
    appended = appended and parks(scheduler.generator.attention)
    sizes = {appending.padded_piece(tokens) for tokens in range(1, appending.PIECE + 1)}
    pieces = sorted(sizes) if appended else []
    rounds = len(work) + len(scheduler.batches) * (len(by_level) + len(pieces))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, rounds)

    config, allowed = scheduler.generator.model_config, scheduler.stall / 2
    for batch in scheduler.batches:
        batch.allocate()
        lengths = [length for own, length in work if own is batch]
        # Steps first: with them a layer of the shortest prompts is measured, for the others.
        for sampler in by_level.values():
            _run(scheduler, batch, min(lengths, default=1), sampler, True, scheduler.step_sizes)
            count()
        for length in lengths:
            # Whole where that may be fast enough, in parts where it may be too slow: where a little
            # would make it the other, both.
            expected = seconds_of_layer(scheduler.pace, config, length)
            if expected is None or expected <= 4 * allowed:
                _run(scheduler, batch, length, Sampler(), True)
            expected = seconds_of_layer(scheduler.pace, config, length)
            if expected is None or expected > SURELY_FAST * allowed:
                _run(scheduler, batch, length, Sampler(), False)
            count()
        for tokens in pieces:
            _append(batch, tokens)
            count()
        if copies(batch.engine.attention):
            batch.state = copy_slot(batch.whole_state, 0, 0)
        batch.drop()


def _lengths(
    batches: Sequence[Batch], number: int, prompt_tokens: Sequence[int] | None
) -> list[int]:
    """List the padded lengths of a room's prompts: longer ones than the next smaller room's."""
    most = batches[number].room.prompt_tokens
    smaller = [one.room.prompt_tokens for one in batches[:number]]
    least = max((size for size in smaller if size < most), default=0)
    if prompt_tokens is not None:
        return sorted({bucket(one) for one in prompt_tokens if least < bucket(one) <= most})
    return _buckets(least + 1, most)


def _buckets(least: int, most: int) -> list[int]:
    """List the padded lengths from the one of `least` tokens to the first of `most` or more."""
    lengths = [bucket(least)]
    while lengths[-1] < most:
        lengths.append(bucket(lengths[-1] + 1))
    return lengths


def _append(batch: Batch, tokens: int) -> None:
    """Append so many tokens to a slot that holds nothing; fewer where a window takes no more."""
    engine, state = batch.engine, batch.whole_state
    emptied = let_hold(engine, state.attention_state, np.int32(0), np.int32(0))
    given = appending.grow(engine, emptied), state.logits, 0, np.zeros(tokens, np.int32)
    held, logits, count = appending.append_some(engine, batch.params, *given)
    batch.state = dataclasses.replace(state, attention_state=held, logits=logits)
    cut_slot(batch, 0, count)


def _run(
    scheduler: Scheduler,
    batch: Batch,
    length: int,
    sampler: Sampler,
    whole: bool,
    calls: Sequence[int] = (),
) -> None:
    """Read a prompt of zeros, and call the step with so many steps each."""
    request = Request(np.zeros(length, np.int32), max_new_tokens=1 << 20, sampler=sampler)
    generator = scheduler.generator
    request = request.checked(generator.model_config.vocab_size, (), generator.attention)
    answer = Answer(-1, request, Channel(lambda event: None), scheduler.clock())
    reading = Reading(batch, 0, answer, whole)
    # Two of each kind of part, for the first may compile.
    reading.layers = min(2, reading.layers)
    runs: collections.Counter[Hashable] = collections.Counter()
    while not reading.done:
        part, before = reading.part(), scheduler.clock()
        reading.run(1)
        scheduler.pace.note(part.key, 1, scheduler.clock() - before)
        runs[part.key] += 1
        if runs[part.key] >= 2 and not reading.done and reading.part().key == part.key:
            reading.skip()
    if reading.error is not None:
        raise reading.error
    for steps in calls:
        key, before = batch.key, scheduler.clock()
        batch.dispatch(steps, scheduler.clock)
        batch.collect(scheduler.clock)
        scheduler.pace.note(key, steps, scheduler.clock() - before)
    if calls:
        if batch.draws_ahead:
            batch.draw_ahead(scheduler.clock)
        batch.dispatch(1, scheduler.clock)
        batch.collect(scheduler.clock)
        answer.request = dataclasses.replace(request, logprobs=0)
        batch.dispatch(1, scheduler.clock)
        batch.collect(scheduler.clock)
    batch.leave(answer)
    batch.release()
