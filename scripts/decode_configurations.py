"""One configuration of a decode benchmark: what fits, and all of its figures or how it failed."""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decode_baselines import HostManagedBaseline, TransformersBaseline
from decode_state import fill
from decode_timing import Decoder, profile, time_decoding, time_growth
from host_programs import budget_of

from models.config import ModelConfig
from models.parameters import Params
from models.quantised import formats_of
from wavejax import Generator, WaveAttention
from wavejax.attention.protocol import AnyAttention
from wavejax.planning.free_memory import FreeMemory, host_available
from wavejax.planning.memory import MemoryNeed, memory_need
from wavejax.planning.plan import STAGING_BYTES

Method = AnyAttention | HostManagedBaseline | TransformersBaseline

LARGEST_BATCH = 1024
CALLS = 5  # that are timed
# Of the host's memory, what may be pinned where the batch is still to be found.
PINNED_SHARE = 0.75
# Of the device's memory that is free, what a run may plan with: allocators leave gaps.
USABLE = 0.97


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all configurations share.

    Attributes:
        model, params, dtype: the model, its weights, and the dtype of these and of the caches.
        new_tokens: room for so many, in every state.
        steps: decode steps in a call.
        hit_ratio: wanted of wave attention's row cache.
        real_prefill: read random prompts, instead of writing random keys and values.
        unroll: see `Generator`.
        growth: also time the index's growth.
        profile: folder for traces, if any are wanted.
        ceiling: bytes a second that a copy reads and writes.
        free: memory, with the weights loaded.
    """

    model: ModelConfig
    params: Params
    dtype: str
    new_tokens: int
    steps: int
    hit_ratio: float
    real_prefill: bool
    unroll: bool | None
    growth: bool
    profile: Path | None
    ceiling: float
    free: FreeMemory

    def need(
        self, attention: AnyAttention | HostManagedBaseline, batch: int, context: int
    ) -> MemoryNeed:
        """See `memory_need`."""
        if isinstance(attention, HostManagedBaseline):
            return attention.need(self.model, batch, context, self.new_tokens, self.dtype)
        sizes = batch, context, self.new_tokens
        more: dict[str, Any] = {"shortest_prompt": context, "formats": formats_of(self.params)}
        return memory_need(self.model, attention, *sizes, self.dtype, **more)

    def largest(self, attention: Method, context: int) -> int:
        """Return the most sequences that fit; 0 if one does not."""
        if isinstance(attention, TransformersBaseline):
            return attention.largest(context)
        return largest_batch(lambda batch: fits(self.need(attention, batch, context), self.free))

    def largest_of_each(self, attentions: Sequence[Method], context: int) -> list[int]:
        """Return `largest` of each, where the host-managed baselines run before all others."""
        found = {
            i: self.largest(one, context)
            for i, one in enumerate(attentions)
            if isinstance(one, HostManagedBaseline)
        }
        # XLA keeps the blocks that it pinned for them.
        held = max(
            (
                one.pinned(self.model, found[i], context, self.dtype)
                for i, one in enumerate(attentions)
                if isinstance(one, HostManagedBaseline)
            ),
            default=0,
        )
        left = max(0, self.free.host - held), max(0, self.free.pinned - held)
        free = dataclasses.replace(self.free, host=left[0], pinned=left[1])
        others = dataclasses.replace(self, free=free)
        return [
            found[i] if i in found else others.largest(one, context)
            for i, one in enumerate(attentions)
        ]

    def held_as(self, attention: Method, context: int) -> dict[str, Any]:
        """Return the precision of weights and of keys and values, and the budget.

        The budget is what a step retrieves, or fetches, in tokens of each kv head; None: all.
        """
        budget, rows = None, self.dtype
        weights = {f"int{format.bits}" for format in formats_of(self.params).values()}
        if isinstance(attention, TransformersBaseline):
            weights = set()
        elif isinstance(attention, HostManagedBaseline):
            budget = attention.budget(context)
        else:
            rows = self.dtype if attention.row_dtype == "model" else attention.row_dtype
        if isinstance(attention, WaveAttention):
            budget = budget_of(attention.config, context)
        precision = {"weights": "+".join(sorted(weights)) or self.dtype, "rows": rows}
        return {"precision": precision, "budget": budget}

    def measure(
        self,
        attention: AnyAttention | HostManagedBaseline,
        batch: int,
        context: int,
        name: str,
    ) -> dict[str, Any]:
        """Fill a state, decode, and return all figures."""
        if isinstance(attention, HostManagedBaseline):
            sizes = batch, context, self.new_tokens, self.dtype
            return attention.measure(
                *(self.model, self.params, *sizes),
                steps=self.steps,
                calls=CALLS,
                ceiling=self.ceiling,
            )
        generator = Generator(self.model, attention, unroll=self.unroll)
        start = time.perf_counter()
        filled = fill(
            generator,
            self.params,
            batch,
            context,
            self.new_tokens,
            self.dtype,
            real=self.real_prefill,
        )
        seconds = sorted(filled.seconds)
        found: dict[str, Any] = {
            "prefill": {
                "kind": "real" if self.real_prefill else "synthetic",
                "seconds": seconds[len(seconds) // 2],
                "each": filled.seconds,
                "all_with_compiling": time.perf_counter() - start,
            }
        }
        facts = generator.facts(filled.state)
        found["state_bytes"] = {"device": facts.device_bytes, "host": facts.host_bytes}
        decoder = Decoder(generator, self.params, filled.state)
        del filled
        found |= time_decoding(decoder, self.steps, CALLS, self.hit_ratio, self.ceiling)
        if self.profile is not None:
            found["profile"] = profile(decoder, self.profile, name)
        if self.growth and attention.has_index:
            found["growth"] = time_growth(decoder, self.dtype)
        return found

    def attempt(
        self,
        attention: Method,
        batch: int,
        context: int,
        name: str,
        asked: int | str | None = None,
    ) -> dict[str, Any]:
        """Return what `measure` finds, or `error`: how it failed."""
        if isinstance(attention, TransformersBaseline):
            return attention.attempt(batch, context, self.ceiling, asked)
        start = time.perf_counter()
        try:
            if batch == 0:
                raise MemoryError("not even one sequence fits")
            need = self.need(attention, batch, context)
            # Without the workspace, of which the planner only knows a bound.
            free = self.free
            if need.staged:
                # What XLA pinned for configurations before, it keeps.
                free = dataclasses.replace(free, host=host_available())
            if not fits(dataclasses.replace(need, workspace=0), free):
                raise MemoryError(
                    f"needs {need.state} bytes on the device, {need.host} of host memory, "
                    f"{need.pinned} of them pinned, beside the weights; there is: {free}"
                )
            found = self.measure(attention, batch, context, name)
        except Exception as error:  # The other configurations are still worth measuring.
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        # Whatever failed may still hold its state.
        gc.collect()
        return found | {"took_s": time.perf_counter() - start}


def fits(need: MemoryNeed, free: FreeMemory) -> bool:
    """Whether a run fits beside weights that are loaded already."""
    device, host = need.state + need.workspace, need.host
    if free.device is None:
        return device + host <= free.host
    on_host = host <= free.host and need.pinned <= free.pinned
    return device <= USABLE * free.device and on_host


def largest_batch(fits: Callable[[int], bool], most: int = LARGEST_BATCH) -> int:
    """Return the largest batch that fits, by bisection; 0 if one sequence does not."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def pinned_bytes(
    model: ModelConfig,
    attentions: Sequence[Method],
    context: int,
    batches: Sequence[int | str],
    new_tokens: int,
    dtype: str,
) -> int:
    """Host memory that XLA should be allowed to pin, at a longest context and these batches."""
    baselines = HostManagedBaseline, TransformersBaseline
    own = [one for one in attentions if not isinstance(one, baselines)]
    pinned = [one for one in own if one.store == "host" and not one.staged]
    managed = [one for one in attentions if isinstance(one, HostManagedBaseline)]
    if not pinned and not managed:
        return STAGING_BYTES
    numbers = [batch for batch in batches if isinstance(batch, int)]
    if len(numbers) < len(batches):
        return int(PINNED_SHARE * host_available())
    most = max(numbers)
    blocks = max((one.pinned(model, most, context, dtype) for one in managed), default=0)
    rows = 0
    if pinned:
        rows = memory_need(model, pinned[0], most, context, new_tokens, dtype).pinned
    return rows + blocks + STAGING_BYTES
