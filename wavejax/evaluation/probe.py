"""A method's attention beside full attention's, on the same queries: recall of mass, and error."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from models.parameters import Params
from pallas_kernels.types import MASKED, NO_ID
from wavejax._pytree import state as pytree
from wavejax.attention import retrieval
from wavejax.attention.dense import DenseAttention, DenseState
from wavejax.attention.wave import WaveAttention, WaveState, scale_of
from wavejax.engine.generator import DecodeState, Generator
from wavejax.evaluation.baselines import SparseAttention
from wavejax.evaluation.shared_prefill import SharedPrefill
from wavejax.evaluation.teacher_forcing import CHUNK, Answer


@pytree
class ProbeState(DenseState):
    """Full attention's cache, the method's, and what the last step measured.

    Attributes:
        method: the method's state, `SparseState` or `WaveState`.
        recall: `[layers, batch, heads]` float32, the share of the attention mass that lies on
            tokens that the method read exactly.
        error: `[layers, batch, heads]` float32, |output - full output| / |full output|.
    """

    method: Any
    recall: Array
    error: Array


@dataclasses.dataclass(frozen=True)
class ProbeAttention(DenseAttention):
    """Full attention that asks a method the same at every step, and compares.

    What it gives is full attention's output: an error in one layer is no other layer's.

    Attributes:
        method: the attention that is measured.
    """

    method: SparseAttention | WaveAttention = dataclasses.field(default_factory=WaveAttention)

    def decode(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        state: DenseState,
    ) -> tuple[Float[Array, "batch 1 heads head_dim"], ProbeState]:
        """See `DenseAttention`."""
        assert isinstance(state, ProbeState)
        output, dense = super().decode(layer, query, key, value, state)
        method: Any
        other, method = self.method.decode(layer, query, key, value, state.method)
        asked: Any = self.method
        if asked.has_index:
            read = wave_reads(asked, layer, query, method, state.keys.shape[3])
        else:
            read = asked.read(layer, query, method)
        full, other = output[:, 0].astype(jnp.float32), other[:, 0].astype(jnp.float32)
        error = jnp.linalg.norm(other - full, axis=-1) / jnp.linalg.norm(full, axis=-1)
        return output, ProbeState(
            dense.keys,
            dense.values,
            dense.tokens,
            method,
            state.recall.at[layer].set(self._recall(layer, query, dense, read)),
            state.error.at[layer].set(error),
        )

    def _recall(self, layer: Array, query: Array, dense: DenseState, read: Array) -> Array:
        logits = self.logits(layer, query, dense)
        seen = jnp.arange(dense.keys.shape[3]) <= dense.tokens[:, None]
        mass = jax.nn.softmax(jnp.where(seen[:, None, None], logits, MASKED), axis=-1)
        recall = jnp.sum(jnp.where(read[:, :, None], mass, 0), axis=-1)
        return recall.reshape(query.shape[0], query.shape[2])

    def grow(self, state: DenseState) -> DenseState:
        """See `DenseAttention`."""
        assert isinstance(state, ProbeState)
        return dataclasses.replace(state, method=self.method.grow(state.method))

    def advance(self, state: DenseState, active: Bool[Array, " batch"]) -> DenseState:
        """See `DenseAttention`."""
        assert isinstance(state, ProbeState)
        dense = super().advance(state, active)
        method = self.method.advance(state.method, active)
        return ProbeState(dense.keys, dense.values, dense.tokens, method, state.recall, state.error)


def wave_reads(
    attention: WaveAttention,
    layer: Int[Array, ""],
    query: Float[Array, "batch 1 heads head_dim"],
    state: WaveState,
    room: int,
) -> Bool[Array, "batch kv_heads tokens"]:
    """Return the tokens that wave attention reads exactly in a step, its own included.

    Args:
        attention: its settings.
        layer: which layer.
        query: the step's.
        state: in the step, its own row taken in; without `min_token_mass` before it says the same.
        room: the length of the result.
    """
    index, steady = state.index, state.steady
    kv_heads, head_dim = index.centroids.shape[2], query.shape[-1]
    grouped = query.reshape(query.shape[0], kv_heads, -1, head_dim)
    scale = scale_of(query)
    scores = retrieval.score_clusters(grouped, index, layer, scale=scale)
    retrieved = attention.retrieve(layer, grouped, scores, state)
    sinks = steady.sink_tokens[:, None]
    indexed_end = sinks + index.tokens[:, None]
    place = jnp.arange(room)
    newest = attention.lengths(state)[:, None]
    exact = (place < sinks) | ((place >= indexed_end) & (place <= newest))
    b, h = jnp.arange(query.shape[0])[:, None, None], jnp.arange(kv_heads)[None, :, None]
    # Rows of the store begin after the sinks.
    missing = retrieved.tokens == NO_ID
    places = jnp.where(missing, NO_ID, retrieved.tokens + sinks[:, None])
    read = jnp.broadcast_to(exact[:, None], (query.shape[0], kv_heads, room))
    return read.at[b, h, places].set(True, mode="drop")


def probe(
    generator: Generator, params: Params, shared: SharedPrefill, answers: list[Answer]
) -> tuple[np.ndarray, np.ndarray]:
    """Measures a method on full attention's answer.

    Args:
        generator: the method's, with `SparseAttention` or `WaveAttention`.
        params: the model's.
        shared: full attention's prefill.
        answers: full attention's.

    Returns:
        recall, error: `[steps, layers, batch, heads]` float32; see `ProbeState`.
    """
    attention: Any = generator.attention
    state, dense = shared.state(generator), shared.dense
    model, batch = generator.model_config, dense.finished.shape[0]
    shape = (model.num_layers, batch, model.num_heads)
    full = jax.tree.map(jnp.copy, dense.attention_state)
    cache = ProbeState(
        *(full.keys, full.values, full.tokens, state.attention_state),
        *(jnp.zeros(shape), jnp.zeros(shape)),
    )
    state = dataclasses.replace(state, attention_state=cache)
    probing = dataclasses.replace(generator, attention=ProbeAttention(method=attention))
    found = []
    for part in answers:
        state, recall, error = _probe(probing, params, state, part.tokens, part.steps)
        found.append((np.asarray(recall)[: part.steps], np.asarray(error)[: part.steps]))
    recalls, errors = zip(*found, strict=True)
    return np.concatenate(recalls), np.concatenate(errors)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _probe(
    generator: Generator, params: Params, state: DecodeState, answer: Array, steps: Array
) -> tuple[DecodeState, Array, Array]:
    carry_type = tuple[DecodeState, Array, Array]

    def one_step(i: Array, carry: carry_type) -> carry_type:
        state, recall, error = carry
        state = generator.feed(params, state, jnp.maximum(answer[i], 0))
        cache = _measured(state)
        return state, recall.at[i].set(cache.recall), error.at[i].set(cache.error)

    room = jnp.zeros((CHUNK, *_measured(state).recall.shape), jnp.float32)
    return lax.fori_loop(0, steps, one_step, (state, room, room))


def _measured(state: DecodeState) -> ProbeState:
    assert isinstance(state.attention_state, ProbeState)
    return state.attention_state
