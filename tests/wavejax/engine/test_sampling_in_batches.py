"""Sampling across a batch: each row's distribution, and that rows do not hang together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.wavejax.engine.test_sampling import CHI_SQUARE_999, reference
from wavejax.engine.sampling import Sampler, step_key, step_keys

STEPS = 20_000
# Two rows that are equal, and two of their own.
ROWS = np.array(
    [
        [0.3, -1.0, 2.0, 1.1],
        [0.3, -1.0, 2.0, 1.1],
        [1.2, 1.3, 0.1, -0.4],
        [-0.5, 0.6, 0.2, 0.9],
    ],
    np.float32,
)
SAMPLERS = {
    "temperature": Sampler(temperature=0.7),
    "top_k": Sampler(temperature=1.0, top_k=3),
    "top_p": Sampler(temperature=1.0, top_p=0.8),
    "min_p": Sampler(temperature=1.3, min_p=0.2),
    "all": Sampler(temperature=1.5, top_k=3, top_p=0.93, min_p=0.1),
}


def draw_batch(sampler: Sampler, seed: int, steps: int = STEPS) -> np.ndarray:
    """`[steps, batch]`, one batch's tokens at the same logits, step after step."""
    rows, numbers = jnp.asarray(ROWS), jnp.arange(len(ROWS))
    sample = jax.jit(jax.vmap(lambda step: sampler.sample(rows, step_keys(seed, step, numbers))))
    return np.asarray(sample(jnp.arange(steps)))


def chi_square(observed: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The statistic over what can be drawn at all, and the degrees of freedom."""
    support = expected > 0
    assert observed[~support].sum() == 0
    of_support = (observed - expected)[support] ** 2 / expected[support]
    return float(of_support.sum()), int(support.sum()) - 1


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_each_row_of_a_batch_has_its_own_distribution(sampler: Sampler) -> None:
    drawn = draw_batch(sampler, seed=5)
    for row, tokens in zip(ROWS, drawn.T, strict=True):
        expected, close = reference(row, sampler)
        assert not close
        statistic, freedom = chi_square(np.bincount(tokens, minlength=4), STEPS * expected)
        assert statistic < CHI_SQUARE_999[freedom]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_rows_of_a_batch_are_independent(sampler: Sampler) -> None:
    """Pairs of two rows' tokens in one step come as often as the product says; equal rows' too."""
    drawn = draw_batch(sampler, seed=6)
    shares = [reference(row, sampler)[0] for row in ROWS]
    for one, other in [(0, 1), (0, 2), (2, 3)]:
        pairs = np.bincount(4 * drawn[:, one] + drawn[:, other], minlength=16)
        expected = STEPS * np.outer(shares[one], shares[other]).reshape(-1)
        statistic, freedom = chi_square(pairs, expected)
        assert statistic < QUANTILES[freedom]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_steps_and_seeds_are_independent(sampler: Sampler) -> None:
    """A step's token says nothing of the next one's, nor a seed's of the next seed's."""
    drawn, other = draw_batch(sampler, seed=7), draw_batch(sampler, seed=8)
    share = reference(ROWS[0], sampler)[0]
    expected = np.outer(share, share).reshape(-1)
    for before, after in [(drawn[:-1, 0], drawn[1:, 0]), (drawn[:, 0], other[:, 0])]:
        pairs = np.bincount(4 * before + after, minlength=16)
        statistic, freedom = chi_square(pairs, len(before) * expected)
        assert statistic < QUANTILES[freedom]


# The 99.9 % quantile of chi-square, where pairs of two, three or four tokens can be drawn.
QUANTILES = {3: 16.27, 5: 20.52, 7: 24.32, 8: 26.12, 11: 31.26, 15: 37.70}


def test_the_statistic_sees_rows_that_share_their_noise() -> None:
    sampler = SAMPLERS["temperature"]
    drawn = draw_batch(sampler, seed=6)
    share = reference(ROWS[0], sampler)[0]
    pairs = np.bincount(5 * drawn[:, 0], minlength=16)  # the second row says what the first does
    statistic, freedom = chi_square(pairs, STEPS * np.outer(share, share).reshape(-1))
    assert statistic > 100 * QUANTILES[freedom]


def test_a_key_is_of_seed_step_and_sequence_alone() -> None:
    def bits(*key: int) -> tuple[int, ...]:
        return tuple(jax.random.key_data(step_key(*key)).tolist())

    places = [(seed, step, i) for seed in (0, 1, -7) for step in range(4) for i in range(4)]
    assert len({bits(*place) for place in places}) == len(places)
    numbers = jnp.array([3, 0, 2**31 - 1])
    keys = jax.random.key_data(step_keys(1, 2, numbers)).tolist()
    assert [tuple(key) for key in keys] == [bits(1, 2, int(number)) for number in numbers]


def test_the_noise_does_not_depend_on_jaxs_default_generator() -> None:
    logits = jnp.asarray(ROWS)
    expected = SAMPLERS["temperature"].sample(logits, step_keys(1, 2, jnp.arange(4)))
    with jax.default_prng_impl("rbg"):
        found = SAMPLERS["temperature"].sample(logits, step_keys(1, 2, jnp.arange(4)))
    assert found.tolist() == expected.tolist()
