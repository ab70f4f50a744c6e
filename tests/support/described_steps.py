"""Steps and prefills by settings, compiled for an H200 that is described; see `described_gpu`.

    python -m tests.support.described_steps NAME ...

prints each name when its programs are compiled.
"""

import contextlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from tests.support.attention_harness import model_of
from tests.support.described_gpu import compiled
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.attention.protocol import AnyAttention
from wavejax.store.shape import CacheShape


def _wave(store: str = "device", **settings: object) -> AnyAttention:
    return WaveAttention(WaveConfig(**settings), store)


ATTENTIONS = {
    "wave": _wave(),
    "host": _wave("host"),
    "int8": _wave("host", row_dtype="int8", admission_ratio=16.0),
    "moments": _wave(moment_rank=2, moment_dtype="int8"),
    "bounds": _wave(moment_rank=1, bounds=True),
    "tolerance": _wave(tolerance=0.1, exact_fallback=True),
    "audit": _wave("host", audit=0.01),
    "reach": _wave(reach=2.0),
    "full": DenseAttention(),
    "full-int8": DenseAttention(row_dtype="int8"),
}


def compile_programs(attention: AnyAttention) -> None:
    """Compile a step with growth, and a prefill, of one layer of a small model."""
    model = model_of(layers=2, kv_heads=2, group=3, head_dim=64)
    shape = CacheShape.of(model)
    state = jax.eval_shape(lambda: attention.init_state(shape, 2, 9000, 100, jnp.bfloat16))

    def arrays(batch: int, tokens: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((batch, tokens, n, 64), jnp.bfloat16) for n in (6, 2, 2)]

    def step(query, key, value, state):
        state = attention.grow(state)
        output, state = attention.decode(jnp.int32(1), query, key, value, state)
        return output, attention.advance(state, jnp.ones(2, bool))

    def prefill(query, key, value, state):
        at = {"sequence": jnp.int32(0), "length": jnp.int32(8900)}
        return attention.prefill(jnp.int32(1), query, key, value, state, **at)

    compiled(step, *arrays(2, 1), state)
    compiled(prefill, *arrays(1, 9000), state)


def by_kernels(op, implementation, implementations, *operands, **settings):
    """What `dispatch.call` does on a GPU: a kernel, or plain JAX for what it does not know."""
    picked = implementation or "triton"
    with contextlib.suppress(NotImplementedError):
        if picked in implementations:
            return implementations[picked](*operands, **settings)
    return implementations["xla"](*operands, **settings)


def main(names: list[str]) -> None:
    """Compile the programs of these names, or of all."""
    with mock.patch.object(dispatch, "call", by_kernels):
        for name in names or ATTENTIONS:
            compile_programs(ATTENTIONS[name])
            print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
