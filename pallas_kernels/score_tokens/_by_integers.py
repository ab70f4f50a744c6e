"""What one program of `score_tokens` does with an int8 query, or without codes."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels._numerics import LOG2_E
from pallas_kernels.score_tokens import _products
from pallas_kernels.score_tokens._members import (
    Members,
    find_members,
    find_members_of_granules,
)


def score(
    query: tuple[Any, Any, Any],
    logits_ref: Any,
    logsumexp_ref: Any,
    members: Members,
    codes_ref: Any,
    scales_ref: Any,
    at: tuple[Any, Any, Any],
    places: list[Any],
    count: Any,
    *,
    emulate: bool,
) -> list[Any]:
    """The masses' logarithms of slices of a row's candidates: `[threads]` float32 each.

    A slice has one candidate for each thread; all of them share what is read of the query.

    Args:
        query: refs of `_query.pack`'s results; None without codes.
        logits_ref, logsumexp_ref, codes_ref, scales_ref: the op's operands.
        members: the candidates.
        at: layer, sequence and kv head.
        places: for each slice, an even number of them, its places in the list of candidates:
            `[threads]` int32 each.
        count: int32, how many candidates there are.
        emulate: in plain JAX instead of CUDA's assembly.
    """
    _, b, h = at
    group = logits_ref.shape[2]
    fma = functools.partial(_products.multiply_add, emulate=emulate)

    def find(place: Any) -> tuple[Any, Any]:
        if emulate:
            return find_members(members, at, place, place < count)[1:]
        return find_members_of_granules(members, at, place)

    # Past the last one anything is read that is there, so that no load needs a mask.
    found = [find(place) for place in places]
    if codes_ref is not None:
        last = codes_ref.shape[3] - 1
        found = [(cluster, jnp.minimum(position, last)) for cluster, position in found]
        products = _of_codes(query[0], codes_ref, at, [x[1] for x in found], emulate)
        scales = [
            plt.load(scales_ref.at[*at, position]).astype(jnp.float32) for _, position in found
        ]
    # In binary logarithms, for which GPUs have instructions.
    estimates: list[list[Any]] = [[] for _ in places]
    for g in range(group):
        head = (b, h, jnp.int32(g))
        base = LOG2_E * plt.load(logsumexp_ref.at[head])
        if codes_ref is not None:
            factor, shift = (plt.load(ref.at[head]) for ref in query[1:])
        for s, (cluster, _) in enumerate(found):
            estimate = fma(plt.load(logits_ref.at[*head, cluster]), LOG2_E, -base)
            if codes_ref is not None:
                product = fma(products[s][g].astype(jnp.float32), factor, -shift)
                estimate = fma(scales[s], product, estimate)
            estimates[s].append(estimate)
    return [_products.log_sum_exp2(heads, emulate=emulate) for heads in estimates]


def _of_codes(
    fragments_ref: Any,
    codes_ref: Any,
    at: tuple[Any, Any, Any],
    positions: list[Any],
    emulate: bool,
) -> list[list[Any]]:
    """`_products.products` of the codes at each slice's positions."""
    _, b, h = at
    pairs, words = fragments_ref.shape[2], codes_ref.shape[-1]
    codes = [
        [plt.load(codes_ref.at[*at, position, jnp.int32(w)]) for w in range(words)]
        for position in positions
    ]

    def load(lane: Any, *index: int) -> Any:
        return plt.load(fragments_ref.at[b, h, *(jnp.int32(i) for i in index), lane])

    multiply = _products.emulated if emulate else _products.products
    return multiply(codes, load, pairs)
