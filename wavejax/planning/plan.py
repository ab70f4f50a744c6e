"""The memory planner: where a run's rows go, how large its cache is, and whether it fits at all."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.errors import InputError
from models.formats import Formats, bits_each
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.wave import WaveAttention
from wavejax.config import WaveConfig
from wavejax.engine.sampling import Sampler
from wavejax.planning.auto import AutoAttention, faster
from wavejax.planning.free_memory import PINNED_LIMIT, FreeMemory, free_memory
from wavejax.planning.lengths import longest_prompt
from wavejax.planning.memory import MemoryNeed, footprint, memory_need
from wavejax.store.rows import Fetch, StoreKind

StoreChoice = Literal["auto"] | StoreKind
FetchChoice = Literal["auto"] | Fetch
# What XLA pins besides the store: it stages what it copies to the device from memory that is not
# pinned, such as a stack of layers' weights.
STAGING_BYTES = 8 * 2**30


class _Candidate(NamedTuple):
    """A way to run, and why it would be chosen: as of `Plan`."""

    attention: AnyAttention
    reason: str
    chosen: str | None = None


_Choice = tuple[_Candidate, MemoryNeed]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will take, and why.

    Attributes:
        model, batch, prompt_tokens, new_tokens, dtype: the run that was asked for.
        attention: what to run it with; its store and its cache's size are the plan's.
        need: what it takes.
        free: what there is.
        reason: why the store is where it is.
        chosen: why it is this attention, where the plan chose it (`AutoAttention`); else None.
        shrunk: the cache fraction asked for, where the plan has a smaller cache; else None.
        longest: tokens of the longest prompt, padded, that the same run could have; 0 for none.
        formats: of the weights that are not of `dtype`.
        notes: what comes of a quantised folder's weights, a line each.
    """

    model: ModelConfig
    batch: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    attention: AnyAttention
    need: MemoryNeed
    free: FreeMemory
    reason: str
    chosen: str | None
    shrunk: float | None
    longest: int
    formats: Formats | None = None
    notes: tuple[str, ...] = ()

    @property
    def weight_bits(self) -> float:
        """Bits that a number of the weights takes, on average."""
        return bits_each(self.model, self.need.weights)

    def check(self) -> None:
        """Raise InputError, with the numbers and what to do, if the run does not fit."""
        short = shortage(self.need, self.free)
        if short is None:
            return
        name, needed, there_is = short
        need = self.need
        parts = f"weights {gib(need.weights)}, KV cache and index {gib(need.state)}"
        if need.host:
            parts += f", rows in host memory {gib(need.host)}"
        longest = (
            f"the longest prompt that fits has {self.longest} tokens; " if self.longest else ""
        )
        advice = "use a shorter prompt, fewer prompts or new tokens"
        if self.dtype == "float32":
            advice += ", or `dtype='bfloat16'`"
        if not self.formats and name != "host memory":
            advice += ", or `weight_dtype='int8'` unless the model is a converted folder"
        if name == "pinned memory":
            advice = f"set {PINNED_LIMIT}={math.ceil(needed / 2**30)} before JAX starts"
            advice += ", or `fetch='staged'`, which pins no rows"
        elif need.rows_on == "device" and self.free.device is not None and need.index:
            advice += ", or `store='host'`"
        raise InputError(
            f"not enough {name}: {gib(needed)} needed ({parts}, workspace {gib(need.workspace)}), "
            f"{gib(there_is)} free; {longest}{advice}"
        )


def make_plan(
    model: ModelConfig,
    attention: WaveConfig | AutoAttention | AnyAttention,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: DTypeLike,
    *,
    store: StoreChoice = "auto",
    fetch: FetchChoice = "auto",
    sampler: Sampler | None = None,
    free: FreeMemory | None = None,
    shortest_prompt: int = 1,
    formats: Formats | None = None,
) -> Plan:
    """Decides where the rows go and how many the cache holds; allocates nothing.

    "auto" keeps the rows on the device while they fit, where they need no cache; else in host
    memory, with as large a cache, up to what was asked for, as the device has room for. A cache's
    size changes what is computed only with an `admission_ratio` above 1.

    Args:
        model: the model's sizes.
        attention: the settings of wave attention, whose `cache_fraction` is what is asked for;
            `AutoAttention`, wave or full attention, whichever is faster; or an attention that is
            taken as it is, `DenseAttention` or any other.
        batch: sequences.
        prompt_tokens: of the longest prompt.
        new_tokens: to generate.
        dtype: of weights and state.
        store: where the rows of wave attention by these settings shall go.
        fetch: how its rows on the host reach the device; see `WaveAttention`.
        sampler: how tokens are drawn; None: in the way that takes most.
        free: what there is; None asks the device.
        shortest_prompt: tokens of the shortest one.
        formats: of the weights that are not of that dtype.

    Returns:
        the plan. It may not fit: `Plan.check` says so.
    """
    free = free_memory() if free is None else free
    dtype, alike = jnp.dtype(dtype), shortest_prompt == prompt_tokens

    def choose(prompt: int, free: FreeMemory) -> _Choice:
        need = functools.partial(
            memory_need,
            model,
            batch=batch,
            prompt_tokens=prompt,
            new_tokens=new_tokens,
            dtype=dtype,
            sampler=sampler,
            # Where all prompts are as long as the longest, so they are at another length.
            shortest_prompt=prompt if alike else min(shortest_prompt, prompt),
            formats=formats,
        )
        found: Iterable[_Candidate]
        if isinstance(attention, AutoAttention):
            found = _of_both(attention, store, fetch, free, need, batch, prompt + new_tokens)
        else:
            found = _candidates(attention, store, fetch, free, need)
        choices = [(candidate, need(candidate.attention)) for candidate in found]
        # Of what does not fit, the last is shown: it takes least of the device.
        fitting = (choice for choice in choices if shortage(choice[1], free) is None)
        return next(fitting, choices[-1])

    (taken, reason, chosen), need = choose(prompt_tokens, free)
    shrunk = None
    config = attention.config if isinstance(attention, AutoAttention) else attention
    if isinstance(config, WaveConfig) and taken.has_index:
        asked = config.cache_fraction
        shrunk = asked if taken.cache_fraction < asked else None

    if shortage(need, free) is not None:
        reason = "nothing fits; shown is what takes least of the device's memory"
    # A run of its own would have a limit of its own.
    unlimited = dataclasses.replace(free, pinned=free.host)

    def fits(prompt: int) -> bool:
        return shortage(choose(prompt, unlimited)[1], unlimited) is None

    return Plan(
        model, batch, prompt_tokens, new_tokens, dtype.name, taken, need, free, reason, chosen,
        shrunk, longest_prompt(fits), formats,
    )  # fmt: skip


