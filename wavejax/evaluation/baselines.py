"""Other ways to choose the tokens that a decode step reads, at wave attention's budget of tokens.

All keep full attention's cache and read the same steady zone as wave attention; of the tokens in
between, they read those of highest rank exactly, as many as it would retrieve, and nothing else.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from pallas_kernels.numerics import heaviest, log_sum_exp, ordered_bits
from pallas_kernels.rounding import dequantise
from pallas_kernels.types import MASKED
from wavejax._pytree import state as pytree
from wavejax.attention.dense import DenseAttention, DenseState
from wavejax.attention.retrieval import budgets
from wavejax.config import WaveConfig
from wavejax.store.shape import CacheShape

PAGE_TOKENS = 16
Rank = Literal["mass", "recency", "page_bound"]


@pytree
class SparseState(DenseState):
    """Full attention's cache, and where the prompts end.

    Attributes:
        prompt_tokens: `[batch]` int32, how many tokens came with each prompt.
    """

    prompt_tokens: Array


@dataclasses.dataclass(frozen=True)
class SparseAttention(DenseAttention):
    """Exact attention to the steady zone and to the tokens of highest rank; see `WaveAttention`.

    Query heads that share a kv head share what is chosen, as in wave attention: their masses are
    added up.

    Attributes:
        config: the steady zone's settings and the budget; the rest has no effect.
        rank: what ranks the tokens of a kv head.
            "mass": their true attention mass. An oracle: no method that estimates nothing can
            read more mass.
            "recency": their position, the newest first: StreamingLLM (arXiv 2309.17453) with its
            window extended to the budget.
            "page_bound": the upper bound of their page's logits by the page's least and greatest
            value in each channel: Quest (arXiv 2406.10774), in all layers. Pages have 16 tokens.
    """

    config: WaveConfig = dataclasses.field(default_factory=WaveConfig)
    rank: Rank = "mass"

    @property
    def state_type(self) -> type[SparseState]:
        """See `Attention`."""
        return SparseState

    def init_state(
        self,
        shape: CacheShape,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        dtype: DTypeLike,
        *,
        shortest_prompt: int = 1,
    ) -> SparseState:
        """Return an empty state with room for so many tokens a sequence."""
        dense = super().init_state(shape, batch, prompt_tokens, new_tokens, dtype)
        return _with_prompts(dense, jnp.zeros(batch, jnp.int32))

    def prefill(
        self,
        layer: Array,
        query: Array,
        key: Array,
        value: Array,
        state: DenseState,
        **where: Array,
    ) -> tuple[Array, SparseState]:
        """See `DenseAttention`."""
        output, dense = super().prefill(layer, query, key, value, state, **where)
        return output, _with_prompts(dense, _prompts(state))

    def finish_prefill(
        self, state: DenseState, sequence: Int[Array, ""], length: Int[Array, ""]
    ) -> SparseState:
        """See `DenseAttention`."""
        prompts = _prompts(state).at[sequence].set(length)
        return _with_prompts(super().finish_prefill(state, sequence, length), prompts)

    def decode(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        state: DenseState,
    ) -> tuple[Float[Array, "batch 1 heads head_dim"], SparseState]:
        """See `DenseAttention`."""
        new = self.append(layer, key, value, state)
        return self.attend(layer, query, new, self.read(layer, query, new)), new

    def append(self, layer: Array, key: Array, value: Array, state: DenseState) -> SparseState:
        """See `DenseAttention`."""
        return _with_prompts(super().append(layer, key, value, state), _prompts(state))

    def read(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        state: DenseState,
    ) -> Bool[Array, "batch kv_heads tokens"]:
        """Return the tokens that a step reads in one layer, its own already written."""
        place = jnp.arange(state.keys.shape[3])
        indexed = self._indexed(state)
        end = self.config.sink_tokens + indexed
        middle = (place >= self.config.sink_tokens) & (place < end[:, None])
        steady = ~middle & (place <= state.tokens[:, None])
        budget = budgets(self.config, indexed)[0]
        if self.rank == "page_bound":
            # Whole pages are read, so a page begun counts.
            budget = -(-budget // PAGE_TOKENS) * PAGE_TOKENS
        rank = jnp.where(middle[:, None], self._rank(layer, query, state, middle), MASKED)
        rows = jnp.broadcast_to(middle[:, None].astype(jnp.int32), rank.shape)
        row_budget = jnp.broadcast_to(budget[:, None], rank.shape[:2])
        return heaviest(ordered_bits(rank), rows, row_budget) | steady[:, None]

    def _indexed(self, state: DenseState) -> Array:
        """How many tokens wave attention would have in its index: `[batch]`."""
        config, prompts = self.config, _prompts(state)
        rest = prompts - config.sink_tokens
        indexed = jnp.where(rest < config.window_tokens, 0, rest - config.local_tokens)
        # Each time its window is full, the oldest `growth_tokens` of it move into the index.
        window = state.tokens - jnp.minimum(prompts, config.sink_tokens) - indexed
        growths = jnp.maximum(window - config.local_tokens, 0) // config.growth_tokens
        return indexed + growths * config.growth_tokens

    def _rank(self, layer: Array, query: Array, state: DenseState, middle: Array) -> Array:
        """`[batch, kv_heads, tokens]` float32; what it is outside the middle has no effect."""
        batch, kv_heads, tokens = *state.keys.shape[1:3], state.keys.shape[3]
        if self.rank == "recency":
            place = jnp.arange(tokens, dtype=jnp.float32)
            return jnp.broadcast_to(place, (batch, kv_heads, tokens))
        seen = jnp.arange(tokens) <= state.tokens[:, None]
        if self.rank == "mass":
            return _group_mass(self.logits(layer, query, state), seen[:, None, None])
        keys = dequantise(state.keys.of_layer(layer))
        bound = page_bounds(query, keys, middle, self.config.sink_tokens)
        mass = _group_mass(bound, bound > MASKED / 2)
        of_tokens = jnp.repeat(mass, PAGE_TOKENS, axis=-1)
        return jnp.pad(of_tokens, ((0, 0), (0, 0), (self.config.sink_tokens, 0)))[..., :tokens]


def page_bounds(
    query: Float[Array, "batch 1 heads head_dim"],
    keys: Float[Array, "batch kv_heads tokens head_dim"],
    valid: Bool[Array, "batch tokens"],
    first: int,
) -> Float[Array, "batch kv_heads group pages"]:
    """Upper bounds of the scaled products of queries and the keys of each page of 16 tokens.

    Args:
        query: one decode step's.
        keys: of which those that are not `valid` do not count.
        valid: of every head.
        first: where the first page begins.

    Returns:
        float32; about -1e30 for a page without valid tokens.
    """
    batch, kv_heads, tokens, head_dim = keys.shape
    pages = -(-(tokens - first) // PAGE_TOKENS)
    padding = pages * PAGE_TOKENS - (tokens - first)
    keys = jnp.pad(keys[:, :, first:], ((0, 0), (0, 0), (0, padding), (0, 0)))
    keys = keys.reshape(batch, kv_heads, pages, PAGE_TOKENS, head_dim).astype(jnp.float32)
    valid = jnp.pad(valid[:, first:], ((0, 0), (0, padding)))
    valid = valid.reshape(batch, 1, pages, PAGE_TOKENS, 1)
    least = jnp.min(jnp.where(valid, keys, jnp.inf), axis=3)
    greatest = jnp.max(jnp.where(valid, keys, -jnp.inf), axis=3)
    filled = jnp.any(valid, axis=(3, 4))
    least, greatest = (jnp.where(filled[..., None], x, 0) for x in (least, greatest))
    grouped = query.reshape(batch, kv_heads, -1, head_dim).astype(jnp.float32)
    # The greater of q * least and q * greatest in each channel, as two matrix products.
    bound = jnp.einsum("bhgd,bhpd->bhgp", jnp.maximum(grouped, 0), greatest)
    bound += jnp.einsum("bhgd,bhpd->bhgp", jnp.minimum(grouped, 0), least)
    return jnp.where(filled[:, :, None], bound / jnp.sqrt(head_dim), MASKED)


def _group_mass(logits: Array, valid: Array) -> Array:
    """Return the log of the masses by softmax, added up over the query heads of each kv head."""
    logits = jnp.where(valid, logits, MASKED)
    return log_sum_exp(logits - log_sum_exp(logits, axis=-1)[..., None], axis=2)


def _prompts(state: DenseState) -> Array:
    assert isinstance(state, SparseState)
    return state.prompt_tokens


def _with_prompts(dense: DenseState, prompts: Array) -> SparseState:
    return SparseState(dense.keys, dense.values, dense.tokens, prompts)
