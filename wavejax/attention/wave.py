"""Wave attention: a decode step's tripartite attention over the index and the buffer."""

import dataclasses
from typing import get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels.attend_zones import ZoneStates
from pallas_kernels.score_clusters import ClusterScores
from pallas_kernels.select_tokens import Retrieved
from wavejax.attention import retrieval
from wavejax.attention.protocol import (
    Attention,
    Counts,
    Layer,
    PromptTokenKV,
    StepKV,
    StepQuery,
    scale_of,
)
from wavejax.config import WaveConfig
from wavejax.store import index
from wavejax.store import rows as row_store
from wavejax.store import steady as steady_zone
from wavejax.store.growth import grow
from wavejax.store.rows import Fetch, RowCache, RowStore, StoreKind
from wavejax.store.shape import CacheShape
from wavejax.store.state import Selection, WaveState


@dataclasses.dataclass(frozen=True)
class WaveAttention(Attention[WaveState]):
    """Wave attention, for `Generator` or for a decoder of your own.

    Prefer it to `DenseAttention` where the context is long.

    Attributes:
        config: the settings.
        store: where the indexed rows lie: "host" or "device".
        fetch: how rows in host memory reach the device. "in_place": they lie in pinned memory, and
            the step reads them there. "staged": they lie in `Generator`'s hands, which brings them
            from layer to layer (`engine.staged`). None takes the best that the platform can.
        cached: whether there is a row cache before a store on the device too, which needs none. One
            in host memory has a cache always.

    Raises:
        InputError: `store` or `fetch` is none of these.
    """

    config: WaveConfig = dataclasses.field(default_factory=WaveConfig)
    store: StoreKind = "host"
    fetch: Fetch | None = None
    cached: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("store", self.store, get_args(StoreKind)),
            ("fetch", self.fetch, (None, *get_args(Fetch))),
        ):
            if value not in known:
                raise InputError(f"{name} is {value!r}; it must be one of {known}")

    @property
    def state_type(self) -> type[WaveState]:
        return WaveState

    @property
    def has_index(self) -> bool:
        return True

    @property
    def cache_fraction(self) -> float:
        return self.config.cache_fraction

    @property
    def has_cache(self) -> bool:
        return self.cached or self.store == "host"

    @property
    def staged(self) -> bool:
        """Whether KV rows are fetched by `wavejax.engine.staged`; may start JAX's device."""
        return self.store == "host" and (self.fetch or row_store.best_fetch()) == "staged"

    def init_state(
        self, shape: CacheShape, batch: int, prompt_tokens: int, new_tokens: int, dtype: DTypeLike
    ) -> WaveState:
        config = self.config
        segments = index.segment_sizes(config, config.indexed_tokens(prompt_tokens))
        # What is generated fills the window's free room first; a prompt that is short of its
        # bucket may leave the window nearly full.
        growths = -(-new_tokens // config.growth_tokens)
        tokens = max(1, sum(segments) + growths * config.growth_tokens)
        clusters = index.cluster_capacity(config, segments, growths)
        slots = config.cache_slots(tokens) if self.has_cache else 0
        stack, row = shape.stack(batch), (2, shape.head_dim)
        # Staged rows are not the state's, and an empty store in pinned memory is still one.
        kept = 0 if self.staged else tokens
        store: StoreKind = "device" if self.staged else self.store
        return WaveState(
            index=index.init_index(config, shape, batch, clusters, tokens, growths, dtype),
            store=row_store.init_store((*stack, kept, *row), dtype, store),
            cache=row_store.init_cache((*stack, slots, *row), tokens, dtype),
            steady=steady_zone.init_steady(config, shape, batch, dtype),
            step=jnp.int32(0),
            attended=jnp.zeros(batch, jnp.float32),
        )

    def lengths(self, state: WaveState) -> Int[Array, " batch"]:
        steady = state.steady
        return steady.sink_tokens + state.index.tokens + steady.window_tokens

    def remaining(self, state: WaveState) -> Int[Array, " batch"]:
        growth = self.config.growth_tokens * self._growths_left(state)
        return self.config.window_tokens - state.steady.window_tokens + growth

    def counts(self, state: WaveState) -> Counts:
        table = state.cache.table
        hits, misses = (int(np.asarray(x, np.int64).sum()) for x in (table.hits, table.misses))
        layers, _, kv_heads = state.store.rows.shape[:3]
        attended = float(np.asarray(state.attended, np.float64).sum()) * layers * kv_heads
        indexed = int(np.asarray(state.index.tokens, np.int64).sum())
        has_slots = table.token_of_slot.shape[-1] > 0
        return Counts(hits + misses, hits if has_slots else None, attended, indexed)

    def due(self, state: WaveState) -> Bool[Array, " batch"]:
        """Say which sequences' indexes the next `grow` grows."""
        window_is_full = state.steady.window_tokens >= self.config.window_tokens
        return window_is_full & (self._growths_left(state) > 0)

    def _growths_left(self, state: WaveState) -> Int[Array, " batch"]:
        grown = state.index.tokens - state.index.prompt_tokens
        return state.index.growths - grown // self.config.growth_tokens

    def write_prompt(
        self,
        layer: Layer,
        key: PromptTokenKV,
        value: PromptTokenKV,
        state: WaveState,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> WaveState:
        where = {"sequence": sequence, "length": length}
        kept, state = self.index_prompt(layer, key, value, state, **where)
        if not kept.shape[1]:
            return state
        store = RowStore(ops.append_rows(state.store.rows, kept, layer, sequence, 0))
        return dataclasses.replace(state, store=store)

    def index_prompt(
        self,
        layer: Layer,
        key: PromptTokenKV,
        value: PromptTokenKV,
        state: WaveState,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> tuple[Float[Array, "kv_heads indexed 2 head_dim"], WaveState]:
        """`write_prompt` but for the store: returns its first rows, padding included."""
        rows = jnp.swapaxes(row_store.as_rows(key, value), 0, 1)
        sinks, indexed = self.config.sink_tokens, self._indexed(length)
        start = jnp.minimum(length, sinks) + indexed
        steady = steady_zone.fill_steady(state.steady, layer, sequence, rows, start)
        room = sum(index.segment_sizes(self.config, self.config.indexed_tokens(rows.shape[1])))
        padding = max(0, sinks + room - rows.shape[1])
        rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0), (0, 0)))[:, sinks : sinks + room]
        wave = index.clear(state.index, layer, sequence)
        wave = index.append_prompt(wave, self.config, layer, sequence, rows, indexed)
        return rows, dataclasses.replace(state, index=wave, steady=steady)

    def finish_prefill(
        self, state: WaveState, sequence: Int[Array, ""], length: Int[Array, ""]
    ) -> WaveState:
        indexed = self._indexed(length)
        sinks = jnp.minimum(length, self.config.sink_tokens)
        steady, old = state.steady, state.index
        return dataclasses.replace(
            state,
            index=dataclasses.replace(
                old,
                tokens=old.tokens.at[sequence].set(indexed),
                prompt_tokens=old.prompt_tokens.at[sequence].set(indexed),
            ),
            cache=row_store.forget(state.cache, sequence),
            steady=dataclasses.replace(
                steady,
                sink_tokens=steady.sink_tokens.at[sequence].set(sinks),
                window_tokens=steady.window_tokens.at[sequence].set(length - sinks - indexed),
            ),
            attended=state.attended.at[sequence].set(0.0),
        )

    def decode(
        self, layer: Layer, query: StepQuery, key: StepKV, value: StepKV, state: WaveState
    ) -> tuple[StepQuery, WaveState]:
        selection, state = self.select(layer, query, key, value, state)
        zones, state = self.attend(layer, selection, state)
        output, _ = ops.merge_states(zones.outputs, zones.logsumexps, dtype=query.dtype)
        return output.reshape(query.shape), state

    def select(
        self, layer: Layer, query: StepQuery, key: StepKV, value: StepKV, state: WaveState
    ) -> tuple[Selection, WaveState]:
        """The first half of `decode`: takes the new row in, and says what to attend to."""
        batch, _, heads, head_dim = query.shape
        kv_heads, scale = key.shape[2], scale_of(query)
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        rows = row_store.as_rows(key[:, 0], value[:, 0])
        state = dataclasses.replace(state, steady=steady_zone.push_rows(state.steady, layer, rows))
        wave, cache = state.index, state.cache

        scores = retrieval.score_clusters(grouped, wave, layer, scale=scale)
        retrieved = self.retrieve(layer, grouped, scores, state)
        estimated = retrieval.to_estimate(self.config, scores, retrieved, wave, layer)
        cache = RowCache(cache.rows, retrieved.table)
        found = retrieved.tokens, retrieved.slots, retrieved.hit
        selection = Selection(grouped, *found, scores.logits, estimated)
        return selection, dataclasses.replace(state, cache=cache)

    def retrieve(
        self,
        layer: Layer,
        query: Float[Array, "batch kv_heads group head_dim"],
        scores: ClusterScores,
        state: WaveState,
    ) -> Retrieved:
        """What `select` retrieves: see `retrieval.retrieve`."""
        at, scale = (state.cache.table, layer, state.step), scale_of(query)
        if self.config.min_token_mass > 0:
            scores = retrieval.of_all_tokens(scores, query, state.steady, layer, scale=scale)
        return retrieval.retrieve(self.config, query, scores, state.index, *at, scale=scale)

    def attend(
        self, layer: Layer, selection: Selection, state: WaveState
    ) -> tuple[ZoneStates, WaveState]:
        """The second half of `decode`, up to the merging: reads rows and admits the missed ones."""
        # A full sequence's window has no room for the step's own row.
        window_tokens = jnp.minimum(state.steady.window_tokens + 1, self.config.window_tokens)
        zones = ops.attend_zones(
            selection.query,
            state.steady.sink,
            state.steady.sink_tokens,
            state.steady.window,
            window_tokens,
            state.store.rows,
            state.cache.rows,
            selection.tokens,
            selection.slots,
            selection.hit,
            selection.logits,
            state.index.value_means,
            state.index.offsets,
            selection.estimated,
            layer,
            scale=scale_of(selection.query),
        )
        cache = dataclasses.replace(state.cache, rows=zones.cache_rows)
        return zones, dataclasses.replace(state, cache=cache)

    def advance(self, state: WaveState, active: Bool[Array, " batch"]) -> WaveState:
        steady = state.steady
        # A sequence that is not active has retrieved rows too, which the cache has counted.
        attended = state.attended + self.lengths(state) + 1
        window = steady.window_tokens + active.astype(jnp.int32)
        return dataclasses.replace(
            state,
            steady=dataclasses.replace(steady, window_tokens=window),
            step=state.step + 1,
            attended=attended,
        )

    def grow(self, state: WaveState) -> WaveState:
        """Moves the oldest `growth_tokens` of each full window into its index, if there is room.

        Must precede a step's first layer. At the end of a step it would write to arrays that XLA
        does not see to have been read by then, and it would copy them all, every step.
        """
        return grow(self.config, state, self.due(state))

    def _indexed(self, length: Array) -> Array:
        """`WaveConfig.indexed_tokens` of a length known only when the program runs."""
        rest = length - self.config.sink_tokens
        return jnp.where(rest < self.config.window_tokens, 0, rest - self.config.local_tokens)
