"""CUDA's assembly of packed elements in plain JAX: the few instructions that dequantisation has."""

import re

import jax.numpy as jnp
import numpy as np
from jax import lax


def assembly(text, *operands, dtype, pack):
    """What `launch.assembly` gives, of tensors whose last axis is packed."""
    given = [part for x in operands for part in _registers(x, pack)]
    results = pack * jnp.dtype(dtype).itemsize // 4
    values = {f"${results + i}": x for i, x in enumerate(given)}
    for line in filter(None, re.split(r"[;\n{}]+", text)):
        name, _, arguments = line.partition(" ")
        if name.startswith("."):
            continue
        target, *rest = (argument.strip() for argument in arguments.split(","))
        rest = [values[x] if x in values else np.uint32(int(x, 0)) for x in rest]
        values[target] = _INSTRUCTIONS[name](*rest)
    made = [jnp.broadcast_to(values[f"${i}"], given[0].shape) for i in range(results)]
    numbers = lax.bitcast_convert_type(jnp.stack(made, axis=-1), dtype)
    return numbers.reshape(operands[0].shape)


def _registers(x, pack):
    """The words of every `pack` elements of the last axis."""
    if x.dtype.itemsize < 4:
        x = x.reshape(*x.shape[:-1], -1, 4 // x.dtype.itemsize)
    words = lax.bitcast_convert_type(x, jnp.uint32)
    words = words.reshape(*words.shape[:-1], -1, pack * x.dtype.itemsize // 4)
    return [words[..., i] for i in range(words.shape[-1])]


def _prmt(x, y, selector):
    parts = [(z >> (8 * i)) & 255 for z in (x, y) for i in range(4)]
    picks = [int(selector) >> (4 * i) & 15 for i in range(4)]
    return sum(jnp.broadcast_to(parts[n], x.shape) << (8 * i) for i, n in enumerate(picks))


def _fma(kind):
    def halves(x):
        return lax.bitcast_convert_type(x, kind).astype(jnp.float32)

    def fma(x, y, z):
        made = (halves(x) * halves(y) + halves(z)).astype(kind)
        return lax.bitcast_convert_type(made, jnp.uint32)

    return fma


_INSTRUCTIONS = {
    "mov.b32": lambda x: x,
    "and.b32": lambda x, y: x & y,
    "shr.u32": lambda x, y: x >> y,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma(jnp.bfloat16),
    "fma.rn.f16x2": _fma(jnp.float16),
}
