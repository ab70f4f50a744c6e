"""Wave attention: a decode step's tripartite attention over the index and the buffer."""

import dataclasses
import math
from typing import get_args

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

import pallas_kernels as ops
from models.config import ModelConfig
from models.errors import InputError
from pallas_kernels.types import (
    ClusterScores,
    Estimate,
    Picks,
    Retrieved,
    SteadyRows,
    StoredRows,
    ZoneStates,
)
from wavejax.attention import retrieval
from wavejax.attention.causal import causal_attention
from wavejax.config import WaveConfig
from wavejax.store import index
from wavejax.store import rows as row_store
from wavejax.store import steady as steady_zone
from wavejax.store.growth import grow
from wavejax.store.rows import Fetch, RowCache, RowStore, StoreKind
from wavejax.store.state import Selection, WaveState


@dataclasses.dataclass(frozen=True)
class WaveAttention:
    """Wave attention, for `Generator` or for a decoder of your own.

    Prefer it to `DenseAttention` where the context is long. Its methods are pure functions of the
    state that `init_state` makes; a state is meant to be donated and used once.

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
    def has_cache(self) -> bool:
        """Whether there is a row cache."""
        return self.cached or self.store == "host"

    @property
    def staged(self) -> bool:
        """Whether rows are fetched by `wavejax.engine.staged`; may start JAX's device."""
        return self.store == "host" and (self.fetch or row_store.best_fetch()) == "staged"

    def init_state(
        self, model: ModelConfig, batch: int, prompt_tokens: int, new_tokens: int, dtype: DTypeLike
    ) -> WaveState:
        """An empty state. Staged rows are not in it: its store has no room.

        Args:
            model: gives the numbers of layers and heads.
            batch: sequences.
            prompt_tokens: room for prompts of so many tokens, padding included.
            new_tokens: room for so many more.
            dtype: of rows, centroids, mean values and scales.
        """
        config = self.config
        segments = index.segment_sizes(config, config.indexed_tokens(prompt_tokens))
        # What is generated fills the window's free room first; a prompt that is short of its
        # bucket may leave the window nearly full.
        growths = -(-new_tokens // config.growth_tokens)
        tokens = max(1, sum(segments) + growths * config.growth_tokens)
        clusters = index.cluster_capacity(config, segments, growths)
        slots = config.cache_slots(tokens) if self.has_cache else 0
        layers, kv_heads, head_dim = model.num_layers, model.num_kv_heads, model.head_dim
        row = (layers, batch, kv_heads)
        # Staged rows are not the state's, and an empty store in pinned memory is still one.
        kept = 0 if self.staged else tokens
        store: StoreKind = "device" if self.staged else self.store
        return WaveState(
            index=index.init_index(
                config, layers, batch, kv_heads, head_dim, clusters, tokens, growths, dtype
            ),
            store=row_store.init_store((*row, kept, 2, head_dim), dtype, store),
            cache=row_store.init_cache((*row, slots, 2, head_dim), tokens, dtype),
            steady=steady_zone.init_steady(
                row, config.sink_tokens, config.window_tokens, head_dim, dtype
            ),
            step=jnp.int32(0),
            attended=jnp.zeros(batch, jnp.float32),
        )

    def lengths(self, state: WaveState) -> Int[Array, " batch"]:
        """Tokens that each sequence holds; the next one's position."""
        steady = state.steady
        return steady.sink_tokens + state.index.tokens + steady.window_tokens

    def is_full(self, state: WaveState) -> Bool[Array, " batch"]:
        """Sequences that have no room for another token: neither in the window nor to grow."""
        return self._window_is_full(state) & ~self._has_room(state)

    def remaining(self, state: WaveState) -> Int[Array, " batch"]:
        """How many tokens more each sequence has room for."""
        growth = self.config.growth_tokens * self._growths_left(state)
        return self.config.window_tokens - state.steady.window_tokens + growth

    def due(self, state: WaveState) -> Bool[Array, " batch"]:
        """Sequences whose index the next `grow` grows."""
        return self._window_is_full(state) & self._has_room(state)

    def _window_is_full(self, state: WaveState) -> Bool[Array, " batch"]:
        return state.steady.window_tokens >= self.config.window_tokens

    def _has_room(self, state: WaveState) -> Bool[Array, " batch"]:
        return self._growths_left(state) > 0

    def _growths_left(self, state: WaveState) -> Int[Array, " batch"]:
        grown = state.index.tokens - state.index.prompt_tokens
        return state.index.growths - grown // self.config.growth_tokens

    def prefill(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "1 tokens heads head_dim"],
        key: Float[Array, "1 tokens kv_heads head_dim"],
        value: Float[Array, "1 tokens kv_heads head_dim"],
        state: WaveState,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> tuple[Float[Array, "1 tokens heads head_dim"], WaveState]:
        """Attends densely to a prompt and writes its cache, in one layer.

        Args:
            layer: which layer.
            query, key, value: the prompt's, after RoPE, padded past `length`.
            state: `finish_prefill` must follow the last layer.
            sequence: whose cache to write.
            length: the prompt's tokens.
        """
        output = causal_attention(query[0], key[0], value[0], scale=scale_of(query))[None]
        state = self.write_prompt(layer, key[0], value[0], state, sequence=sequence, length=length)
        return output, state

    def write_prompt(
        self,
        layer: Int[Array, ""],
        key: Float[Array, "tokens kv_heads head_dim"],
        value: Float[Array, "tokens kv_heads head_dim"],
        state: WaveState,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> WaveState:
        """Writes a prompt's cache in one layer: index, rows and steady zone; see `prefill`."""
        where = {"sequence": sequence, "length": length}
        kept, state = self.index_prompt(layer, key, value, state, **where)
        if not kept.shape[1]:
            return state
        store = RowStore(ops.append_rows(state.store.rows, kept, layer, sequence, 0))
        return dataclasses.replace(state, store=store)

    def index_prompt(
        self,
        layer: Int[Array, ""],
        key: Float[Array, "tokens kv_heads head_dim"],
        value: Float[Array, "tokens kv_heads head_dim"],
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
        """Sets a sequence's lengths after all layers have been prefilled; empties its slots."""
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
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        state: WaveState,
    ) -> tuple[Float[Array, "batch 1 heads head_dim"], WaveState]:
        """One decode step of every sequence, in one layer; `grow` comes before the first one and
        `advance` after the last one."""
        selection, state = self.select(layer, query, key, value, state)
        zones, state = self.attend(layer, selection, state)
        output, _ = ops.merge_states(zones.outputs, zones.logsumexps, dtype=query.dtype)
        return output.reshape(query.shape), state

    def select(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        state: WaveState,
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
        layer: Int[Array, ""],
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
        self, layer: Int[Array, ""], selection: Selection, state: WaveState
    ) -> tuple[ZoneStates, WaveState]:
        """The second half of `decode`, up to the merging: reads rows and admits the missed ones."""
        # A full sequence's window has no room for the step's own row.
        window_tokens = jnp.minimum(state.steady.window_tokens + 1, self.config.window_tokens)
        zones = ops.attend_zones(
            selection.query,
            SteadyRows(
                state.steady.sink, state.steady.sink_tokens, state.steady.window, window_tokens
            ),
            StoredRows(state.store.rows, state.cache.rows),
            Picks(selection.tokens, selection.slots, selection.hit),
            Estimate(
                selection.logits,
                state.index.value_means,
                state.index.offsets,
                selection.estimated,
            ),
            layer,
            scale=scale_of(selection.query),
        )
        cache = dataclasses.replace(state.cache, rows=zones.cache_rows)
        return zones, dataclasses.replace(state, cache=cache)

    def advance(self, state: WaveState, active: Bool[Array, " batch"]) -> WaveState:
        """Counts the step's tokens in.

        Args:
            active: bool; a sequence that is not keeps its length, and its token is forgotten.
        """
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


def scale_of(query: Array) -> float:
    """What multiplies every product of query and key."""
    return 1.0 / math.sqrt(query.shape[-1])
