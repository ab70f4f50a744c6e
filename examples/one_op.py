"""Call one op alone, on arrays of your own.

Shows `attend_dense` and `merge_states` of `pallas_kernels`: two halves of a text, attended to one
after the other, merge into attention to all of it. An op takes its kernel on an NVIDIA GPU, and
plain JAX elsewhere; `implementation="xla"` asks for plain JAX. Takes about 5 s on two CPU cores.

    python examples/one_op.py
"""

import jax
import jax.numpy as jnp

import pallas_kernels as ops

LAYERS, BATCH, KV_HEADS, GROUP, TOKENS, HEAD_DIM = 2, 1, 4, 2, 1024, 64


def main() -> None:
    """Attends to both halves of a text, merges, and compares."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (BATCH, KV_HEADS, GROUP, HEAD_DIM))
    stack = (LAYERS, BATCH, KV_HEADS, TOKENS, HEAD_DIM)
    # `ops.Rows` say how they are held: as they are, or in 8 bits with a scale each.
    key, value = (ops.Rows(jax.random.normal(each, stack)) for each in keys[1:])

    attend = jax.jit(ops.attend_dense, static_argnames=("scale", "implementation"))
    layer, scale, half = 1, HEAD_DIM**-0.5, jnp.array([TOKENS // 2])
    whole, _ = attend(query, key, value, 2 * half, layer, scale=scale)

    first = attend(query, key, value, half, layer, scale=scale)
    later = (ops.Rows(rows.data[..., TOKENS // 2 :, :]) for rows in (key, value))
    second = attend(query, *later, half, layer, scale=scale)
    # Parts first: [parts, batch, kv_heads, group, head_dim] and [parts, batch, kv_heads, group].
    outputs, logsumexps = (jnp.stack(each) for each in zip(first, second, strict=True))
    merged, _ = ops.merge_states(outputs, logsumexps, dtype=query.dtype)

    error = float(jnp.abs(merged - whole).max())
    print(f"output {merged.shape}, {merged.dtype}; the halves merge into the whole to {error:.1e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
