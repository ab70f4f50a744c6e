"""Quantised matrices whose numbers are known in float64, by code that reads no level of ours."""

import gguf
import jax
import numpy as np

from models.checkpoints.levels import quantised
from models.formats import formats_of_dtype
from models.quantised import QuantisedMatrix

Encoding = gguf.GGMLQuantizationType
PACKED = [
    *(Encoding.Q8_0, Encoding.Q4_0, Encoding.Q4_1, Encoding.Q5_0, Encoding.Q5_1),
    *(Encoding.Q4_K, Encoding.Q5_K, Encoding.Q6_K),
]
"""The encodings of GGUF that are kept by their own levels."""

# Where float16 numbers lie in a block; all other bytes may be anything.
_FLOATS = {
    Encoding.Q8_0: (0,),
    Encoding.Q4_0: (0,),
    Encoding.Q4_1: (0, 2),
    Encoding.Q5_0: (0,),
    Encoding.Q5_1: (0, 2),
    Encoding.Q4_K: (0, 2),
    Encoding.Q5_K: (0, 2),
    Encoding.Q6_K: (208,),
}


def random_blocks(encoding, shape, seed=0, scale=0.01):
    """Random bytes of a tensor of `shape` in an encoding: uint8 ``[*shape[:-1], row_bytes]``."""
    rng = np.random.default_rng(seed)
    size, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, block_bytes)).astype(np.uint8)
    for at in _FLOATS[encoding]:
        floats = (rng.uniform(-1, 1, (*blocks.shape[:-1], 1)) * scale).astype("<f2")
        blocks[..., at : at + 2] = floats.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def decoded(data, encoding):
    """The numbers of a tensor, float32, by the gguf package."""
    return gguf.quants.dequantize(data, encoding)


def matrix_of_levels(bits, group, out, columns, seed=0):
    """Make a matrix of levels and scales that a test draws itself.

    Returns:
        the arrays of a `QuantisedMatrix`, and its numbers in float64.
    """
    rng = np.random.default_rng((seed, bits, out, columns))
    size = group or columns
    groups = -(-columns // size)
    least, most = (-127, 128) if bits == 8 else (-8, 8)
    levels = rng.integers(least, most, (out, groups, size))
    # Powers of two, which every float dtype holds.
    scales = np.exp2(rng.integers(-9, -4, (out, groups)).astype(np.float64))
    numbers = (levels * scales[..., None]).reshape(out, -1)[:, :columns]
    if bits == 8:
        held = levels.reshape(out, -1).astype(np.int8)
    else:
        held = np.zeros((out, groups * size // 2), np.uint8)
        for row in range(out):
            for place in range(groups * size):
                start, within = divmod(place, size)
                byte = start * size // 2 + within % (size // 2)
                shift = 4 * (within >= size // 2)
                held[row, byte] |= (int(levels[row, start, within]) + 8) << shift
    return {"levels": held, "scales": scales.astype(np.float32)}, numbers


def quantised_params(config, params, weight_dtype):
    """Float parameters, stacked, with their matrices as loading by "int8" or "int4" makes them."""
    formats = formats_of_dtype(config, weight_dtype)

    def of(path, leaf):
        at = tuple(key.key for key in path)
        return quantised(np.asarray(leaf), formats[at]) if at in formats else leaf

    return {"params": jax.tree_util.tree_map_with_path(of, params["params"])}


def dequantised(params):
    """The same parameters as floats."""
    return jax.tree.map(
        lambda x: x.dequantise() if isinstance(x, QuantisedMatrix) else x,
        params,
        is_leaf=lambda x: isinstance(x, QuantisedMatrix),
    )
