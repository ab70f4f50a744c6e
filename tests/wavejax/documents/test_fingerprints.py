"""The fingerprint of a model's weights: any change of them shows."""

import jax
import jax.numpy as jnp
import pytest

from models.unstacked import unstack_layers
from tests.support.tiny_generator import make_params
from wavejax.documents.fingerprints import weights_fingerprint

# Each changes bits of many numbers at once, as a wrong conversion would.
CHANGES = {
    "signs": lambda x: -x,
    "doubled": lambda x: 2 * x,
    "halved": lambda x: x / 2,
    "turned": lambda x: jnp.flip(x, -1),
    "moved": lambda x: jnp.roll(x, 1, -1),
    "one number": lambda x: x.at[..., -1].multiply(1 + 2**-7),
    "set": jnp.ones_like,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_change_of_the_weights_shows(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), make_params())
    tree = params["params"]
    found = {weights_fingerprint(params)}
    for change in CHANGES.values():
        for where in ("final_norm", "embedding"):
            found.add(weights_fingerprint({"params": {**tree, where: change(tree[where])}}))
        changed = {**tree["layers"], "query": change(tree["layers"]["query"])}
        found.add(weights_fingerprint({"params": {**tree, "layers": changed}}))
    assert len(found) == 1 + 3 * len(CHANGES)


def test_unstacked_layers_are_the_same_weights():
    expected = weights_fingerprint(make_params())
    params = jax.tree.map(jnp.copy, make_params())  # which unstacking takes apart
    assert weights_fingerprint(unstack_layers(params)) == expected
