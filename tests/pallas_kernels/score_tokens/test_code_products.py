"""The int8 query and codes as a warp's lanes hold them, by the layout in CUDA's documentation."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.score_tokens import _products, _query
from pallas_kernels.toolbox import warp


@pytest.mark.parametrize("group, head_dim", [(1, 64), (4, 128), (7, 96), (12, 256)])
def test_each_lane_gets_all_heads_sums_over_its_own_tokens_codes(group, head_dim):
    rng = np.random.default_rng(group)
    query = rng.normal(size=(1, 2, group, head_dim)).astype(np.float32)
    packed = _query.pack(jnp.asarray(query), scale=0.25, interpret=True)
    fragments, factors, shifts = (np.asarray(x)[0, 1] for x in packed)
    words, threads = -(-head_dim // 32), 2 * warp.LANES
    codes = rng.integers(0, 2**32, (threads, words), dtype=np.uint32)  # one token a thread
    thread = np.arange(threads)
    held = [
        [
            jnp.asarray(codes[thread - thread % 4 + row, np.minimum(four + thread % 4, words - 1)])
            for row in range(4)
        ]
        for four in range(0, words, 4)
    ]
    right = [
        [jnp.asarray(np.tile(x, 2)) for x in of_round.reshape(-1, warp.LANES)]
        for of_round in fragments
    ]
    found = _products.products(held, right, group, emulate=True)
    assert len(found) == group
    each = (codes[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    signs = 2.0 * each.reshape(threads, -1)[:, :head_dim] - 1
    for g in range(group):
        exact = np.log2(np.e) * 0.25 * signs @ query[0, 1, g]
        estimate = factors[g] * np.asarray(found[g]) - shifts[g]
        assert np.linalg.norm(estimate - exact) < 1e-2 * np.linalg.norm(exact)


def test_sums_of_both_signs_pass_from_lane_to_lane():
    rng = np.random.default_rng(0)
    # The largest sums that there are, and those next to a half word's ends.
    sums = rng.choice([-32512, -1, 0, 1, 32512], (4, warp.LANES)).astype(np.int32)
    tiles = [jnp.asarray(sums[t] & 0xFFFF | sums[t + 1] << 16) for t in (0, 2)]
    found = _products._of_own_tokens(*tiles, emulate=True)
    lane = np.arange(warp.LANES)
    for head, of_head in enumerate(found):
        np.testing.assert_array_equal(of_head, sums[lane % 4, lane - lane % 4 + head])


def test_a_quad_shares_its_positions():
    position = np.random.default_rng(1).permutation(warp.LANES).astype(np.int32)
    lane = np.arange(warp.LANES)
    for nth, row in enumerate(_products.rows_of_quad(jnp.asarray(position), emulate=True)):
        np.testing.assert_array_equal(row, position[lane - lane % 4 + nth])


def permuted(x, y, selector):
    """What prmt makes of two words: the selector's nibbles pick bytes, 8 more a byte's sign."""
    word = np.array([x, y], np.uint32).view(np.uint8)
    picks = [selector >> shift & 0xF for shift in range(0, 16, 4)]
    found = [0xFF * (word[p & 7] >> 7) if p & 8 else word[p] for p in picks]
    return int(np.array(found, np.uint8).view(np.int32)[0])


def test_the_assembly_picks_the_halves_that_plain_jax_does():
    x, y = 0x8001_7FFE, 0x1234_9ABC
    words = [jnp.asarray([word], jnp.uint32).astype(jnp.int32) for word in (x, y)]
    for upper, selector in ((False, warp.LOWER_HALVES), (True, warp.UPPER_HALVES)):
        [plain] = warp.join_halves(*words, jnp.asarray([upper]), emulate=True)
        assert permuted(x, y, selector) == plain
    for nth, expected in enumerate((0x7FFE, 0x8001 - 2**16)):
        assert permuted(x, 0, int(warp.SIGNED_HALVES[nth], 16)) == expected
        assert warp.half(words[0], nth, emulate=True)[0] == expected
