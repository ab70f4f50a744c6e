"""Matrices that have the same inputs, joined: the same products; what is not alike stays apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.formats import INT4, INT8, WeightFormat
from models.joined import GATES, QUERIES, JoinedMatrices, join_layer, key_of, separate_layer
from models.layer import linear, products
from models.quantised import QuantisedMatrix, formats_of
from tests.support.quantised_cases import quantised

ROWS = {"query": 64, "key": 32, "value": 32, "gate": 96, "up": 96, "output": 48}
COLUMNS = 256


def layer_of(formats):
    """A layer's matrices, each in its format; None: bfloat16."""
    rng = np.random.default_rng(0)
    floats = {name: rng.normal(size=(rows, COLUMNS)) for name, rows in ROWS.items()}
    return {
        name: quantised(x.astype(np.float32), formats[name])
        if formats[name]
        else jnp.asarray(x, jnp.bfloat16)
        for name, x in floats.items()
    }


def all_in(format):
    return dict.fromkeys(ROWS, format)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("format", [None, INT8, INT4], ids=["bfloat16", "int8", "int4"])
def test_products_are_those_of_each_matrix(format, tokens):
    apart = layer_of(all_in(format))
    joined = join_layer(layer_of(all_in(format)))
    assert joined.keys() == {"output", key_of(QUERIES), key_of(GATES)}
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(2, tokens, COLUMNS)), jnp.float32)
    for names in (QUERIES, GATES):
        found = jax.jit(products, static_argnums=2)(inputs, joined, names)
        for name, product in zip(names, found, strict=True):
            expected = linear(inputs, apart[name])
            assert product.shape == (2, tokens, ROWS[name])
            np.testing.assert_allclose(product, expected, rtol=0, atol=1e-4)
            assert np.abs(expected).max() > 10


def test_taken_apart_they_are_what_they_were_and_joining_leaves_no_copy():
    apart, given = layer_of(all_in(INT4)), layer_of(all_in(INT4))
    joined = join_layer(given)
    for name in (*QUERIES, *GATES):
        assert all(x.is_deleted() for x in jax.tree.leaves(given[name]))
    assert joined["output"] is given["output"]
    assert isinstance(joined[key_of(QUERIES)], JoinedMatrices)
    again = separate_layer(joined)
    assert again.keys() == apart.keys()
    jax.tree.map(np.testing.assert_array_equal, again, apart)


def test_what_is_not_alike_stays_apart():
    other = WeightFormat(8, 16, "float32")
    formats = all_in(INT4) | {"value": other, "up": None}
    given = layer_of(formats)
    joined = join_layer(given)
    assert joined.keys() == given.keys()
    assert all(joined[name] is x for name, x in given.items())
    # One group is no reason for the other.
    joined = join_layer(layer_of(all_in(INT4) | {"value": other}))
    assert joined.keys() == {*QUERIES, "output", key_of(GATES)}


def test_their_formats_are_told_by_the_matrices_names():
    formats = all_in(INT4) | {"output": INT8, "up": None}
    params = {"params": {"layers": (join_layer(layer_of(formats)),)}}
    expected = {("layers", name): x for name, x in formats.items() if x}
    assert formats_of(params) == expected


def test_they_are_a_pytree():
    matrices = join_layer(layer_of(all_in(INT8)))[key_of(QUERIES)]
    assert isinstance(matrices.matrix, QuantisedMatrix)
    doubled = jax.tree.map(lambda x: x + x, matrices)
    assert (doubled.names, doubled.rows) == (QUERIES, (64, 32, 32))
    assert doubled.matrix.shape == (128, COLUMNS)
