"""What one program of `score_tokens` does with an int8 query, or without codes."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend as plt
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.score_tokens import _products
from pallas_kernels.score_tokens._members import (
    Members,
    find_members,
    find_members_of_granules,
)
from pallas_kernels.score_tokens._query import WORDS
from pallas_kernels.toolbox import warp


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
    """Compute the masses' logarithms of slices of a row's candidates: `[threads]` float32 each.

    A slice has one candidate for each thread; all of them share what is read of the query.

    Args:
        query: refs of `_query.pack`'s results; None without codes.
        logits_ref, logsumexp_ref, codes_ref, scales_ref: the op's operands.
        members: the candidates.
        at: layer, sequence and kv head.
        places: for each slice its places in the list of candidates: `[threads]` int32 each.
        count: int32, how many candidates there are.
        emulate: in plain JAX instead of CUDA's assembly.
    """
    _, b, h = at
    group = logits_ref.shape[2]
    heads = [(b, h, jnp.int32(g)) for g in range(group)]
    fma = functools.partial(_products.multiply_add, emulate=emulate)
    # Past the last one anything is read that is there, so that no load needs a mask.
    if emulate:
        found = [find_members(members, at, place, place < count)[1:] for place in places]
    else:
        found = find_members_of_granules(members, at, places)
    if codes_ref is not None:
        last = codes_ref.shape[3] - 1
        positions = [jnp.minimum(position, last) for _, position in found]
        codes = [_read_codes(codes_ref, at, position, emulate) for position in positions]
        scales = [plt.load(scales_ref.at[*at, x]).astype(jnp.float32) for x in positions]
    logits = [[plt.load(logits_ref.at[*head, c]) for head in heads] for c, _ in found]
    # In binary logarithms, for which GPUs have instructions.
    bases = [LOG2_E * plt.load(logsumexp_ref.at[head]) for head in heads]
    estimates = [
        [fma(x, LOG2_E, -base) for x, base in zip(of_slice, bases, strict=True)]
        for of_slice in logits
    ]
    if codes_ref is not None:
        right = _read_query(query[0], at, places[0].shape[0])
        if not emulate:
            words = [word for of_slice in codes for four in of_slice for word in four]
            read = [*words, *scales, *(x for of_slice in logits for x in of_slice)]
            # What all products begin with.
            right[0][0] = warp.after(right[0][0], read)
        units = [[plt.load(ref.at[head]) for ref in query[1:]] for head in heads]
        for s, (words, scale) in enumerate(zip(codes, scales, strict=True)):
            products = _products.products(words, right, group, emulate=emulate)
            for g, (product, (factor, shift)) in enumerate(zip(products, units, strict=True)):
                product = fma(product.astype(jnp.float32), factor, -shift)
                estimates[s][g] = fma(scale, product, estimates[s][g])
    return [_products.log_sum_exp2(of_slice, emulate=emulate) for of_slice in estimates]


def _read_query(fragments_ref: Any, at: tuple[Any, Any, Any], threads: int) -> list[list[Any]]:
    """Read what lanes hold of the query, as `_products.products` takes it."""
    _, b, h = at
    lane = warp.lanes(threads)

    def load(*index: int) -> Any:
        return plt.load(fragments_ref.at[b, h, *(jnp.int32(i) for i in index), lane])

    rounds, *each = fragments_ref.shape[2:-1]
    return [[load(r, *index) for index in np.ndindex(*each)] for r in range(rounds)]


def _read_codes(codes_ref: Any, at: tuple[Any, Any, Any], position: Any, emulate: bool) -> Any:
    """Each lane's words of the codes of its quad's tokens, as `_products.products` takes them.

    Args:
        codes_ref: the op's operand.
        at: layer, sequence and kv head.
        position: `[threads]` int32, of the lanes' own tokens.
        emulate: in plain JAX instead of CUDA's assembly.
    """
    words, rows = codes_ref.shape[-1], _products.rows_of_quad(position, emulate=emulate)
    word = warp.lanes(position.shape[0]) & (WORDS - 1)
    # Past the last word the query is zero.
    return [
        [plt.load(codes_ref.at[*at, row, jnp.minimum(first + word, words - 1)]) for row in rows]
        for first in range(0, words, WORDS)
    ]
