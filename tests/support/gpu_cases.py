"""What the tests on a GPU share: the cases, their float32 references, and how results compare."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as ops
from pallas_kernels.select_tokens import empty_table
from pallas_kernels.shapes import SHAPES, StepShape
from pallas_kernels.testing import StepInputs, make_step
from pallas_kernels.types import MASKED, NO_ID
from tests.support.zone_operands import zone_operands

# Fresh numbers every run; a failure's message and WAVEJAX_SEED bring a run's back.
SEED = int(os.environ.get("WAVEJAX_SEED", int.from_bytes(os.urandom(3), "little")))
LAYER = 1
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, and what is special about its inputs."""

    shape: StepShape
    layers: int = 2
    ragged: bool = True
    miss_share: float = 0.3
    store: str = "device"
    codes: bool = True
    cached: bool = True

    def __str__(self):
        parts = [self.shape.name, self.shape.dtype, self.store]
        parts += ["no_codes"] * (not self.codes) + ["no_cache"] * (not self.cached)
        return "-".join(parts)


def shape(name: str, **changes: Any) -> StepShape:
    return dataclasses.replace(SHAPES[name], **changes)


# Every head dim, group size, dtype and kind of store, not all of their combinations.
CASES = (
    Case(shape("llama"), layers=3),
    Case(shape("llama", dtype="float32"), miss_share=1.0),
    Case(shape("qwen", dtype="float16"), store="host"),
    Case(shape("smollm2", dtype="float32"), store="host"),
    Case(shape("gemma"), miss_share=0.0),
    Case(shape("phi"), store="host", miss_share=1.0),
    Case(shape("phi", dtype="float32")),
    Case(shape("wide"), codes=False),
    # Clusters of eight, as short contexts have.
    Case(shape("smollm2", clusters=1024, max_cluster_size=16), store="host"),
    # Misses, since rows that hit are poison in the store.
    Case(shape("qwen"), miss_share=1.0, cached=False),
    Case(shape("smollm2", dtype="float32"), miss_share=1.0, cached=False),
    # One sequence, nothing else but many clusters.
    Case(shape("batch1-1m-2heads"), ragged=False),
)


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case) -> StepInputs:
    inputs = make_step(
        case.shape,
        SEED,
        layers=case.layers,
        ragged=case.ragged,
        # A million rows in two versions of two layers would be much for a test.
        poison=case.shape.tokens < 500_000,
        miss_share=case.miss_share,
        store=case.store,  # type: ignore[arg-type]
    )
    if not case.cached:
        row, tokens = inputs.store.shape[:3], case.shape.tokens
        inputs = inputs._replace(
            table=empty_table(row, tokens, 0),
            cache_rows=inputs.cache_rows[:, :, :, :0],
            slots=jnp.full_like(inputs.slots, NO_ID),
            hit=jnp.zeros_like(inputs.hit),
        )
    return inputs if case.codes else inputs._replace(codes=None, scales=None)


def arguments(op: str, case: Case, x: StepInputs, made: dict[str, Any]) -> tuple[Any, dict]:
    """An op's operands but for what comes after them, from the inputs and the ops before it."""
    s, layer = case.shape, jnp.int32(LAYER)
    scores = made.get("score_clusters")
    chosen = made.get("select_clusters")
    if op == "score_clusters":
        return (x.query, x.centroids, x.offsets, layer), {"scale": s.scale}
    if op == "select_clusters":
        operands = (*scores[:2], x.offsets, layer, x.candidate_budget)
        return operands, {"max_candidates": s.max_candidates}
    if op == "score_tokens":
        codes = None if x.codes is None else ops.TokenCodes(x.codes, x.scales)
        scores = scores._replace(rotated=x.rotated_query)
        return (scores, chosen, x.offsets, codes, layer), {
            "scale": s.scale,
            "max_candidates": s.max_candidates,
        }
    if op == "select_tokens":
        indexed = ops.IndexedTokens(x.offsets, x.token_ids, x.prompt_tokens)
        ranked = ops.RankedTokens(made["score_tokens"], chosen, x.retrieved_budget)
        return (ranked, indexed, x.table, layer, x.step), {"settings": s.selection}
    if op == "attend_zones":
        # The inputs' are the first layer's: this layer's clusters may have fewer members, or none.
        remaining = jnp.minimum(x.remaining, jnp.diff(x.offsets[layer], axis=-1))
        arrays = x._asdict() | {"remaining": remaining, "logits": scores.logits}
        return (*zone_operands(arrays), layer), {"scale": s.scale}
    raise ValueError(op)


