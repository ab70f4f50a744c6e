"""Rooms of a batch engine: how many slots of each size fit, and what they take together."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.errors import InputError
from wavejax.attention.dense import DenseAttention
from wavejax.attention.wave import WaveAttention
from wavejax.config import WaveConfig
from wavejax.engine.batching.rooms import Room, as_rooms
from wavejax.planning.memory import FreeMemory, MemoryNeed, free_memory, memory_need
from wavejax.planning.plan import FetchChoice, Plan, StoreChoice, make_plan, shortage


@dataclasses.dataclass(frozen=True)
class RoomPlan:
    """Rooms with what they take.

    Attributes:
        attention: of all rooms: that of the largest one that fits.
        rooms: the smallest first, `bytes` filled in. A room of which not even one slot fits has
            one, and more bytes than there are: the engine refuses requests that need it.
        memory: bytes that the states of rooms may take together.
    """

    attention: WaveAttention | DenseAttention
    rooms: tuple[Room, ...]
    memory: int


def plan_rooms(
    model: ModelConfig,
    attention: WaveConfig | WaveAttention | DenseAttention,
    rooms: Sequence[Room],
    dtype: DTypeLike,
    *,
    store: StoreChoice = "auto",
    fetch: FetchChoice = "auto",
    free: FreeMemory | None = None,
) -> RoomPlan:
    """Decides how many slots each room has, and where KV rows go; allocates nothing.

    Args:
        model: the model's sizes.
        attention: the settings of wave attention, full attention, or a wave attention as it is.
        rooms: as they are wanted: fewer slots where not all fit, each room by itself.
        dtype: of weights and states.
        store, fetch: as of `make_plan`; of a wave attention its own.
        free: what there is, the weights' memory included; None asks the device.

    Raises:
        InputError: not one slot of the smallest room fits.
    """
    if isinstance(attention, WaveAttention):
        store, fetch = attention.store, attention.fetch or "auto"
        attention = attention.config
    settings, there_is = attention, free_memory() if free is None else free

    def plan(room: Room, slots: int) -> Plan:
        sizes = slots, room.prompt_tokens, room.new_tokens
        return make_plan(model, settings, *sizes, dtype, store=store, fetch=fetch, free=there_is)

    def fits(plan: Plan) -> bool:
        return shortage(plan.need, there_is) is None

    wanted = as_rooms(rooms)
    smallest = plan(wanted[0], 1)
    smallest.check()
    chosen, slots = smallest, []
    for room in wanted:
        most = next((n for n in range(room.slots, 0, -1) if fits(plan(room, n))), 0)
        slots.append(max(1, most))
        if most:
            chosen = plan(room, most)
    needs = [
        memory_need(model, chosen.attention, n, room.prompt_tokens, room.new_tokens, dtype)
        for room, n in zip(wanted, slots, strict=True)
    ]
    usable = [need for need in needs if shortage(need, there_is) is None] or needs[:1]
    longest = max(
        room.prompt_tokens for room, need in zip(wanted, needs, strict=True) if need in usable
    )
    besides = max(need.workspace for need in usable) + _readings(model, longest, dtype)
    limits = _limits(needs[0], there_is, besides)
    sized = [
        dataclasses.replace(room, slots=n, bytes=_bytes(need, limits))
        for room, n, need in zip(wanted, slots, needs, strict=True)
    ]
    if min(room.bytes for room in sized) > limits[0]:
        raise InputError(
            f"no room fits: the smallest takes {min(room.bytes for room in sized) / 2**30:.2f} "
            f"GiB, and beside the weights and what reading prompts takes there are "
            f"{limits[0] / 2**30:.2f} GiB: give smaller rooms, or fewer slots"
        )
    return RoomPlan(chosen.attention, tuple(sized), limits[0])


def _readings(model: ModelConfig, tokens: int, dtype: DTypeLike) -> int:
    """Bytes that two prompts hold between two parts of their reading, at most."""
    row = 2 * model.hidden_size + 2 * model.num_kv_heads * model.head_dim
    return 2 * tokens * row * jnp.dtype(dtype).itemsize


def _limits(need: MemoryNeed, free: FreeMemory, besides: int) -> tuple[int, int]:
    """Bytes for states on the device, and for rows in host memory."""
    if free.device is None:
        left = max(1, free.host - need.weights - besides)
        return left, left
    host = free.host if need.staged else min(free.host, free.pinned)
    return max(1, free.device - need.weights - besides), max(1, host)


def _bytes(need: MemoryNeed, limits: tuple[int, int]) -> int:
    """A room's bytes: of the memory that is scarcer, as a share of the device's.

    So the sum of several rooms is never below what they take of either.
    """
    device, host = limits
    return max(need.state, math.ceil(need.host / host * device))
