"""A decode step and a prefill of one layer of a small model, as what lowers or compiles them."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.support.attention_harness import model_of
from wavejax.attention.protocol import AnyAttention
from wavejax.store.shape import CacheShape


def layer_programs(attention: AnyAttention, tokens: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """By name, "step" and "prefill": a function, and its operands: shapes, and a state of arrays.

    Of a shape nobody could tell in which memory it is.

    Args:
        attention: of two sequences; growth is part of the step.
        tokens: that there is room for in a prompt; it has a hundred less.
    """
    model = model_of(layers=2, kv_heads=2, group=3, head_dim=64)
    state = attention.init_state(CacheShape.of(model), 2, tokens, 100, jnp.bfloat16)

    def arrays(batch: int, tokens: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((batch, tokens, n, 64), jnp.bfloat16) for n in (6, 2, 2)]

    def step(query: Any, key: Any, value: Any, state: Any) -> Any:
        state = attention.grow(state)
        output, state = attention.decode(jnp.int32(1), query, key, value, state)
        return output, attention.advance(state, jnp.ones(2, bool))

    def prefill(query: Any, key: Any, value: Any, state: Any) -> Any:
        at = {"sequence": jnp.int32(0), "length": jnp.int32(tokens - 100)}
        return attention.prefill(jnp.int32(1), query, key, value, state, **at)

    return {
        "step": (step, (*arrays(2, 1), state)),
        "prefill": (prefill, (*arrays(1, tokens), state)),
    }


def by_kernels(op, implementation, implementations, *operands, on_hopper=None, **settings):  # type: ignore[no-untyped-def]
    """What `dispatch.call` does on a GPU, but that a kernel which refuses is an error.

    A GPU before Hopper: what compiles for one that is not there has no Mosaic GPU.
    """
    picked = implementation or ("triton" if "triton" in implementations else "xla")
    return implementations[picked](*operands, **settings)
