"""Several answers to one prompt: it is read once, and its slot is copied for the others."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from wavejax._pytree import logical_axes
from wavejax.attention.protocol import AnyAttention
from wavejax.engine.batching.admission import parks
from wavejax.engine.batching.answer import Answer
from wavejax.engine.batching.batch import Batch
from wavejax.engine.batching.request import Request
from wavejax.engine.batching.slot_reading import SlotReading
from wavejax.engine.state import DecodeState


def copies(attention: AnyAttention) -> bool:
    """Whether slots of an attention can be copied: all that they hold is on the device."""
    return parks(attention) and attention.store == "device"


def like(reading: SlotReading, line: Iterable[Answer]) -> list[Answer]:
    """List those in line that want the prompt which has just been read, and may sit beside it.

    Nobody loses a slot by it: as many are left free as there are others before them in line.

    Args:
        reading: which has read the prompt of its answer; that is not in line any more.
        line: who waits, the first first.
    """
    answer, batch = reading.answer, reading.batch
    if not copies(batch.engine.attention):
        return []
    found: list[Answer] = []
    left = len(batch.free_slots())
    for one in line:
        if left == 0:
            break
        left -= 1
        wanted = not one.channel.cancelled and batch.room.holds(*one.room)
        if reading.continued:
            wanted &= one.request.max_new_tokens <= answer.request.max_new_tokens
        if wanted and _same_prompt(one.request, answer.request):
            found.append(one)
    return found


def _same_prompt(one: Request, other: Request) -> bool:
    return one.kept is other.kept and np.array_equal(one.prompt, other.prompt)


def seat_beside(
    batch: Batch, source: int, answers: Sequence[Answer], now: float
) -> list[tuple[Answer, Exception]]:
    """Begin answers in free slots, with what another slot's prompt left there.

    Args:
        batch: of all slots; of `source` no step was called yet since its prompt was read.
        source: the slot.
        answers: to seat, no more than there are free slots.
        now: by the engine's clock.

    Returns:
        those that could not be seated, and why: after one that failed, all that follow.
    """
    for number, answer in enumerate(answers):
        answer.started = answer.read = now
        target = batch.free_slots()[0]
        try:
            batch.state = copy_slot(batch.whole_state, source, target)
            batch.seat(target, answer)
        except Exception as error:  # memory that the planner knew nothing of
            return [(one, error) for one in answers[number:]]
        answer.cached = answer.prompt_tokens
        answer.tell(answer.prompt_tokens)
    return []


def copy_slot(state: DecodeState, source: int, target: int) -> DecodeState:
    """Copy what a prompt has left in a slot into another: all of the attention's, and the logits.

    What says how tokens are drawn is left to `Batch.seat`.

    Args:
        state: donated; of an attention that `copies`.
        source, target: slots.
    """
    held = state.attention_state, state.logits
    attention_state, logits = _copy(held, np.int32(source), np.int32(target))
    return dataclasses.replace(state, attention_state=attention_state, logits=logits)


@functools.partial(jax.jit, donate_argnums=0)
def _copy(held: tuple[Any, Array], source: Array, target: Array) -> tuple[Any, Array]:
    attention_state, logits = held
    leaves, tree = jax.tree.flatten(attention_state)
    names = [tuple(spec) for spec in jax.tree.leaves(logical_axes(attention_state))]
    copied = [_copy_one(*pair, source, target) for pair in zip(leaves, names, strict=True)]
    logits = _copy_one(logits, ("sequences", "vocab"), source, target)
    return jax.tree.unflatten(tree, copied), logits


def _copy_one(array: Array, names: tuple[str, ...], source: Array, target: Array) -> Array:
    """Copy an array's part of a slot; in place, layer by layer, for it may be of many gigabytes."""
    if "sequences" not in names or array.size == 0:
        return array
    axis = names.index("sequences")

    def copied(whole: Array, before: tuple[Array, ...]) -> Array:
        after = (jnp.int32(0),) * (whole.ndim - len(before) - 1)
        sizes = (1,) * (len(before) + 1) + whole.shape[len(before) + 1 :]
        part = lax.dynamic_slice(whole, (*before, source, *after), sizes)
        return lax.dynamic_update_slice(whole, part, (*before, target, *after))

    if axis == 0:
        return copied(array, ())
    assert axis == 1, names
    return lax.fori_loop(0, array.shape[0], lambda i, whole: copied(whole, (i,)), array)
