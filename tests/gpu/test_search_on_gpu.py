"""What a program's threads find and sum together, on a CUDA GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.block_select import last_key
from pallas_kernels.toolbox.block_sums import scan_together, sum_together

pytestmark = pytest.mark.gpu


def search(keys, weights, budget, *, threads, fine=0):
    """`last_key` of as many rows as there are, a program each: key, above and ties."""
    rows, number = keys.shape

    def kernel(keys_ref, weights_ref, budget_ref, *results):
        row = pl.program_id(0)
        lane = jnp.arange(threads)
        places = [first + lane for first in range(0, number, threads)]
        read = [plt.load(keys_ref.at[row, i], mask=i < number, other=0) for i in places]
        weigh = None
        if weights_ref is not None:
            weigh = [plt.load(weights_ref.at[row, i], mask=i < number, other=0) for i in places]
        end = last_key(read, weigh, plt.load(budget_ref.at[row]), fine=fine, interpret=False)
        for ref, x in zip(results, end, strict=True):
            plt.store(ref.at[row, lane], x)

    shape = (rows, threads)
    return launch.call(
        kernel,
        (keys, weights, budget),
        tuple(jax.ShapeDtypeStruct(shape, x) for x in (jnp.uint32, jnp.int32, jnp.int32)),
        (rows,),
        name="search",
        num_warps=threads // 32,
    )


def expected(keys, weights, budget):
    """The same of one row, in numpy."""
    weights = np.where(keys > 0, 1 if weights is None else weights, 0)
    distinct = np.unique(keys[keys > 0])[::-1]
    if not len(distinct):
        return 0, 0
    held = np.array([weights[keys >= key].sum() for key in distinct])
    reached = np.flatnonzero(held >= budget)
    key = distinct[reached[0]] if len(reached) else distinct[-1]
    return key, weights[keys > key].sum()


# A key's bits are spread as a mass's are, over all there are, over a few, or all the same.
KINDS = {
    "masses": lambda rng, n: 3 * 2**30 - (np.exp(rng.normal(size=n)) * 2**23).astype(np.uint32),
    "any": lambda rng, n: rng.integers(1, 2**32 - 1, n, dtype=np.uint32),
    "few": lambda rng, n: rng.choice([5, 6, 2**20, 2**31, 2**31 + 1], n).astype(np.uint32),
    "one": lambda rng, n: np.full(n, 7, np.uint32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "number, threads, weighted",
    [(32, 32, False), (100, 32, True), (1000, 256, True), (2048, 512, False), (8192, 512, True)],
)
def test_last_key(kind, number, threads, weighted):
    rng = np.random.default_rng(number)
    keys = np.stack([KINDS[kind](rng, number) for _ in range(6)])
    keys[rng.random(keys.shape) < 0.2] = 0  # not there
    keys[-1] = 0
    weights = rng.integers(0, 40, keys.shape, dtype=np.int32) if weighted else None
    totals = np.where(keys > 0, 1 if weights is None else weights, 0).sum(1)
    budget = np.array([1, totals[1], totals[2] // 2, totals[3] // 9 + 1, 2 * totals[4], 5])
    weigh = None if weights is None else jnp.asarray(weights)
    operands = jnp.asarray(keys), weigh, jnp.asarray(budget, jnp.int32)
    found = [np.asarray(x) for x in search(*operands, threads=threads)]
    coarse = np.asarray(search(*operands, threads=threads, fine=10)[0])
    for x in (*found, coarse):
        assert (x == x[:, :1]).all()  # all threads know
    for row in range(6):
        of_row = None if weights is None else weights[row]
        key, above = expected(keys[row], of_row, budget[row])
        assert found[0][row, 0] == key
        assert int(key) - 2**10 < int(coarse[row, 0]) <= int(key)
        if key:
            assert found[1][row, 0] == above
            assert found[2][row, 0] == (keys[row] == key).sum()


@pytest.mark.parametrize("number, threads", [(1, 32), (3, 256), (8, 512), (20, 128)])
def test_sums_over_threads(number, threads):
    values = np.random.default_rng(threads).integers(-9, 2**20, (4, number, threads), np.int32)

    def kernel(values_ref, sums_ref, before_ref, totals_ref):
        row, lane = pl.program_id(0), jnp.arange(threads)
        read = [plt.load(values_ref.at[row, jnp.int32(i), lane]) for i in range(number)]
        sums = sum_together(read, interpret=False)
        before, totals = zip(*scan_together(read, interpret=False), strict=True)
        for ref, found in ((sums_ref, sums), (before_ref, before), (totals_ref, totals)):
            for i, x in enumerate(found):
                plt.store(ref.at[row, jnp.int32(i), lane], x)

    shape = jax.ShapeDtypeStruct(values.shape, jnp.int32)
    sums, before, totals = launch.call(
        kernel,
        (jnp.asarray(values),),
        (shape,) * 3,
        (4,),
        name="sums",
        num_warps=threads // 32,
    )
    through = values.cumsum(-1, dtype=np.int32)
    for x in (sums, totals):
        np.testing.assert_array_equal(x, np.broadcast_to(through[..., -1:], values.shape))
    np.testing.assert_array_equal(before, through - values)
