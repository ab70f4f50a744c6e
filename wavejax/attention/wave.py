"""Wave attention. Its decode step of a layer, `WaveAttention.decode`, has eight steps.

1. push the token's KV row onto the window,
2. score the clusters,
3. select the clusters whose tokens are candidates,
4. score the candidates,
5. select the tokens to retrieve,
6. decide what to estimate,
7. attend to the zones: steady, retrieved, estimated,
8. merge the zones' outputs.

Steps 2 to 6 are in `retrieval`, and the state's own parts in `wavejax.store`.
"""

import dataclasses
import functools
from typing import get_args

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Num

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels import Implementation
from wavejax.attention import retrieval
from wavejax.attention.audit import audit
from wavejax.attention.counting import counts
from wavejax.attention.footprint import Footprint, wave_footprint
from wavejax.attention.implementation import by_own_implementation, check_implementation
from wavejax.attention.protocol import (
    Attention,
    Counts,
    Layer,
    PromptTokenKV,
    StepKV,
    StepQuery,
    scale_of,
)
from wavejax.attention.tolerance import merge_zones
from wavejax.config import WaveConfig
from wavejax.store import prompt, room, rows
from wavejax.store.audit import init_audit
from wavejax.store.growth import grow
from wavejax.store.index import init_index
from wavejax.store.moments import check_staged
from wavejax.store.shape import CacheShape
from wavejax.store.sizes import index_room
from wavejax.store.state import Selection, WaveState
from wavejax.store.steady import init_steady, push_rows
from wavejax.store.tolerance import init_tolerance


