"""GGUF's blocks as levels, scales and minima: what the file holds, with no number rounded.

The blocks' layout is that of ggml's ggml-common.h. A format of ours holds each of these encodings
exactly; `gguf_encodings` says which encodings can be decoded to floats.
"""

from collections.abc import Callable

import gguf
import numpy as np
from jaxtyping import Shaped

from models.checkpoints.levels import Arrays, pack
from models.formats import WeightFormat

Blocks = Shaped[np.ndarray, "..."]
_Encoding = gguf.GGMLQuantizationType

FORMATS = {
    _Encoding.Q8_0: WeightFormat(8, 32, "float16"),
    _Encoding.Q4_0: WeightFormat(4, 32, "float16"),
    _Encoding.Q4_1: WeightFormat(4, 32, "float16", minima=True),
    _Encoding.Q5_0: WeightFormat(8, 32, "float16"),
    _Encoding.Q5_1: WeightFormat(8, 32, "float16", minima=True),
    _Encoding.Q4_K: WeightFormat(4, 32, "int8", block=256, minima=True),
    _Encoding.Q5_K: WeightFormat(8, 32, "int8", block=256, minima=True),
    _Encoding.Q6_K: WeightFormat(8, 16, "int8", block=256),
}
"""The formats that encodings are kept in; other encodings are read as floats."""


def levels_of(
    data: Shaped[np.ndarray, "out row_bytes"], encoding: gguf.GGMLQuantizationType
) -> Arrays:
    """Take the rows of a tensor apart, into the arrays of its encoding's format.

    Args:
      data: uint8, the file's bytes.
      encoding: one of `FORMATS`.
    """
    block_bytes = gguf.GGML_QUANT_SIZES[encoding][1]
    blocks = data.reshape(len(data), -1, block_bytes)
    arrays = _READERS[encoding](blocks)
    return {name: x.reshape(len(data), -1) for name, x in arrays.items()}


def _q8_0(blocks: Blocks) -> Arrays:
    return {"scales": _halves(blocks[..., :2]), "levels": blocks[..., 2:].view(np.int8)}


def _q4_0(blocks: Blocks) -> Arrays:
    # The file's own bytes: its halves of a block are ours of a group.
    return {"scales": _halves(blocks[..., :2]), "levels": blocks[..., 2:]}


def _q4_1(blocks: Blocks) -> Arrays:
    return {"scales": _halves(blocks[..., :2]), "minima": _halves(blocks[..., 2:4])} | {
        "levels": blocks[..., 4:]
    }


def _q5_0(blocks: Blocks) -> Arrays:
    levels = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]) << 4
    return {"scales": _halves(blocks[..., :2]), "levels": levels.astype(np.int8) - 16}


def _q5_1(blocks: Blocks) -> Arrays:
    levels = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8]) << 4
    return {"scales": _halves(blocks[..., :2]), "minima": _halves(blocks[..., 2:4])} | {
        "levels": levels.astype(np.int8)
    }


def _q4_k(blocks: Blocks) -> Arrays:
    pairs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    levels = np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(len(blocks), -1, 32)
    return _scales_and_minima(blocks) | {"levels": pack(levels)}


def _q5_k(blocks: Blocks) -> Arrays:
    pairs = blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)
    low = np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(*blocks.shape[:2], 8, 32)
    # The bit i of a byte is of the group i.
    high = blocks[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _scales_and_minima(blocks) | {"levels": (low | high << 4).astype(np.int8)}


def _q6_k(blocks: Blocks) -> Arrays:
    # Each half of a block: 64 bytes of four bits, and 32 of two.
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 1, 64)
    low = low >> np.array([[0], [4]], np.uint8) & 15
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    high = high >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    levels = low.reshape(*blocks.shape[:2], 2, 128) | high.reshape(*blocks.shape[:2], 2, 128) << 4
    return {
        "levels": levels.astype(np.int8) - 32,
        "scales": blocks[..., 192:208].view(np.int8),
        "scale_factors": _halves(blocks[..., 208:]),
    }


def _scales_and_minima(blocks: Blocks) -> Arrays:
    """Read what Q4_K and Q5_K begin with: two factors, and 6 bits for each scale and minimum."""
    packed = blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    # Four of each in the lower 6 bits; of four more the lower 4 bits, and the upper two above.
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return {
        "scales": scales.view(np.int8),
        "scale_factors": _halves(blocks[..., :2]),
        "minima": minima.view(np.int8),
        # The file says what is subtracted.
        "minimum_factors": -_halves(blocks[..., 2:4]),
    }


def _nibbles(packed: Blocks) -> Blocks:
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: Blocks) -> Blocks:
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _halves(pairs: Blocks) -> Blocks:
    """Read float16 numbers, little-endian."""
    return np.ascontiguousarray(pairs).view("<f2")


_READERS: dict[gguf.GGMLQuantizationType, Callable[[Blocks], Arrays]] = {
    _Encoding.Q8_0: _q8_0,
    _Encoding.Q4_0: _q4_0,
    _Encoding.Q4_1: _q4_1,
    _Encoding.Q5_0: _q5_0,
    _Encoding.Q5_1: _q5_1,
    _Encoding.Q4_K: _q4_k,
    _Encoding.Q5_K: _q5_k,
    _Encoding.Q6_K: _q6_k,
}