def upcast(x: StepInputs) -> StepInputs:
    """The same in float32, the store on the device."""
    x = x._replace(store=jax.device_put(x.store, jax.memory.Space.Device))
    floats = (jnp.bfloat16, jnp.float16)
    return jax.tree.map(lambda y: y.astype(jnp.float32) if y.dtype in floats else y, x)


@functools.lru_cache(maxsize=1)
def references_of(case: Case) -> dict[str, Any]:
    """Every op's result in float32 by plain JAX, each from the results before it."""

    @jax.jit
    def run(x: StepInputs) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for op in ("score_clusters", "select_clusters", "score_tokens", "select_tokens"):
            operands, keywords = arguments(op, case, x, made)
            made[op] = getattr(ops, op)(*operands, **keywords, implementation="xla")
        operands, keywords = arguments("attend_zones", case, x, made)
        zones = ops.attend_zones(*operands, **keywords, implementation="xla")
        # Only what the layer's own rows hold: the stack's other layers are not to change.
        made["attend_zones"] = zones._replace(cache_rows=ops.Rows(zones.cache_rows.data[LAYER]))
        return made

    return jax.block_until_ready(run(upcast(inputs_of(case))))


def poison_free_memory() -> None:
    """Fills memory with NaN and frees it: what is then allocated there and not written shows."""
    blocks = [jnp.full(1 << size, jnp.nan) for size in range(10, 27) for _ in range(2)]
    jax.block_until_ready(blocks)
    for block in blocks:
        block.delete()


def run_twice(function: Any, *operands: Any) -> Any:
    """A compiled call's result, which must be the same to the bit when run again."""
    program = jax.jit(function)
    results = []
    for _ in range(2):
        poison_free_memory()
        results.append(jax.tree.map(np.asarray, program(*operands)))
    for first, second in zip(*map(jax.tree.leaves, results), strict=True):
        assert first.tobytes() == second.tobytes(), f"two runs differ (WAVEJAX_SEED={SEED})"
    return results[0]


def assert_close(found: Any, expected: Any, dtype: str, what: str) -> None:
    """Asserts on the norm of the difference; both must be masked in the same places."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    present = expected > MASKED / 2
    assert not np.isnan(found).any(), f"{what}: NaN (WAVEJAX_SEED={SEED})"
    np.testing.assert_array_equal(found > MASKED / 2, present, err_msg=f"{what}, seed {SEED}")
    norm = max(float(np.linalg.norm(expected[present])), 1e-30)
    error = float(np.linalg.norm((found - expected)[present])) / norm
    assert error < TOLERANCE[dtype], f"{what}: off by {error:.1e} (WAVEJAX_SEED={SEED})"


def assert_same(found: Any, expected: Any) -> None:
    """Asserts that two pytrees of integers are equal, naming the field that is not."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(
            np.asarray(x), np.asarray(y), err_msg=f"{jax.tree_util.keystr(path)}, seed {SEED}"
        )


def assert_table_is_inverse(table: Any) -> None:
    """Asserts that each slot's token names that slot, and no other token does."""
    owner, slot_of_token = np.asarray(table.token_of_slot), np.asarray(table.slot_of_token)
    taken = owner >= 0
    back = np.take_along_axis(slot_of_token, np.where(taken, owner, 0), axis=-1)
    slots = np.broadcast_to(np.arange(owner.shape[-1]), owner.shape)
    np.testing.assert_array_equal(back[taken], slots[taken])
    np.testing.assert_array_equal((slot_of_token >= 0).sum(-1), taken.sum(-1))
