"""The compiled programs of a decode step that the host manages; see `host_managed`."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from host_pages import PAGE_TOKENS
from jax import Array

import pallas_kernels as ops
from models import decoder
from models.config import ModelConfig
from models.errors import InputError
from models.parameters import Params
from pallas_kernels.types import Rows
from wavejax import DenseAttention, WaveConfig
from wavejax.attention.dense import DenseState


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each sequence's tokens are.

    Attributes:
        sinks: first tokens, on the device.
        pages: full pages after them, in host memory.
        window: last tokens of the prompt, on the device.
        chosen: pages of each kv head that a step fetches.
    """

    sinks: int
    pages: int
    window: int
    chosen: int

    @classmethod
    def of(cls, config: WaveConfig, context: int) -> "Layout":
        """Lay out a prompt with wave attention's sinks, window and budget.

        Raises:
            InputError: nothing is left for a page.
        """
        pages = max(0, config.indexed_tokens(context)) // PAGE_TOKENS
        if not pages:
            raise InputError(
                f"a context of {context} tokens has no page of {PAGE_TOKENS} beside the sinks and "
                "the window: give a longer one to a baseline that the host manages"
            )
        chosen = min(pages, -(-budget_of(config, context) // PAGE_TOKENS))
        sinks = config.sink_tokens
        return cls(sinks, pages, context - sinks - pages * PAGE_TOKENS, max(1, chosen))


def budget_of(config: WaveConfig, context: int) -> int:
    """Tokens of each kv head that wave attention retrieves in a step after such a prompt."""
    indexed = config.indexed_tokens(context)
    # Less a millionth, as the device counts it (`wavejax.attention.retrieval.budgets`).
    share = math.ceil(config.retrieval_fraction * (1 - 1e-6) * indexed)
    return min(indexed, max(config.min_retrieved_tokens, share))


class Summaries(NamedTuple):
    """What the device knows of pages in host memory.

    Attributes:
        bounds: of each layer, `[1, batch, kv_heads, pages, 2 * head_dim]`: the greatest number of
            the page's keys in each channel, then the least.
        offsets: `[1, batch, kv_heads, pages + 1]` int32, rising by one: the ops select clusters of
            tokens, and take a page for a cluster of one.
    """

    bounds: tuple[Array, ...]
    offsets: Array


class Pending(NamedTuple):
    """A layer that waits for its pages.

    Attributes:
        hidden: `[batch, 1, hidden]`, its input.
        query: `[batch, kv_heads, group, head_dim]`.
        ids: pages that were chosen meanwhile, of the next layers that none are chosen of:
            `[batch, kv_heads, chosen]` int32 each, rising.
    """

    hidden: Array
    query: Array
    ids: tuple[Array, ...]


def bounds_of(keys: Array) -> Array:
    """Return the greatest, then the least number of each page: `[..., pages, 2 * head_dim]`.

    Args:
        keys: `[..., pages, 16, head_dim]`.
    """
    return jnp.concatenate([jnp.max(keys, axis=-2), jnp.min(keys, axis=-2)], axis=-1)


def choose_pages(query: Array, bounds: Array, offsets: Array, chosen: int) -> Array:
    """Choose the pages of the greatest bounds.

    Of each query head, a softmax over the bounds; of the heads that share a kv head, its sum.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        bounds, offsets: of one layer; see `Summaries`.
        chosen: how many.

    Returns:
        `[batch, kv_heads, chosen]` int32, rising.
    """
    # A channel's bound is its greatest number where the query's is positive, else the least.
    both = jnp.concatenate([jnp.maximum(query, 0), jnp.minimum(query, 0)], axis=-1)
    scale = query.shape[-1] ** -0.5
    scores = ops.score_clusters(both, bounds, offsets, 0, scale=scale)
    budget = jnp.full(query.shape[0], chosen, jnp.int32)
    best = ops.select_clusters(
        scores.logits, scores.logsumexp, offsets, 0, budget, max_candidates=chosen
    )
    return best.clusters[..., :chosen]


def attend(query: Array, keys: Array, values: Array, layer: Array, steady: DenseState) -> Array:
    """Attend to the pages' tokens and to those on the device, the step's own among them.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        keys, values: of the pages, `[batch, kv_heads, tokens, head_dim]`.
        layer: int32, which layer of `steady`.
        steady: the step's own key and value are written, and not yet counted in `tokens`.

    Returns:
        as `query`, in its dtype.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    all_of_it = jnp.full(len(keys), keys.shape[2], jnp.int32)
    far = ops.attend_dense(query, Rows(keys[None]), Rows(values[None]), all_of_it, 0, scale=scale)
    held = steady.tokens + 1
    near = ops.attend_dense(query, steady.keys, steady.values, held, layer, scale=scale)
    parts = (jnp.stack(pair) for pair in zip(far, near, strict=True))
    return ops.merge_states(*parts, dtype=query.dtype)[0]


def _query(
    model: ModelConfig, layout: Layout, params: Params, layer: Array, hidden: Array, tokens: Array
) -> tuple[Array, Array, Array]:
    """Return a layer's query, `[batch, kv_heads, group, head_dim]`, and its new key and value."""
    positions = (tokens + layout.pages * PAGE_TOKENS)[:, None]
    weights = decoder.pick_layer(params, layer)
    query, key, value = decoder.enter_layer(model, weights, layer, hidden, positions)
    return query.reshape(len(query), model.num_kv_heads, -1, model.head_dim), key, value


def _end(
    model: ModelConfig,
    params: Params,
    layer: Array,
    pending: Pending,
    rows: tuple[Array, Array],
    steady: DenseState,
) -> Array:
    """Attend to the pages and to the device's tokens, and end the layer."""
    output = attend(pending.query, *rows, layer, steady)
    output = output.reshape(len(output), 1, model.num_heads, model.head_dim)
    return decoder.leave_layer(model, decoder.pick_layer(params, layer), pending.hidden, output)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="steady")
def enter_step(
    model: ModelConfig,
    layout: Layout,
    ends: Params,
    params: tuple[Params, ...],
    tokens: Array,
    steady: DenseState,
    bounds: tuple[Array, ...],
    offsets: Array,
) -> tuple[Pending, DenseState]:
    """Look up the tokens, begin the first layer, and choose pages.

    Args:
        model, layout: sizes.
        ends: the weights that are no layer's.
        params, bounds: of the layers to choose pages for: the first, or the first two.
        tokens: `[batch]` int32.
        steady: sinks, window and new tokens.
        offsets: see `Summaries`.
    """
    hidden = decoder.embed(model, ends, tokens[:, None])
    ids = []
    for number, (of_layer, own) in enumerate(zip(params, bounds, strict=True)):
        layer = jnp.int32(number)
        query, key, value = _query(model, layout, of_layer, layer, hidden, steady.tokens)
        ids.append(choose_pages(query, own, offsets, layout.chosen))
        if number == 0:
            first, appended = query, DenseAttention().append(layer, key, value, steady)
    return Pending(hidden, first, tuple(ids)), appended


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="steady")
def next_layer(
    model: ModelConfig,
    layout: Layout,
    params: tuple[Params, ...],
    layer: Array,
    pending: Pending,
    rows: tuple[Array, Array],
    steady: DenseState,
    bounds: Array | None,
    offsets: Array,
) -> tuple[Pending, DenseState]:
    """End a layer, begin the one after it, and choose pages.

    Args:
        model, layout: sizes.
        params: of the layer, of the one after it, and of the one after that if pages are chosen
            for it already, by what this one gets as input.
        layer: int32, which one ends.
        pending: the layer that ends.
        rows: its pages.
        steady: sinks, window and new tokens.
        bounds: of the last of these layers; None to choose none.
        offsets: see `Summaries`.
    """
    hidden = _end(model, params[0], layer, pending, rows, steady)
    query, key, value = _query(model, layout, params[1], layer + 1, hidden, steady.tokens)
    chooses = query
    if len(params) > 2:
        chooses, _, _ = _query(model, layout, params[2], layer + 2, hidden, steady.tokens)
    ids = () if bounds is None else (choose_pages(chooses, bounds, offsets, layout.chosen),)
    steady = DenseAttention().append(layer + 1, key, value, steady)
    return Pending(hidden, query, ids), steady


@functools.partial(jax.jit, static_argnums=0, donate_argnames="steady")
def leave_step(
    model: ModelConfig,
    ends: Params,
    params: Params,
    pending: Pending,
    rows: tuple[Array, Array],
    steady: DenseState,
) -> tuple[Array, DenseState]:
    """End the last layer, whose weights are `params`; return the logits, `[batch, vocab]`."""
    hidden = _end(model, params, jnp.int32(model.num_layers - 1), pending, rows, steady)
    normed = decoder.final_norm(model, ends, hidden[:, 0])
    everyone = jnp.ones(len(steady.tokens), bool)
    return decoder.unembed(model, ends, normed), DenseAttention().advance(steady, everyone)
