"""The shapes of an attention's empty state: traced once, and no device is asked."""

import functools
from typing import Any

import jax
import numpy as np

from wavejax.attention.protocol import AnyAttention
from wavejax.store.shape import CacheShape


def state_shapes(
    attention: AnyAttention,
    shape: CacheShape,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: np.dtype,
    shortest_prompt: int,
) -> Any:
    """Return `jax.ShapeDtypeStruct`s in place of the arrays that `init_state` would make.

    Its arguments; the rows of an attention that keeps them in host memory are taken to be on the
    device, since placing an array there is no traced operation.
    """
    given = attention.on_device, shape, batch, prompt_tokens, new_tokens, dtype, shortest_prompt
    try:
        hash(attention)
    except TypeError:  # one's own, which a plan need not keep, and a generator refuses
        return _trace.__wrapped__(*given)
    return _trace(*given)


@functools.lru_cache(maxsize=1024)
def _trace(
    attention: AnyAttention,
    shape: CacheShape,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: np.dtype,
    shortest_prompt: int,
) -> Any:
    """Trace an empty state: tens of milliseconds, and a plan asks for dozens of them."""
    sizes = batch, prompt_tokens, new_tokens, dtype
    return jax.eval_shape(
        lambda: attention.init_state(shape, *sizes, shortest_prompt=shortest_prompt)
    )
