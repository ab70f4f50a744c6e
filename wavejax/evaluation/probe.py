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
class MeasuredState(DenseState):
    """Full attention's cache, and what the last step measured beside it; see `follow`."""

    @property
    def measured(self) -> tuple[Array, ...]:
        """Arrays of the last step, of fixed shapes."""
        raise NotImplementedError


@pytree
class ProbeState(MeasuredState):
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

    @property
    def measured(self) -> tuple[Array, ...]:
        """Recall and error."""
        return self.recall, self.error


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
    recall, error = follow(probing, params, state, answers)
    return recall, error


def follow(
    generator: Generator, params: Params, state: DecodeState, answers: list[Answer]
) -> list[np.ndarray]:
    """Feed answers token by token, and keep what each step measured; donates `state`.

    Args:
        generator: with an attention that measures.
        params: the model's.
        state: its `attention_state` is a `MeasuredState`.
        answers: what is fed, in parts.

    Returns:
        each array of `MeasuredState.measured`, a row a step: `[steps, ...]`.
    """
    found = []
    for part in answers:
        state, measured = _follow(generator, params, state, part.tokens, part.steps)
        found.append([np.asarray(each)[: part.steps] for each in measured])
    return [np.concatenate(each) for each in zip(*found, strict=True)]


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _follow(
    generator: Generator, params: Params, state: DecodeState, answer: Array, steps: Array
) -> tuple[DecodeState, tuple[Array, ...]]:
    carry_type = tuple[DecodeState, tuple[Array, ...]]

    def one_step(i: Array, carry: carry_type) -> carry_type:
        state, found = carry
        state = generator.feed(params, state, jnp.maximum(answer[i], 0))
        each = zip(found, _measured(state), strict=True)
        return state, tuple(room.at[i].set(measured) for room, measured in each)

    rooms = tuple(jnp.zeros((CHUNK, *each.shape), jnp.float32) for each in _measured(state))
    return lax.fori_loop(0, steps, one_step, (state, rooms))


def _measured(state: DecodeState) -> tuple[Array, ...]:
    assert isinstance(state.attention_state, MeasuredState)
    return state.attention_state.measured
