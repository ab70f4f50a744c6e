"""`score_tokens` as a Triton kernel: one program scores a run of a row's candidates."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas, _tuning
from pallas_kernels._numerics import LOG2_E, MASKED
from pallas_kernels.score_tokens import _query
from pallas_kernels.score_tokens._members import find_members
from pallas_kernels.select_clusters.reference import Candidates


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block: candidates scored at once.
        integers: multiply the codes with an int8 query, in CUDA's assembly; otherwise with
            bfloat16 parts of the query, by Triton's `dot`.
        num_warps: see Triton.
    """

    block: int = 512
    integers: bool = True
    num_warps: int = 4


def heuristic(candidates: int, dtype: str) -> Config:
    """A config for shapes that were not tuned.

    An int8 query errs about as much as a bfloat16 one. Where the scales are float32, as in a
    model that is, it would be the largest error.
    """
    if dtype == "float32" or not _pallas.on_cuda():
        return Config(min(128, _pallas.tile(candidates, _pallas.DOT_TILE)), integers=False)
    return Config(min(512, _pallas.tile(candidates, 32)))


def _products_of_integers(
    query_ref: Any,
    codes_ref: Any,
    layer: Any,
    b: Any,
    h: Any,
    position: Any,
    valid: Any,
    emulate: bool,
) -> list[Any]:
    """Sums of each head's int8 query over each code's set bits: `[block]` int32 a head.

    Args:
        query_ref: `[batch, kv_heads, group, 8, words]` int32, from `_query.pack`.
    """
    _, _, group, lanes, words = query_ref.shape

    def of_head(g: int, w: int) -> list[Any]:
        at = (b, h, jnp.int32(g))
        return [plt.load(query_ref.at[*at, jnp.int32(k), jnp.int32(w)]) for k in range(lanes)]

    codes = [
        plt.load(codes_ref.at[layer, b, h, position, jnp.int32(w)], mask=valid, other=0)
        for w in range(words)
    ]
    query = [[of_head(g, w) for w in range(words)] for g in range(group)]
    return _query.products(codes, query, emulate=emulate)


def _kernel(
    query_ref: Any,
    steps_ref: Any,
    sums_ref: Any,
    logits_ref: Any,
    logsumexp_ref: Any,
    clusters_ref: Any,
    starts_ref: Any,
    granules_ref: Any,
    offsets_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    layer_ref: Any,
    log_mass_ref: Any,
    *,
    scale: float,
    head_dim: int,
    config: Config,
    emulate: bool,
) -> None:
    _, kv_heads, group, _ = logits_ref.shape
    part, row = pl.program_id(0), pl.program_id(1)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    place = part * config.block + jnp.arange(config.block)
    room = log_mass_ref.shape[-1]
    count = plt.load(starts_ref.at[b, h, jnp.int32(starts_ref.shape[-1] - 1)])
    inside = place < room

    @pl.when(part * config.block >= count)
    def fill() -> None:
        plt.store(
            log_mass_ref.at[b, h, place], jnp.full(config.block, MASKED, jnp.float32), mask=inside
        )

    @pl.when(part * config.block < count)
    def score() -> None:
        valid = place < count
        _, cluster, position = find_members(
            clusters_ref, starts_ref, granules_ref, offsets_ref, layer, b, h, place, valid
        )
        if codes_ref is not None:
            a = plt.load(scales_ref.at[layer, b, h, position], mask=valid, other=0)
            a = scale * a.astype(jnp.float32)
        estimates = []
        if codes_ref is None or config.integers:
            if codes_ref is not None:
                over_set = _products_of_integers(
                    query_ref, codes_ref, layer, b, h, position, valid, emulate
                )
            for g in range(group):
                at = (b, h, jnp.int32(g))
                estimate = plt.load(logits_ref.at[*at, cluster], mask=valid, other=0)
                estimate -= plt.load(logsumexp_ref.at[at])
                if codes_ref is not None:
                    # The sum over all bits, set ones counting 1 and others -1.
                    product = 2 * over_set[g] - plt.load(sums_ref.at[at])
                    estimate += a * (plt.load(steps_ref.at[at]) * product.astype(jnp.float32))
                estimates.append(estimate)
            log_mass = _query.log_sum_exp(estimates, emulate=emulate or not config.integers)
        else:
            product = _products_of_floats(
                query_ref, codes_ref, layer, b, h, position, valid, head_dim
            )
            heads = jnp.arange(_pallas.DOT_TILE)
            in_group = (heads < group)[None, :]
            estimate = plt.load(
                logits_ref.at[b, h, heads[None, :], cluster[:, None]],
                mask=valid[:, None] & in_group,
                other=0,
            )
            normaliser = plt.load(logsumexp_ref.at[b, h, heads], mask=heads < group, other=0)
            estimate -= normaliser[None, :]
            estimate = jnp.where(in_group, estimate + a[:, None] * product, MASKED)
            peak = jnp.max(estimate, axis=1)
            powers = jnp.exp2(LOG2_E * (estimate - peak[:, None]))
            log_mass = peak + jnp.log(jnp.sum(powers, axis=1))
        plt.store(log_mass_ref.at[b, h, place], jnp.where(valid, log_mass, MASKED), mask=inside)


