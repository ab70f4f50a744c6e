"""Wave attention: a decode step's tripartite attention over the index and the buffer."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

import pallas_kernels as ops
from models.config import ModelConfig
from wavejax import buffer, index, retrieval
from wavejax._pytree import state as pytree
from wavejax.buffer import RowCache, RowStore, SteadyZone, StoreKind
from wavejax.causal_attention import causal_attention
from wavejax.config import WaveConfig
from wavejax.index import WaveIndex


@pytree
class WaveState:
    """The KV cache of all layers and sequences, as a wave index and a wave buffer.

    Attributes:
        index, store, cache, steady: see their classes.
        step: int32 scalar, decode steps done; the row cache's clock.
        attended: `[batch]` float32, the tokens that dense attention would have read so far, in
            each layer and kv head: what the share of tokens retrieved is a share of.
    """

    index: WaveIndex
    store: RowStore
    cache: RowCache
    steady: SteadyZone
    step: Array
    attended: Array


@dataclasses.dataclass(frozen=True)
class WaveAttention:
    """Wave attention, for `Generator` or for a decoder of your own.

    Prefer it to `DenseAttention` where the context is long. Its methods are pure functions of the
    state that `init_state` makes; a state is meant to be donated and used once.

    Attributes:
        config: the settings.
        store: where the indexed rows lie: "host" (pinned host memory) or "device".
    """

    config: WaveConfig = dataclasses.field(default_factory=WaveConfig)
    store: StoreKind = "host"

    def init_state(
        self, model: ModelConfig, batch: int, prompt_tokens: int, new_tokens: int, dtype: DTypeLike
    ) -> WaveState:
        """An empty state.

        Args:
            model: gives the numbers of layers and heads.
            batch: sequences.
            prompt_tokens: room for prompts of so many tokens, padding included.
            new_tokens: room for so many more.
            dtype: of rows, centroids, value sums and scales.
        """
        config = self.config
        segments = index.segment_sizes(config, config.indexed_tokens(prompt_tokens))
        # What is generated fills the window's free room first; a prompt that is short of its
        # bucket may leave the window nearly full.
        growths = -(-new_tokens // config.growth_tokens)
        tokens = max(1, sum(segments) + growths * config.growth_tokens)
        clusters = index.cluster_capacity(config, segments, growths)
        slots = max(1, math.ceil(config.cache_fraction * tokens))
        layers, kv_heads, head_dim = model.num_layers, model.num_kv_heads, model.head_dim
        row = (layers, batch, kv_heads)
        return WaveState(
            index=index.init_index(
                config, layers, batch, kv_heads, head_dim, clusters, tokens, dtype
            ),
            store=buffer.init_store((*row, tokens, 2, head_dim), dtype, self.store),
            cache=buffer.init_cache((*row, slots, 2, head_dim), tokens, dtype),
            steady=buffer.init_steady(
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
        window_full = state.steady.window_tokens >= self.config.window_tokens
        return window_full & ~self._has_room(state)

    def _has_room(self, state: WaveState) -> Bool[Array, " batch"]:
        """Sequences whose index has room to grow."""
        return state.index.tokens + self.config.growth_tokens <= state.index.token_ids.shape[-1]

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
        output = causal_attention(query[0], key[0], value[0], scale=_scale(query))[None]
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
        rows = jnp.swapaxes(buffer.as_rows(key, value), 0, 1)
        indexed = self._indexed(length)
        steady = buffer.fill_steady(
            state.steady,
            layer,
            sequence,
            rows,
            jnp.minimum(length, self.config.sink_tokens) + indexed,
        )
        segments = index.segment_sizes(self.config, self.config.indexed_tokens(rows.shape[1]))
        padding = max(0, self.config.sink_tokens + sum(segments) - rows.shape[1])
        rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0), (0, 0)))[:, self.config.sink_tokens :]

        wave, store = index.clear(state.index, layer, sequence), state.store
        if segments:
            kept = rows[:, : sum(segments)]
            wave = index.append_prompt(wave, self.config, layer, sequence, kept, indexed)
            store = RowStore(ops.append_rows(store.rows, kept, layer, sequence, 0))
        return dataclasses.replace(state, index=wave, store=store, steady=steady)

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
            cache=buffer.forget(state.cache, sequence),
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
        batch, _, heads, head_dim = query.shape
        kv_heads, scale = key.shape[2], _scale(query)
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        rows = buffer.as_rows(key[:, 0], value[:, 0])
        steady = buffer.push_rows(state.steady, layer, rows)
        wave, cache = state.index, state.cache

        scores = ops.score_clusters(grouped, wave.centroids, wave.offsets, layer, scale=scale)
        retrieved = retrieval.retrieve(
            self.config, grouped, scores, wave, cache.table, layer, state.step, scale=scale
        )
        zones = ops.attend_zones(
            grouped,
            steady.sink,
            steady.sink_tokens,
            steady.window,
            steady.window_tokens + 1,
            state.store.rows,
            cache.rows,
            retrieved.tokens,
            retrieved.slots,
            retrieved.hit,
            scores.logits,
            wave.value_sums,
            wave.offsets,
            retrieval.to_estimate(self.config, scores, retrieved, wave, layer),
            layer,
            scale=scale,
        )
        output, _ = ops.merge_states(zones.outputs, zones.logsumexps)
        cache = RowCache(
            rows=zones.cache_rows,
            table=retrieved.table,
            hits=cache.hits.at[layer].add(_of_sequences(retrieved.hits)),
            misses=cache.misses.at[layer].add(_of_sequences(retrieved.misses)),
        )
        output = output.astype(query.dtype).reshape(batch, 1, heads, head_dim)
        return output, dataclasses.replace(state, cache=cache, steady=steady)

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
        does not see to have been read by then, and it would copy them all, every step. It would
        copy them for a `lax.cond`, too: so this is a loop that goes round for the sequences that
        are due, mostly not once.
        """
        growth, local = self.config.growth_tokens, self.config.local_tokens
        layers = state.steady.window.shape[0]
        due = (state.steady.window_tokens >= self.config.window_tokens) & self._has_room(state)
        sequences = jnp.argsort(~due)  # those that are due come first
        count = jnp.sum(due, dtype=jnp.int32)

        def grow_one(i: Array, state: WaveState) -> WaveState:
            layer, sequence = i // count, sequences[i % count]
            # Read once, before anything is written: else XLA reads it again and again out of the
            # stack, and copies the stack in order to still have it when it has been written to.
            window = lax.optimization_barrier(state.steady.window[layer, sequence])
            start = state.index.tokens[sequence]
            keys, values = window[None, :, :growth, 0], window[None, :, :growth, 1]
            new_index = index.append_segments(
                state.index,
                self.config,
                layer,
                sequence,
                start,
                keys,
                values,
                jnp.full(1, growth, jnp.int32),
            )
            rows = ops.append_rows(state.store.rows, window[:, :growth], layer, sequence, start)
            kept = state.steady.window.at[layer, sequence, :, :local].set(window[:, growth:])
            return dataclasses.replace(
                state,
                index=new_index,
                store=RowStore(rows),
                steady=dataclasses.replace(state.steady, window=kept),
            )

        state = lax.fori_loop(0, layers * count, grow_one, state)
        tokens = state.index.tokens + jnp.where(due, growth, 0)
        window = state.steady.window_tokens - jnp.where(due, growth, 0)
        return dataclasses.replace(
            state,
            index=dataclasses.replace(state.index, tokens=tokens),
            steady=dataclasses.replace(state.steady, window_tokens=window),
        )

    def _indexed(self, length: Array) -> Array:
        """`WaveConfig.indexed_tokens` of a length known only when the program runs."""
        rest = length - self.config.sink_tokens
        return jnp.where(rest < self.config.window_tokens, 0, rest - self.config.local_tokens)


def _of_sequences(rows: Array) -> Array:
    """Counts by sequence of counts by row."""
    return jnp.sum(rows, axis=-1).astype(jnp.uint32)


def _scale(query: Array) -> float:
    return 1.0 / math.sqrt(query.shape[-1])
