"""Bounds of the estimate beside the truth, on the queries of a real model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from models.parameters import Params
from pallas_kernels.numerics import log_sum_exp
from pallas_kernels.types import MASKED
from wavejax._pytree import state as pytree
from wavejax.attention.dense import DenseAttention, DenseState
from wavejax.attention.tolerance import bound_error
from wavejax.attention.wave import WaveAttention
from wavejax.engine.generator import Generator
from wavejax.evaluation.probe import MeasuredState, follow, wave_reads
from wavejax.evaluation.shared_prefill import SharedPrefill
from wavejax.evaluation.teacher_forcing import Answer

# What is measured of each query head of each layer and step: the norms of the exact output and of
# the output's error, the error's bound, and its sampled bound as a share of the exact output;
# logarithms of the estimated members' true mass, of its estimate, of its bounds, and of all mass.
FIGURES = (
    *("norm", "error", "error_bound", "sampled_bound"),
    *("log_true", "log_estimate", "log_low", "log_high", "log_all"),
)


@pytree
class BoundsState(MeasuredState):
    """Full attention's cache, wave attention's state, and what the last step measured.

    Attributes:
        method: a `WaveState` with moments and spread.
        figures: `[layers, batch, heads, len(FIGURES)]` float32.
    """

    method: Any
    figures: Array

    @property
    def measured(self) -> tuple[Array, ...]:
        """The figures."""
        return (self.figures,)


@dataclasses.dataclass(frozen=True)
class BoundsProbe(DenseAttention):
    """Full attention that asks wave attention for its output and bounds, and compares.

    Attributes:
        method: whose settings have `bounds`.
    """

    method: WaveAttention = dataclasses.field(default_factory=WaveAttention)

    def decode(
        self,
        layer: Int[Array, ""],
        query: Float[Array, "batch 1 heads head_dim"],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        state: DenseState,
    ) -> tuple[Float[Array, "batch 1 heads head_dim"], BoundsState]:
        """See `DenseAttention`."""
        assert isinstance(state, BoundsState)
        output, dense = super().decode(layer, query, key, value, state)
        selection, method = self.method.select(layer, query, key, value, state.method)
        zones, method = self.method.attend(layer, selection, method)
        given = selection, zones, method, jnp.int32(0)
        found, sampled = bound_error(self.method.config, layer, *given)
        assert zones.bounds is not None
        full = output.reshape(found.shape).astype(jnp.float32)
        logits = self.logits(layer, query, dense)
        seen = (jnp.arange(dense.keys.shape[3]) <= dense.tokens[:, None])[:, None]
        read = wave_reads(self.method, layer, query, method, dense.keys.shape[3])

        def mass(tokens: Array) -> Array:
            return log_sum_exp(jnp.where(tokens[:, :, None], logits, MASKED), axis=-1)

        figures = jnp.stack(
            [
                jnp.linalg.norm(full, axis=-1),
                jnp.linalg.norm(found - full, axis=-1),
                zones.bounds.output_error,
                sampled,
                mass(seen & ~read),
                zones.logsumexps[-1],
                zones.bounds.log_mass_low,
                zones.bounds.log_mass_high,
                mass(jnp.broadcast_to(seen, read.shape)),
            ],
            axis=-1,
        )
        figures = figures.reshape(query.shape[0], query.shape[2], -1)
        return output, BoundsState(
            dense.keys, dense.values, dense.tokens, method, state.figures.at[layer].set(figures)
        )

    def grow(self, state: DenseState) -> DenseState:
        """See `DenseAttention`."""
        assert isinstance(state, BoundsState)
        return dataclasses.replace(state, method=self.method.grow(state.method))

    def advance(self, state: DenseState, active: Bool[Array, " batch"]) -> DenseState:
        """See `DenseAttention`."""
        assert isinstance(state, BoundsState)
        dense = super().advance(state, active)
        method = self.method.advance(state.method, active)
        return BoundsState(dense.keys, dense.values, dense.tokens, method, state.figures)


def measure_bounds(
    generator: Generator, params: Params, shared: SharedPrefill, answers: list[Answer]
) -> dict[str, np.ndarray]:
    """Measure bounds and truth on full attention's answer.

    Args:
        generator: wave attention's, whose settings have `bounds`.
        params: the model's.
        shared: full attention's prefill.
        answers: full attention's.

    Returns:
        by the names of `FIGURES`, `[steps, layers, batch, heads]` float32.
    """
    attention = generator.attention
    assert isinstance(attention, WaveAttention)
    state, dense = shared.state(generator), shared.dense
    model, batch = generator.model_config, dense.finished.shape[0]
    full = jax.tree.map(jnp.copy, dense.attention_state)
    shape = (model.num_layers, batch, model.num_heads, len(FIGURES))
    cache = BoundsState(
        full.keys, full.values, full.tokens, state.attention_state, jnp.zeros(shape)
    )
    state = dataclasses.replace(state, attention_state=cache)
    probing = dataclasses.replace(generator, attention=BoundsProbe(method=attention))
    [figures] = follow(probing, params, state, answers)
    return dict(zip(FIGURES, np.moveaxis(figures, -1, 0), strict=True))
