"""What the steps of one slot's answer have read, and what an audit found of it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from wavejax.engine.facts import audit_of
from wavejax.engine.staged_state import on_device_of, with_device_part
from wavejax.engine.state import DecodeState, was_donated
from wavejax.store.audit import AuditLog, errors_of
from wavejax.store.state import WaveState


class Reads(NamedTuple):
    """What decode steps did for an answer, by wave attention; over layers, kv heads and steps.

    Attributes:
        retrieved: KV rows that were retrieved.
        hits: of these, found in the row cache; None without one.
        attended: KV rows that full attention would have read.
        errors: true relative errors of audited query heads, those that the log keeps.
    """

    retrieved: int
    hits: int | None
    attended: float
    errors: tuple[float, ...]


class Counters(NamedTuple):
    """A slot's counters, copied: a state's own arrays are donated.

    Attributes:
        hits, misses: `[layers, kv_heads]` uint32.
        attended: float32 scalar, in each layer and kv head.
        audit: the whole batch's.
        slot: whose.
        has_cache: whether there is a row cache.
    """

    hits: Array
    misses: Array
    attended: Array
    audit: AuditLog | None
    slot: int
    has_cache: bool


def begin_reads(state: DecodeState, slot: int) -> DecodeState:
    """Count anew for a slot's next answer; the same state where nothing is counted."""
    whole = state.attention_state
    held = on_device_of(whole)
    if not isinstance(held, WaveState):
        return state
    table = held.cache.table
    counted = table.hits, table.misses, held.attended, held.audit
    hits, misses, attended, audit = _begin(counted, np.int32(slot))
    table = table._replace(hits=hits, misses=misses)
    cache = dataclasses.replace(held.cache, table=table)
    held = dataclasses.replace(held, cache=cache, attended=attended, audit=audit)
    return dataclasses.replace(state, attention_state=with_device_part(whole, held))


def copy_counters(state: DecodeState | None, slot: int) -> Counters | None:
    """Copy what has been counted for a slot so far; does not wait. None where nothing is."""
    held = None if state is None else on_device_of(state.attention_state)
    if not isinstance(held, WaveState):
        return None
    table = held.cache.table
    counted = table.hits, table.misses, held.attended, held.audit
    if was_donated(counted):
        return None
    has_cache = table.token_of_slot.shape[-1] > 0
    hits, misses, attended, audit = _copy(counted, np.int32(slot))
    return Counters(hits, misses, attended, audit, slot, has_cache)


def reads_in(counters: Counters | None) -> Reads | None:
    """Read counters; waits for the work that made them. None without any, or before a step."""
    if counters is None or not float(counters.attended):
        return None
    layers, kv_heads = counters.hits.shape
    hits, misses = (int(np.asarray(x).sum(dtype=np.int64)) for x in counters[:2])
    audit = counters.audit
    errors = () if audit is None else tuple(errors_of(audit, counters.slot).tolist())
    attended = float(counters.attended) * layers * kv_heads
    return Reads(hits + misses, hits if counters.has_cache else None, attended, errors)


def summary(reads: Sequence[Reads]) -> dict[str, float | int]:
    """Sum the reads of one or more answers up.

    Returns:
        "retrieved": of all tokens the share that was retrieved; "hits": of these the share in the
        row cache, if there is one; "audited": heads that were computed exactly too, and
        "error_median" and "error_99" of their true relative errors, if there are any.
    """
    retrieved = sum(one.retrieved for one in reads)
    found: dict[str, float | int] = {"retrieved": retrieved / sum(one.attended for one in reads)}
    if retrieved and all(one.hits is not None for one in reads):
        found["hits"] = sum(one.hits or 0 for one in reads) / retrieved
    audited, median, most = audit_of([error for one in reads for error in one.errors])
    if median is not None and most is not None:
        found |= {"audited": audited, "error_median": median, "error_99": most}
    return found


@functools.partial(jax.jit, donate_argnums=0)
def _begin(counted: Any, slot: Int[Array, ""]) -> Any:
    hits, misses, attended, audit = counted
    hits, misses = (x.at[:, slot].set(0) for x in (hits, misses))
    if audit is not None:
        others = jnp.where(audit.sequences == slot, -1, audit.sequences)
        audit = dataclasses.replace(audit, sequences=others)
    return hits, misses, attended.at[slot].set(0), audit


@jax.jit
def _copy(counted: Any, slot: Int[Array, ""]) -> Any:
    hits, misses, attended, audit = counted
    return hits[:, slot], misses[:, slot], attended[slot], jax.tree.map(jnp.copy, audit)
