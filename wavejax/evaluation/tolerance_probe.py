"""Output error and its sampled bound at several budgets of each step: what a tolerance goes by."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

import pallas_kernels as ops
from models.parameters import Params
from pallas_kernels.types import NO_ID, ClusterScores
from wavejax._pytree import state as pytree
from wavejax.attention import retrieval
from wavejax.attention.dense import DenseAttention, DenseState
from wavejax.attention.protocol import scale_of
from wavejax.attention.tolerance import retrieve_within, select_by_budget, with_most
from wavejax.attention.wave import WaveAttention
from wavejax.config import WaveConfig
from wavejax.engine.generator import DecodeState, Generator
from wavejax.evaluation.probe import MeasuredState, follow
from wavejax.evaluation.teacher_forcing import Answer
from wavejax.store.state import WaveState


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a sample's steps come to: at tolerances, and at fixed budgets.

    Attributes:
        error: `[steps, cases, layers, batch, kv_heads, group]` float32, of the output:
            |output - exact| / |exact|. The cases are the settings' own budget, the tolerances in
            their order, then the other budgets.
        bound: the same shape, float32, the sampled bound of it; zeros for the other budgets.
        rows: `[steps, cases, layers, batch, kv_heads]` float32, tokens that the output rests on.
        retrieved: the same shape, float32, those of earlier turns too.
        turns: the same shape, float32, of the layer, in each of which tokens are drawn in all its
            heads; 0 for budgets.
    """

    error: np.ndarray
    bound: np.ndarray
    rows: np.ndarray
    retrieved: np.ndarray
    turns: np.ndarray


def ladder(config: WaveConfig, tokens: int) -> list[int]:
    """Return the budgets that a head past its tolerance goes through, after its first one.

    Args:
        config: the settings.
        tokens: that there is room for in the index.
    """
    first = config.most_retrieved(tokens)
    cap = min(first * config.tolerance_cap, tokens)
    steps = math.ceil(math.log2(cap / first))
    return [min(first * 2**turn, cap) for turn in range(1, steps + 1)]


@pytree
class BudgetsState(MeasuredState):
    """Full attention's cache, wave attention's state, and what the last step measured.

    Attributes:
        method: a `WaveState`.
        limits: `[limits]` float32, tolerances: data, as the budgets, so that one program serves
            all.
        budgets: `[budgets]` int32, tokens to retrieve.
        figures: as in `Measured`, without steps.
    """

    method: Any
    limits: Array
    budgets: Array
    figures: tuple[Array, ...]

    @property
    def measured(self) -> tuple[Array, ...]:
        """The figures."""
        return self.figures


@dataclasses.dataclass(frozen=True)
class BudgetsProbe(DenseAttention):
    """Full attention that asks wave attention the same at tolerances and budgets, and compares.

    Attributes:
        method: wave attention with a tolerance, rows on the device. Its own budget is the first
            case. Others are found among the candidates of a tolerance's later turns.
        most: of a budget.
    """

    method: WaveAttention = dataclasses.field(default_factory=WaveAttention)
    most: int = 1

    def decode(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        state: DenseState,
    ) -> tuple[Float[Array, "batch 1 heads head_dim"], BudgetsState]:
        """See `DenseAttention`."""
        assert isinstance(state, BudgetsState)
        output, dense = super().decode(layer, query, key, value, state)
        config, attend = self.method.config, functools.partial(self.method.attend, layer)
        selection, selected = self.method.select(layer, query, key, value, state.method)
        zones, method = attend(selection, selected)
        batch, kv_heads = selection.query.shape[:2]
        exact = output.reshape(selection.query.shape).astype(jnp.float32)
        norm = jnp.maximum(jnp.linalg.norm(exact, axis=-1), 1e-30)

        def figures(output: Array, bound: Array, rows: Array, *more: Array) -> tuple[Array, ...]:
            error = jnp.linalg.norm(output - exact, axis=-1) / norm
            wide = (jnp.broadcast_to(x, rows.shape).astype(jnp.float32) for x in (rows, *more))
            return error, bound, *wide

        def within(limit: Array) -> tuple[Array, ...]:
            limits = jnp.full(batch, limit)
            kept = retrieve_within(config, layer, selection, zones, method, attend, limits)
            rows = jnp.minimum(kept.budget, method.index.tokens[:, None])
            return figures(kept.output, kept.bound, rows, kept.retrieved, kept.turns)

        wide = with_most(config, self.most)

        def at(budget: Array) -> tuple[Array, ...]:
            given = jnp.full((batch, kv_heads), budget)
            chosen, before = select_by_budget(wide, layer, selection.query, given, method)
            found, _ = attend(chosen, before)
            output, _ = ops.merge_states(found.outputs, found.logsumexps)
            rows = jnp.sum(chosen.tokens != NO_ID, axis=-1, dtype=jnp.float32)
            return figures(output, jnp.zeros_like(norm), rows, rows, jnp.float32(0))

        # Within infinity all heads are at once.
        limits = jnp.concatenate([jnp.full(1, jnp.inf), state.limits])
        parts = zip(lax.map(within, limits), lax.map(at, state.budgets), strict=True)
        together = (jnp.concatenate(part) for part in parts)
        found = (room.at[:, layer].set(x) for room, x in zip(state.figures, together, strict=True))
        cache = dense.keys, dense.values, dense.tokens
        return output, BudgetsState(*cache, method, state.limits, state.budgets, tuple(found))

    def grow(self, state: DenseState) -> DenseState:
        """See `DenseAttention`."""
        assert isinstance(state, BudgetsState)
        return dataclasses.replace(state, method=self.method.grow(state.method))

    def advance(self, state: DenseState, active: Bool[Array, " batch"]) -> DenseState:
        """See `DenseAttention`."""
        assert isinstance(state, BudgetsState)
        dense = super().advance(state, active)
        method = self.method.advance(state.method, active)
        cache = dense.keys, dense.values, dense.tokens
        return BudgetsState(*cache, method, state.limits, state.budgets, state.figures)


