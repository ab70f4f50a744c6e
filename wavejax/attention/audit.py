"""An audit: some heads of some steps computed exactly too, and compared.

Every query head of every layer and step is audited with the same probability, by a draw that
depends on the step and the layer alone: a run audits the same heads each time. An error is that of
the attention's output, in its own layer. How errors add up over layers it does not say.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from pallas_kernels.attend_zones.reference import attend_rows, read_stored
from pallas_kernels.merge_states.reference import merge_states
from pallas_kernels.rounding import dequantise
from wavejax.attention.protocol import scale_of
from wavejax.config import WaveConfig
from wavejax.store.audit import KEPT, AuditLog
from wavejax.store.room import window_tokens
from wavejax.store.state import WaveState

_SEED = 25


def audit(
    config: WaveConfig,
    layer: Int[Array, ""],
    query: Float[Array, "batch kv_heads group head_dim"],
    output: Float[Array, "batch kv_heads group head_dim"],
    state: WaveState,
) -> WaveState:
    """Compare a share of a layer's heads with full attention.

    A loop that mostly goes round not once: nothing is read then.

    Args:
        config: the settings, whose `audit` is the share: above 0, at most 1.
        layer: int32, which layer.
        query: the step's queries, grouped by the kv head that they share.
        output: what the layer gives.
        state: with the step's own row.

    Returns:
        the state, its log with the errors; as it is where it has no log.
    """
    log = state.audit
    if log is None:
        return state
    batch, kv_heads, group, _ = query.shape
    share, heads, scale = config.audit, batch * kv_heads * group, scale_of(query)
    window = window_tokens(config, state)
    draws = max(1, math.ceil(share * heads))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(_SEED), state.step), layer)
    which, often = jax.random.split(key)
    # Without one twice, as far as there are heads; each draw counts with the same probability.
    chosen = jax.random.permutation(which, heads)[:draws]
    taken = jax.random.uniform(often, (draws,)) < share * heads / draws
    order = jnp.argsort(~taken)

    def compare(i: Array, log: AuditLog) -> AuditLog:
        b, h, g = place_of(chosen[order[i]], query)
        exact = exact_output(layer, b, h, query[b, h, g], state, window, scale=scale)
        found = output[b, h, g].astype(jnp.float32)
        error = jnp.linalg.norm(found - exact) / jnp.maximum(jnp.linalg.norm(exact), 1e-30)
        place = log.count % KEPT
        return AuditLog(
            log.errors.at[place].set(error), log.sequences.at[place].set(b), log.count + 1
        )

    log = lax.fori_loop(0, jnp.sum(taken, dtype=jnp.int32), compare, log)
    return dataclasses.replace(state, audit=log)


def place_of(
    number: Int[Array, ""], query: Float[Array, "batch kv_heads group head_dim"]
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Tell sequence, kv head and place in the group of a query head, by its number in a batch."""
    kv_heads, group = query.shape[1:3]
    return number // (kv_heads * group), number // group % kv_heads, number % group


def exact_output(
    layer: Int[Array, ""],
    sequence: Int[Array, ""],
    head: Int[Array, ""],
    query: Float[Array, " head_dim"],
    state: WaveState,
    in_window: Int[Array, " batch"],
    *,
    scale: float,
) -> Float[Array, " head_dim"]:
    """Attend to all tokens of a head, in float32.

    Args:
        layer, sequence, head: int32, which kv head.
        query: of one query head.
        state: with the step's own row.
        in_window: int32, rows in each sequence's window, the step's own included.
        scale: multiplies every product of query and key.
    """
    store, steady = state.store.rows, state.steady
    _, batch, kv_heads, tokens = store.shape[:4]
    # As of one head alone: its rows are read wherever they lie, and no other's.
    row = (layer * batch + sequence) * kv_heads + head
    alone = jax.tree.map(lambda array: array.reshape(-1, 1, 1, *array.shape[3:]), store)
    place = jnp.arange(tokens, dtype=jnp.int32)
    stored = dequantise(read_stored(alone, row, place[None, None]))
    parts = (
        (stored, place < state.index.tokens[sequence]),
        _held(steady.sink[layer, sequence, head], steady.sink_tokens[sequence]),
        _held(steady.window[layer, sequence, head], in_window[sequence]),
    )
    query = query.astype(jnp.float32)[None, None, None]
    found = [
        attend_rows(
            query, rows.reshape(1, 1, *rows.shape[-3:]).astype(jnp.float32), valid[None, None],
            scale=scale,
        )
        for rows, valid in parts
        if valid.size
    ]  # fmt: skip
    output, _ = merge_states(*(jnp.stack(x) for x in zip(*found, strict=True)))
    return output[0, 0, 0]


def _held(rows: Array, count: Array) -> tuple[Array, Array]:
    return rows, jnp.arange(rows.shape[0]) < count
