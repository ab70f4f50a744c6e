"""Sparse decoding that the host manages: a baseline with keys and values in host memory.

Each layer of a step goes through these, one after the other:

1. The device makes the query and bounds its product with every page of 16 keys by the page's least
   and greatest key, which are in its memory (Quest, arXiv 2406.10774). It takes the best pages.
2. Their numbers go to the host.
3. Threads gather the pages into two pinned blocks, of keys and of values, and a copy sends each
   (`host_pages`).
4. The device attends to these pages, to the sinks and to the window, and ends the layer. The same
   program begins the next layer, so that a layer is one program.

It stands for systems that keep keys and values in host memory, choose on the device, and let the
host fetch the chosen ones in each layer of each step: Quest with its pages offloaded, and InfiniGen
(arXiv 2406.19707). RetroInfer (arXiv 2505.02922) reports its 10.5x over sparse attention with keys
and values in CPU memory.

The budget is wave attention's own, rounded up to whole pages. All kv heads and sequences are in one
gather. Pages are ranked as `wavejax.evaluation.baselines` ranks them, whose accuracy is recorded.
Scores, selection, attention and merging run in this project's own kernels.

`ahead` makes it guess a layer's pages one layer early, by the query that the input of the layer
before gives, as InfiniGen does. The host then gathers while the device works. The copy waits for
programs that were queued before it, as JAX's copies do. InfiniGen guesses with a part of the
query's weights and of the keys; here all weights and bounds are read.

It does not do these:

- It keeps no pages on the device from step to step, and fetches all that are chosen.
- It writes no new pages to the host: the tokens that a run generates stay in the window. Such a
  system would write them too, so this saves the baseline time.
- It estimates nothing: what is not chosen is left out.
"""

import collections
import contextlib
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from decode_model import clustered_rows, new_key
from host_pages import PAGE_TOKENS, HostPages
from host_programs import (
    Layout,
    Pending,
    Summaries,
    bounds_of,
    enter_step,
    leave_step,
    next_layer,
)
from jax import Array

from models.config import ModelConfig
from models.parameters import Params
from models.unstacked import only_layer, without_layers
from wavejax import DenseAttention, WaveConfig
from wavejax.attention.dense import DenseState
from wavejax.engine.prompts import bucket
from wavejax.store.shape import CacheShape

PHASES = ("ids", "gather")


@dataclasses.dataclass
class HostManaged:
    """All sequences' keys and values, and what decodes them.

    Attributes:
        model, layout: sizes.
        pages: in host memory.
        summaries: of them, on the device.
        steady: sinks, window and new tokens, on the device.
        ahead: whether pages are chosen a layer early.
        seconds: since they were set to zero, of steps: `ids`, the wait for the pages' numbers, all
            of the device's work in it; `gather`; the rest is Python's and JAX's.
    """

    model: ModelConfig
    layout: Layout
    pages: HostPages
    summaries: Summaries
    steady: DenseState
    ahead: bool = False
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(PHASES, 0.0)
    )

    def feed(self, params: Params, tokens: Array) -> Array:
        """Feed one token of each sequence, `[batch]`; return the logits, `[batch, vocab]`."""
        model, layout, ends = self.model, self.layout, without_layers(params)
        bounds, offsets = self.summaries
        layers = [only_layer(params, layer) for layer in range(model.num_layers)]
        early = 2 if self.ahead else 1
        first = ends, tuple(layers[:early]), tokens, self.steady, bounds[:early], offsets
        pending, self.steady = enter_step(model, layout, *first)
        chosen = collections.deque(_sent_for(pending))
        for layer in range(model.num_layers - 1):
            rows = self._fetch(layer, chosen.popleft())
            through = layer + 1 + early
            given = np.int32(layer), pending, rows, self.steady
            own = bounds[through - 1] if through <= model.num_layers else None
            pending, self.steady = next_layer(
                model, layout, tuple(layers[layer:through]), *given, own, offsets
            )
            chosen.extend(_sent_for(pending))
        rows = self._fetch(model.num_layers - 1, chosen.popleft())
        logits, self.steady = leave_step(model, ends, layers[-1], pending, rows, self.steady)
        return logits

    def _fetch(self, layer: int, ids: Array) -> tuple[Array, Array]:
        start = time.perf_counter()
        found = np.asarray(ids)
        self.seconds["ids"] += time.perf_counter() - start
        keys, values, seconds = self.pages.send(layer, found)
        self.seconds["gather"] += seconds
        return keys, values


