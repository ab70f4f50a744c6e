"""Rooms of a batch engine: how many slots of each size fit, and what they take together."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.formats import Formats
from wavejax.attention.protocol import AnyAttention
from wavejax.config import WaveConfig
from wavejax.engine.batching.rooms import Room, as_rooms
from wavejax.planning.auto import AutoAttention
from wavejax.planning.free_memory import FreeMemory, free_memory
from wavejax.planning.memory import MemoryNeed, memory_need
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

    attention: AnyAttention
    rooms: tuple[Room, ...]
    memory: int


def plan_rooms(
    model: ModelConfig,
    attention: WaveConfig | AutoAttention | AnyAttention,
    rooms: Sequence[Room],
    dtype: DTypeLike,
    *,
    store: StoreChoice = "auto",
    fetch: FetchChoice = "auto",
    free: FreeMemory | None = None,
    formats: Formats | None = None,
) -> RoomPlan:
    """Decide how many slots each room has, and where KV rows go; allocate nothing.

    Args:
        model: the model's sizes.
        attention: the settings of wave attention, or an attention that is taken as it is. Of
            `AutoAttention` all rooms have what is chosen for the largest one.
        rooms: as they are wanted: fewer slots where not all fit, each room by itself.
        dtype: of weights and states.
        store: as of `make_plan`.
        fetch: as of `make_plan`.
        free: what there is, the weights' memory included; None asks the device.
        formats: of the weights that are not of that dtype.

    Raises:
        InputError: not one slot of the smallest room fits.
    """
    there_is, wanted = free_memory() if free is None else free, as_rooms(rooms)

    def plan(room: Room, slots: int) -> Plan:
        sizes = slots, room.prompt_tokens, room.new_tokens
        left = _without(there_is, _readings(model, room.prompt_tokens, dtype))
        where: dict[str, Any] = {"store": store, "fetch": fetch, "free": left}
        return make_plan(model, attention, *sizes, dtype, **where, formats=formats)

    def fits(plan: Plan) -> bool:
        return shortage(plan.need, plan.free) is None

    # The largest that there can be says where rows go, and what reading its prompts takes.
    usable = [room for room in wanted if fits(plan(room, 1))]
    if not usable:
        plan(wanted[0], 1).check()
    largest = usable[-1]
    chosen = plan(largest, _most(largest.slots, lambda slots: fits(plan(largest, slots))))
    limits = _limits(chosen.need, chosen.free)
    sized = []
    for room in wanted:

        def takes(slots: int, room: Room = room) -> int:
            sizes = slots, room.prompt_tokens, room.new_tokens
            need = memory_need(model, chosen.attention, *sizes, dtype, formats=formats)
            return _bytes(need, limits)

        def there_are(slots: int, takes: Callable[[int], int] = takes) -> bool:
            return takes(slots) <= limits[0]

        if room in usable:
            slots = max(1, _most(room.slots, there_are))
            sized.append(dataclasses.replace(room, slots=slots, bytes=takes(slots)))
        else:
            too_many = max(takes(1), limits[0] + 1)
            sized.append(dataclasses.replace(room, slots=1, bytes=too_many))
    return RoomPlan(chosen.attention, tuple(sized), limits[0])


def _most(slots: int, fits: Callable[[int], bool]) -> int:
    """Count the slots that fit, up to `slots`; 0 for none."""
    return bisect.bisect_left(range(1, slots + 1), True, key=lambda count: not fits(count))


def _without(free: FreeMemory, taken: int) -> FreeMemory:
    """Return what is left of the memory where prompts are read."""
    if free.device is None:
        return dataclasses.replace(free, host=max(0, free.host - taken))
    return dataclasses.replace(free, device=max(0, free.device - taken))


def _readings(model: ModelConfig, tokens: int, dtype: DTypeLike) -> int:
    """Count the bytes that two prompts hold between two parts of their reading, at most."""
    row = 2 * model.hidden_size + 2 * model.num_kv_heads * model.head_dim
    return 2 * tokens * row * jnp.dtype(dtype).itemsize


def _limits(need: MemoryNeed, free: FreeMemory) -> tuple[int, int]:
    """Return the bytes for states on the device, and for rows in host memory."""
    besides = need.weights + need.workspace
    if free.device is None:
        left = max(1, free.host - besides)
        return left, left
    host = free.host if need.staged else min(free.host, free.pinned)
    return max(1, free.device - besides), max(1, host)


def _bytes(need: MemoryNeed, limits: tuple[int, int]) -> int:
    """Count a room's bytes: of the memory that is scarcer, as a share of the device's.

    So the sum of several rooms is never below what they take of either.
    """
    device, host = limits
    return max(need.state, math.ceil(need.host / host * device))
