"""The int8 query as the matrix units take it, by their layout in CUDA's documentation."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.score_tokens import _query
from pallas_kernels.score_tokens._products import SIGNED_HALVES


def int8s(words):
    """The four bytes of int32 words, the lowest first: `[..., 4]`."""
    return np.ascontiguousarray(words).view(np.int8).reshape(*words.shape, 4).astype(int)


@pytest.mark.parametrize("group, head_dim", [(1, 64), (7, 96), (4, 128)])
def test_each_lane_gets_both_heads_sums_over_its_own_codes(group, head_dim):
    rng = np.random.default_rng(group)
    query = rng.normal(size=(1, 2, group, head_dim)).astype(np.float32)
    packed = _query.pack(jnp.asarray(query), scale=0.25, interpret=True)
    fragments, factors, shifts = (np.asarray(x)[0, 1] for x in packed)
    words = -(-head_dim // 32)
    codes = rng.integers(0, 2**32, (32, words), dtype=np.uint32)  # one token a lane
    lane = np.arange(32)
    for pair in range(fragments.shape[0]):
        product = np.zeros((8, 8), int)
        for phase in range(_query.PHASES):
            product *= 2
            for w in range(words):
                for half in range(2):
                    # Lane 4 r + t holds four places of row r of the left operand, and of column r
                    # of the right one.
                    bits = (codes[:, w] >> (4 * half)) & np.uint32(0x01010101 << phase)
                    left = int8s(bits.astype(np.int32)).reshape(8, 16)
                    right = int8s(fragments[pair, phase, w, half]).reshape(8, 16)
                    product += left @ right.T
        product //= 2 ** (_query.PHASES - 1)
        for head in range(2):
            g = 2 * pair + head
            # Columns 2 t and 2 t + 1 of row r are lane 4 r + t's.
            found = product[lane // 4, 2 * (lane % 4) + head]
            if g >= group:
                np.testing.assert_array_equal(found, 0)
                continue
            each = (codes[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
            signs = 2.0 * each.reshape(32, -1)[:, :head_dim] - 1
            exact = np.log2(np.e) * 0.25 * signs @ query[0, 1, g]
            estimate = factors[g] * found - shifts[g]
            assert np.linalg.norm(estimate - exact) < 1e-2 * np.linalg.norm(exact)


def test_sums_keep_their_signs_in_halves_of_words():
    # As prmt picks bytes: by the selector's nibbles from the lowest on, 8 more for a byte's sign.
    word = np.array([0x8001_7FFE], np.uint32).view(np.uint8)
    for selector, expected in zip(SIGNED_HALVES, (0x7FFE, 0x8001 - 2**16), strict=True):
        picks = [int(nibble, 16) for nibble in reversed(selector[2:])]
        found = [0xFF * (word[p & 7] >> 7) if p & 8 else word[p] for p in picks]
        assert int(np.array(found, np.uint8).view(np.int32)[0]) == expected