def _of_both(
    auto: AutoAttention,
    store: StoreChoice,
    fetch: FetchChoice,
    free: FreeMemory,
    need: Callable[[WaveAttention], MemoryNeed],
    batch: int,
    tokens: int,
) -> list[_Candidate]:
    """Ways to run by either attention, the best first."""
    waves = list(_candidates(auto.config, store, fetch, free, need))
    if store == "host" or fetch != "auto":
        why = "its rows are asked for in host memory"
        return [candidate._replace(chosen=why) for candidate in waves]
    better, why = faster(auto.config, batch, tokens, free.name)
    [full] = _candidates(auto.full, store, fetch, free, need)
    if better == "full":
        small = "full attention is faster, but does not fit"
        return [full._replace(chosen=why), *(wave._replace(chosen=small) for wave in waves)]
    # In host memory the missed rows cost more than is gained (docs/performance.md).
    on_device = [wave._replace(chosen=why) for wave in waves if wave.attention.store == "device"]
    slower = "wave attention's rows and index do not fit on the device, and would be slower else"
    none = "full attention does not fit on the device"
    on_host = [wave._replace(chosen=none) for wave in waves if wave.attention.store == "host"]
    return [*on_device, full._replace(chosen=slower), *on_host]


def _candidates(
    attention: WaveConfig | AnyAttention,
    store: StoreChoice,
    fetch: FetchChoice,
    free: FreeMemory,
    need: Callable[[WaveAttention], MemoryNeed],
) -> Iterator[_Candidate]:
    """Ways to run, the best first, and why each would be chosen."""
    if not isinstance(attention, WaveConfig):
        kept = "on the device" if attention.store == "device" else "in host memory"
        yield _Candidate(attention, f"it keeps keys and values {kept}")
        return
    without = dataclasses.replace(attention, cache_fraction=0.0)
    if store != "host":
        why = "asked for" if store == "device" else "it fits there"
        yield _Candidate(WaveAttention(attention, "device"), why)
    if store == "device" or (store == "auto" and free.device is None):
        return  # on a CPU, the host's memory is the same
    why = "asked for" if store == "host" else "it does not fit on the device"
    on_host = functools.partial(
        WaveAttention, store="host", fetch=None if fetch == "auto" else fetch
    )
    cached, uncached = on_host(attention), on_host(without)
    yield _Candidate(cached, why)
    if free.device is not None:
        # A cache's bytes grow with its slots, but for the table, which has an entry a token.
        full = need(cached)
        least, most = need(uncached).device, full.device
        if least < free.device < most:
            part = (free.device - least) / (most - least)
            smaller = attention.with_part_of_cache(full.slots, part)
            yield _Candidate(on_host(smaller), f"{why}, with a smaller row cache")
    yield _Candidate(uncached, f"{why}, without a row cache")


def shortage(need: MemoryNeed, free: FreeMemory) -> tuple[str, int, int] | None:
    """Return the memory that does not suffice, what is needed of it and what is free.

    None if all do.
    """
    if free.device is None:
        wanted = [("memory", need.device + need.host, free.host)]
    else:
        wanted = [
            ("device memory", need.device, free.device),
            # The weights pass through the host's memory before the store is made.
            ("host memory", max(need.host, need.loading), free.host),
            ("pinned memory", need.pinned, free.pinned),
        ]
    return next((entry for entry in wanted if entry[1] > entry[2]), None)


def pinned_need(
    model: ModelConfig,
    attention: WaveConfig | AutoAttention | AnyAttention,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: DTypeLike,
    fetch: FetchChoice = "auto",
) -> int:
    """Bytes that XLA should be allowed to pin, whatever the plan will be; starts no device."""
    if isinstance(attention, AutoAttention):
        attention = attention.config  # which may come to lie in host memory
    if isinstance(attention, WaveConfig):
        attention = WaveAttention(attention, "device" if fetch == "staged" else "host")
    if attention.store == "device":
        return STAGING_BYTES
    held = footprint(model, attention, batch, prompt_tokens, new_tokens, dtype)
    return held.rows + STAGING_BYTES


def gib(count: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{count / 2**30:.2f} GiB"