def measure_budgets(
    generator: Generator,
    params: Params,
    state: DecodeState,
    dense: DecodeState,
    answers: list[Answer],
    limits: list[float],
    budgets: list[int],
    most: int,
) -> Measured:
    """Measure wave attention on full attention's answer, at tolerances and at budgets.

    Args:
        generator: wave attention's with a tolerance, rows on the device.
        params: the model's.
        state: the generator's, after the prompt; donated.
        dense: full attention's, after the prompt.
        answers: full attention's.
        limits: the tolerances; as many in every call, as of budgets: one program then serves all.
        budgets: tokens to retrieve.
        most: of them, in any call.
    """
    attention = generator.attention
    assert isinstance(attention, WaveAttention)
    full: Any = jax.tree.map(jnp.copy, dense.attention_state)
    wave: Any = state.attention_state
    cache = start_probe(full, wave, limits, budgets, heads=generator.model_config.num_heads)
    state = dataclasses.replace(state, attention_state=cache)
    probing = dataclasses.replace(generator, attention=BudgetsProbe(method=attention, most=most))
    return Measured(*follow(probing, params, state, answers))


def start_probe(
    full: DenseState, method: WaveState, limits: list[float], budgets: list[int], *, heads: int
) -> BudgetsState:
    """Return a probe's state: full attention's, wave attention's, and room for `heads` heads."""
    layers, batch, kv_heads = full.keys.shape[:3]
    shape = (1 + len(limits) + len(budgets), layers, batch, kv_heads)
    of_heads = (jnp.zeros((*shape, heads // kv_heads)) for _ in range(2))
    figures = (*of_heads, *(jnp.zeros(shape) for _ in range(3)))
    given = jnp.asarray(limits, jnp.float32), jnp.asarray(budgets, jnp.int32)
    return BudgetsState(full.keys, full.values, full.tokens, method, *given, figures)


@pytree
class BudgetedState(WaveState):
    """Wave attention's state, and how many tokens each kv head is to retrieve.

    Attributes:
        budget: int32 scalar; None in no state that is used.
    """

    budget: Array | None = None


@dataclasses.dataclass(frozen=True)
class BudgetedAttention(WaveAttention):
    """Wave attention whose budget is data: one program serves all budgets up to its settings'."""

    def retrieve(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch kv_heads group head_dim"],
        scores: ClusterScores,
        state: WaveState,
    ) -> ops.Retrieved:
        """See `WaveAttention`."""
        assert isinstance(state, BudgetedState)
        assert state.budget is not None
        config, index, scale = self.config, state.index, scale_of(query)
        chosen = retrieval.select_clusters(config, query, scores, index, layer, scale=scale)
        masses = retrieval.score_tokens(config, query, scores, chosen, index, layer, scale=scale)
        budget = jnp.broadcast_to(state.budget, query.shape[:2])
        where = index, state.cache.table, layer, state.step
        return retrieval.select_tokens(config, masses, chosen, *where, budget=budget)


def with_budget(state: DecodeState, budget: int) -> DecodeState:
    """Make a wave state one of `BudgetedAttention`, without a tolerance."""
    wave = state.attention_state
    fields = {field.name: getattr(wave, field.name) for field in dataclasses.fields(WaveState)}
    budgeted = BudgetedState(**fields | {"tolerance": None}, budget=jnp.int32(budget))
    return dataclasses.replace(state, attention_state=budgeted)


def with_tolerance(state: DecodeState, tolerance: float) -> DecodeState:
    """Give all sequences of a wave state with a tolerance another one."""
    wave: Any = state.attention_state
    limits = jnp.full_like(wave.tolerance.limits, tolerance)
    kept = dataclasses.replace(wave.tolerance, limits=limits)
    return dataclasses.replace(state, attention_state=dataclasses.replace(wave, tolerance=kept))
