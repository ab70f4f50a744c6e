"""The ops of a decode step with moments, as `op_cases` has those without."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from op_cases import OpCase, StepBench

from pallas_kernels.testing.moments import make_correction
from pallas_kernels.types import Correction

# The op, the moments' rank, and how they are kept: asked for by name only.
MOMENT_OPS = tuple(
    f"{op}-rank{rank}{kind}"
    for op in ("score_clusters", "attend_zones")
    for rank in (2, 4)
    for kind in ("", "-int8")
)


def case_of(bench: StepBench, name: str) -> OpCase:
    """Return the case of one of `MOMENT_OPS`, or of an op without moments."""
    if name not in MOMENT_OPS:
        return bench.case(name)
    op, settings = name.split("-rank")
    rank, _, kind = settings.partition("-")
    x, shape = bench.inputs, bench.shape
    correction = make_correction(x, 0, rank=int(rank), dtype=kind or shape.dtype, scale=shape.scale)
    make = _score_clusters if op == "score_clusters" else _attend_zones
    return make(bench, correction)


def _score_clusters(bench: StepBench, correction: Correction) -> OpCase:
    without, scale = bench.case("score_clusters"), bench.shape.scale

    def call(layer: Array, operands: Any, state: Any) -> tuple[Any, Any]:
        *others, directions = operands
        keywords = {"scale": scale, "directions": directions}
        return bench.run("score_clusters", *others, layer, **keywords), state

    operands = (*without.operands, correction.moments.directions)
    moved = without.bytes + _vector_bytes(bench, correction) + correction.products.nbytes
    return OpCase(call, operands, without.links, moved)


def _attend_zones(bench: StepBench, correction: Correction) -> OpCase:
    """Return the case; that retrieved values are read a second time does not count as bytes."""
    without = bench.case("attend_zones")
    before, (*picks, estimate) = without.operands
    operands = before, (*picks, estimate._replace(correction=correction))
    moved = without.bytes + _vector_bytes(bench, correction) + correction.products.nbytes
    return OpCase(without.call, operands, without.links, moved, jnp.copy(without.state))


def _vector_bytes(bench: StepBench, correction: Correction) -> int:
    """Count the bytes of one layer's directions, or weights, of clusters in use."""
    vectors = correction.moments.directions
    *_, rank, head_dim = vectors.shape
    return bench.shape.rows * bench.shape.clusters * rank * head_dim * vectors.dtype.itemsize