def _sent_for(pending: Pending) -> tuple[Array, ...]:
    """Return the pages' numbers, on their way to the host."""
    for ids in pending.ids:
        ids.copy_to_host_async()
    return pending.ids


def fill(
    model: ModelConfig,
    config: WaveConfig,
    batch: int,
    context: int,
    new_tokens: int,
    dtype: str,
    threads: int = 0,
    *,
    ahead: bool = False,
) -> HostManaged:
    """Make the random keys and values that `decode_state.fill` makes, and summarise their pages.

    Args:
        model: sizes.
        config: says what is on the device, and the budget.
        batch: sequences.
        context: tokens of each.
        new_tokens: room for this many more.
        dtype: of keys and values.
        threads: see `HostPages`.
        ahead: see `HostManaged`.
    """
    layout = Layout.of(config, context)
    shape = model.num_layers, batch, model.num_kv_heads, layout.pages, model.head_dim
    pages = HostPages(shape, dtype, layout.chosen, threads)
    with contextlib.ExitStack() as failed:
        failed.callback(pages.close)  # or its helpers would wait for ever
        summaries, steady = _fill_pages(model, layout, pages, batch, context, new_tokens, dtype)
        failed.pop_all()
    return HostManaged(model, layout, pages, summaries, steady, ahead)


def _fill_pages(
    model: ModelConfig,
    layout: Layout,
    pages: HostPages,
    batch: int,
    context: int,
    new_tokens: int,
    dtype: str,
) -> tuple[Summaries, DenseState]:
    held = layout.sinks + layout.window
    steady = DenseAttention().init_state(CacheShape.of(model), batch, held, new_tokens, dtype)
    bounds = []
    for layer in range(model.num_layers):
        of_layer = []
        for sequence in range(batch):
            at = jnp.int32(layer), jnp.int32(sequence)
            keys, values, summary, steady = _make_layer(
                model, layout, bucket(context), dtype, *at, steady
            )
            pages.put(layer, sequence, keys, values)
            of_layer.append(summary)
        bounds.append(jnp.stack(of_layer)[None])
    offsets = jnp.broadcast_to(
        jnp.arange(layout.pages + 1, dtype=jnp.int32),
        (1, batch, model.num_kv_heads, layout.pages + 1),
    )
    steady = dataclasses.replace(steady, tokens=jnp.full(batch, held, jnp.int32))
    return Summaries(tuple(bounds), offsets), steady


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames="steady")
def _make_layer(
    model: ModelConfig,
    layout: Layout,
    room: int,
    dtype: str,
    layer: Array,
    sequence: Array,
    steady: DenseState,
) -> tuple[Array, Array, Array, DenseState]:
    """Return pages of keys and of values, `[kv_heads, pages, 16, head_dim]`, and their bounds."""
    key = jax.random.fold_in(jax.random.fold_in(new_key(1), layer), sequence)
    first, end = layout.sinks, layout.sinks + layout.pages * PAGE_TOKENS
    rows = clustered_rows(model, room, dtype, key)
    paged = []
    for new in rows:
        of_pages = jnp.swapaxes(new[first:end], 0, 1)
        paged.append(of_pages.reshape(len(of_pages), layout.pages, PAGE_TOKENS, -1))
    on_device = [jnp.concatenate([x[:first], x[end : end + layout.window]]) for x in rows]
    where = {"sequence": sequence, "length": jnp.int32(0)}
    steady = DenseAttention().write_prompt(layer, on_device[0], on_device[1], steady, **where)
    return paged[0], paged[1], bounds_of(paged[0]), steady