@dataclasses.dataclass(frozen=True)
class WaveAttention(Attention[WaveState]):
    """Wave attention, for `Generator` or for a decoder of your own.

    Prefer it to `DenseAttention` where the context is long.

    Attributes:
        config: the settings.
        store: where the indexed tokens' KV rows are: "host" or "device".
        fetch: how KV rows in host memory reach the device. "in_place": they lie in pinned memory,
            and the step reads them there. "staged": `Generator` holds them, and brings them from
            layer to layer (`engine.staged`). None takes the best that the platform can.
        cached: whether a row store on the device has a row cache before it, which it does not
            need. One in host memory always has a row cache.
        implementation: how its ops run: "xla", plain JAX; "triton", the kernels; "auto", the
            platform's best. None leaves it to `use_implementation` and `WAVEJAX_IMPLEMENTATION`.

    Raises:
        InputError: `store`, `fetch` or `implementation` is none of these; or the settings have
            moments, an audit or a tolerance, and KV rows are staged.
    """

    config: WaveConfig = dataclasses.field(default_factory=WaveConfig)
    store: rows.StoreKind = "host"
    fetch: rows.Fetch | None = None
    cached: bool = False
    implementation: Implementation | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, known in (
            ("store", get_args(rows.StoreKind)),
            ("fetch", (None, *get_args(rows.Fetch))),
        ):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"`{name}` is {value!r}; it must be one of {known}")
        check_implementation(self.implementation)
        check_staged(self.config, self.store == "host" and self.fetch == "staged")

    @property
    def state_type(self) -> type[WaveState]:
        return WaveState

    @property
    def on_device(self) -> "WaveAttention":
        return dataclasses.replace(self, store="device", cached=self.has_cache)

    @property
    def has_index(self) -> bool:
        return True

    @property
    def row_dtype(self) -> str:
        return self.config.row_dtype

    @property
    def cache_fraction(self) -> float:
        return self.config.cache_fraction

    @property
    def has_cache(self) -> bool:
        return self.cached or self.store == "host"

    @property
    def staged(self) -> bool:
        """Whether KV rows are fetched by `wavejax.engine.staged`; may start JAX's device."""
        return self.store == "host" and (self.fetch or rows.best_fetch()) == "staged"

    def init_state(
        self,
        shape: CacheShape,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        dtype: DTypeLike,
        *,
        shortest_prompt: int = 1,
    ) -> WaveState:
        config = self.config
        sizes = prompt_tokens, new_tokens, shortest_prompt
        tokens, clusters, growths = index_room(config, *sizes)
        slots = config.cache_slots(tokens) if self.has_cache else 0
        check_staged(config, self.staged)
        stack, row = shape.stack(batch), (2, shape.head_dim)
        row_dtype, held = rows.dtype_of(config.row_dtype, dtype), (*stack, tokens, *row)
        return WaveState(
            index=init_index(config, shape, batch, clusters, tokens, growths, dtype),
            store=rows.init_store(held, row_dtype, self.store, staged=self.staged),
            cache=rows.init_cache((*stack, slots, *row), tokens, row_dtype),
            steady=init_steady(config, shape, batch, dtype),
            step=jnp.int32(0),
            attended=jnp.zeros(batch, jnp.float32),
            audit=init_audit(config.audit),
            tolerance=init_tolerance(config.tolerance, batch),
        )

    @by_own_implementation
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
        return prompt.write_prompt(self.config, layer, key, value, state, sequence, length)

    @by_own_implementation
    def index_prompt(
        self,
        layer: Layer,
        key: PromptTokenKV,
        value: PromptTokenKV,
        state: WaveState,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> tuple[Num[Array, "kv_heads indexed 2 head_dim"], WaveState]:
        """Write a prompt but for the rows that the host is to hold, and return those."""
        return prompt.write_staged(self.config, layer, key, value, state, sequence, length)

    def finish_prefill(
        self, state: WaveState, sequence: Int[Array, ""], length: Int[Array, ""]
    ) -> WaveState:
        return prompt.finish_prompt(self.config, state, sequence, length)

    @by_own_implementation
    def grow(self, state: WaveState) -> WaveState:
        """Move the oldest `growth_tokens` of each full window into its index, if there is room.

        Must precede a step's first layer. At the end of a step it would write to arrays that XLA
        does not see to have been read by then, and it would copy them all, every step.
        """
        return grow(self.config, state, self.due(state))

    def due(self, state: WaveState) -> Bool[Array, " batch"]:
        """Say which sequences' indexes the next `grow` grows."""
        return room.due(self.config, state)

    def lengths(self, state: WaveState) -> Int[Array, " batch"]:
        return room.lengths(state)

    def remaining(self, state: WaveState) -> Int[Array, " batch"]:
        return room.remaining(self.config, state)

    @by_own_implementation
    def decode(
        self, layer: Layer, query: StepQuery, key: StepKV, value: StepKV, state: WaveState
    ) -> tuple[StepQuery, WaveState]:
        # Steps 1 to 6, then 7: `engine.staged` brings KV rows between the two.
        selection, state = self.select(layer, query, key, value, state)
        zones, state = self.attend(layer, selection, state)
        # 8. Merge the zones' outputs, by their logsumexp; a tolerance may want more tokens first.
        attend = functools.partial(self.attend, layer)
        output, state = merge_zones(self.config, layer, selection, zones, state, attend)
        state = audit(self.config, layer, selection.query, output, state)
        return output.reshape(query.shape), state

    @by_own_implementation
    def select(
        self, layer: Layer, query: StepQuery, key: StepKV, value: StepKV, state: WaveState
    ) -> tuple[Selection, WaveState]:
        """Take the step's token in, and select what to attend to: steps 1 to 6 of `decode`."""
        batch, _, heads, head_dim = query.shape
        kv_heads, scale = key.shape[2], scale_of(query)
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        # 1. Push the token's KV row onto the window.
        steady = push_rows(state.steady, layer, rows.as_rows(key[:, 0], value[:, 0]))
        state = dataclasses.replace(state, steady=steady)
        # 2. Score the clusters: a logit of each centroid, for each query head.
        scores = retrieval.score_clusters(grouped, state.index, layer, scale=scale)
        # 3 to 5. Find the tokens to retrieve, and where to read their KV rows.
        retrieved = self.retrieve(layer, grouped, scores, state)
        # 6. Decide how many tokens of each cluster to estimate.
        found = scores, retrieved, state.index, layer
        selection = retrieval.selection_of(self.config, grouped, *found)
        cache = rows.RowCache(state.cache.rows, retrieved.table)
        return selection, dataclasses.replace(state, cache=cache)

    @by_own_implementation
    def retrieve(
        self,
        layer: Layer,
        query: Float[Array, "batch kv_heads group head_dim"],
        scores: ops.ClusterScores,
        state: WaveState,
    ) -> ops.Retrieved:
        """Rank the best clusters' tokens and retrieve the best of them: steps 3 to 5 of `decode`.

        Args:
            layer: int32, which layer.
            query: the step's queries, grouped by the kv head that they share.
            scores: the clusters', from step 2.
            state: after step 1.

        Returns:
            the tokens' store rows, where to read them, and what each cluster keeps.
        """
        config, index, scale = self.config, state.index, scale_of(query)
        if config.min_token_mass > 0:
            scores = retrieval.of_all_tokens(scores, query, state.steady, layer, scale=scale)
        # 3. Select the clusters of most mass: their tokens are the candidates.
        chosen = retrieval.select_clusters(config, query, scores, index, layer, scale=scale)
        # 4. Score the candidates, by their codes where there are codes.
        log_mass = retrieval.score_tokens(config, query, scores, chosen, index, layer, scale=scale)
        # 5. Select the tokens of most mass, and a slot of the row cache for each.
        table, step = state.cache.table, state.step
        return retrieval.select_tokens(config, log_mass, chosen, index, table, layer, step)

    @by_own_implementation
    def attend(
        self, layer: Layer, selection: Selection, state: WaveState
    ) -> tuple[ops.ZoneStates, WaveState]:
        """Attend to the zones, and admit missed KV rows to the row cache: step 7 of `decode`."""
        steady, in_window = state.steady, room.window_tokens(self.config, state)
        # 7. Attend to the zones: an output and a logsumexp of each.
        zones = ops.attend_zones(
            selection.query,
            ops.SteadyRows(steady.sink, steady.sink_tokens, steady.window, in_window),
            ops.StoredRows(state.store.rows, state.cache.rows),
            ops.Picks(selection.tokens, selection.slots, selection.hit),
            retrieval.estimate_of(selection, state.index),
            layer,
            scale=scale_of(selection.query),
        )
        cache = dataclasses.replace(state.cache, rows=zones.cache_rows)
        return zones, dataclasses.replace(state, cache=cache)

    def advance(self, state: WaveState, active: Bool[Array, " batch"]) -> WaveState:
        window = state.steady.window_tokens + active.astype(jnp.int32)
        steady = dataclasses.replace(state.steady, window_tokens=window)
        # A sequence that is not active has retrieved rows too, which the cache has counted.
        attended = state.attended + self.lengths(state) + 1
        return dataclasses.replace(state, steady=steady, step=state.step + 1, attended=attended)

    def counts(self, state: WaveState) -> Counts:
        return counts(state)

    def footprint(
        self, state: WaveState, shape: CacheShape, heads: int, prompt_tokens: int, dtype: DTypeLike
    ) -> Footprint:
        return wave_footprint(self.config, state, shape, heads, prompt_tokens, dtype)