def _products_of_floats(
    query_ref: Any,
    codes_ref: Any,
    layer: Any,
    b: Any,
    h: Any,
    position: Any,
    valid: Any,
    head_dim: int,
) -> Any:
    """Products of codes and query in the matrix units: `[block, DOT_TILE]` float32.

    Args:
        query_ref: `[batch, kv_heads, parts, group, head_dim]` bfloat16, from `_query.split`.
    """
    _, _, parts, group, _ = query_ref.shape
    dim = jnp.arange(_pallas.tile(head_dim))
    words = plt.load(
        codes_ref.at[layer, b, h, position[:, None], (dim // 32)[None, :]],
        mask=valid[:, None] & (dim < head_dim)[None, :],
        other=0,
    )
    bits = lax.shift_right_logical(
        words, jnp.broadcast_to((dim % 32)[None, :], words.shape).astype(jnp.uint32)
    )
    signs = jnp.where((bits & 1) == 1, 1.0, -1.0).astype(jnp.bfloat16)
    g = jnp.arange(_pallas.DOT_TILE)
    product = jnp.zeros((position.shape[0], _pallas.DOT_TILE), jnp.float32)
    for part in range(parts):
        query = plt.load(
            query_ref.at[b, h, jnp.int32(part), g[None, :], dim[:, None]],
            mask=(g < group)[None, :] & (dim < head_dim)[:, None],
            other=0,
        )
        product += jnp.dot(signs, query, preferred_element_type=jnp.float32)
    return product


def score_tokens(
    rotated_query: Array,
    logits: Array,
    logsumexp: Array,
    candidates: Candidates,
    offsets: Array,
    codes: Array | None,
    scales: Array | None,
    layer: Array | int,
    *,
    scale: float,
    max_candidates: int,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """See `pallas_kernels.score_tokens`.

    Raises:
        NotImplementedError: for head dims and groups that the kernel is not made for.
    """
    batch, kv_heads, group, head_dim = rotated_query.shape
    _pallas.check_heads("score_tokens", group, head_dim, rotated_query.dtype)
    if codes is not None and scales is None:
        raise NotImplementedError("score_tokens: codes without scales")
    dtype = jnp.dtype(jnp.float32 if scales is None else scales.dtype).name
    config = config or _tuning.config(
        "score_tokens",
        heuristic(max_candidates, dtype),
        candidates=max_candidates,
        head_dim=head_dim,
        group=group,
        dtype=dtype,
    )
    if codes is None:
        query: tuple[Any, Any, Any] = (None, None, None)
    elif config.integers:
        query = _query.pack(rotated_query, interpret=interpret)
    else:
        query = (_query.split(rotated_query), None, None)
    return _pallas.call(
        functools.partial(
            _kernel, scale=scale, head_dim=head_dim, config=config, emulate=interpret
        ),
        (
            *query,
            logits,
            logsumexp,
            candidates.clusters,
            candidates.starts,
            candidates.granules,
            offsets,
            codes,
            scales,
            _pallas.scalar(layer),
        ),
        jax.ShapeDtypeStruct((batch, kv_heads, max_candidates), jnp.float32),
        (pl.cdiv(max_candidates, config.block), batch * kv_heads),
        name="score_tokens",
        num_warps=config.num_warps,
        interpret=interpret,
    )
