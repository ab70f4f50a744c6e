"""Parameters with layers of their own: consumed stacks, equal results, mistakes that are named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import Decoder, apply_layer, apply_model, embed
from models.joined import separate_layer
from models.unstacked import only_layer, stack_layers, unstack_layers, without_layers
from tests.support.tiny_generator import MODEL, make_params

TOKENS = jnp.arange(12).reshape(2, 6)
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))


def copied_params():
    """`make_params`, to be consumed: others use its arrays."""
    return jax.tree.map(jnp.copy, make_params())


def attend(layer, query, key, value, state):
    # Tells layers, queries, keys and values apart.
    return query * (layer + 1) + jnp.repeat(key + 2 * value, 2, axis=2), state + layer


def test_each_layer_gets_its_arrays_and_the_stacks_are_gone():
    stacked = copied_params()
    params = unstack_layers(stacked)
    layers = params["params"]["layers"]
    stacks = make_params()["params"]["layers"]
    assert len(layers) == MODEL.num_layers
    for number, layer in enumerate(layers):
        layer = separate_layer(layer)
        assert layer.keys() == stacks.keys()
        for name, stack in stacks.items():
            np.testing.assert_array_equal(layer[name], stack[number])
    assert all(stack.is_deleted() for stack in stacked["params"]["layers"].values())
    # What is no layer's is the same array.
    for name in ("embedding", "final_norm", "unembedding"):
        assert params["params"][name] is stacked["params"][name]
        assert not params["params"][name].is_deleted()


@pytest.mark.parametrize("form", [lambda params: params, unstack_layers], ids=["stacks", "layers"])
def test_stacked_again_they_are_what_they_were(form):
    stacks = stack_layers(form(copied_params()))
    jax.tree.map(np.testing.assert_array_equal, stacks, make_params())


def test_the_module_and_the_function_agree_in_both_forms():
    inputs = TOKENS, POSITIONS, jnp.int32(0)
    expected, state = jax.jit(Decoder(MODEL, attend).apply)(make_params(), *inputs)

    def run(params, unroll):
        return apply_model(MODEL, params, TOKENS, POSITIONS, attend, jnp.int32(0), unroll)

    run = jax.jit(run, static_argnums=1)
    unstacked = unstack_layers(copied_params())
    for params, unroll in [(make_params(), False), (make_params(), True), (unstacked, False)]:
        hidden, seen = run(params, unroll)
        np.testing.assert_allclose(hidden, expected, atol=1e-5)
        assert int(seen) == int(state) == 1


def test_biases_and_norms_are_of_the_matrices_that_were_joined():
    model = dataclasses.replace(MODEL, qkv_bias=True, qk_norm=True)
    decoder, inputs = Decoder(model, attend), (TOKENS, POSITIONS, jnp.int32(0))
    keys = iter(jax.random.split(jax.random.key(2), 99))
    # Biases are zeros, and norms ones, before they are learnt.
    params = jax.tree.map(
        lambda x: x + jax.random.normal(next(keys), x.shape),
        decoder.init(jax.random.key(1), *inputs),
    )
    expected, _ = jax.jit(decoder.apply)(params, *inputs)
    hidden, _ = apply_model(model, unstack_layers(params), TOKENS, POSITIONS, attend, jnp.int32(0))
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-4)


def test_a_traced_number_runs_the_one_layer_that_it_is_given():
    params = unstack_layers(copied_params())
    hidden = embed(MODEL, without_layers(params), TOKENS)
    run = jax.jit(lambda *args: apply_layer(MODEL, *args, POSITIONS, attend, jnp.int32(0)))
    for layer in range(MODEL.num_layers):
        number = jnp.int32(layer)
        out, state = run(only_layer(params, layer), number, hidden)
        expected, _ = run(only_layer(make_params(), layer), number, hidden)
        # Joined matrices may be summed in another order.
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
        assert int(state) == layer
    with pytest.raises(TypeError, match="cannot pick one of 2 layers that are not stacked"):
        run(params, jnp.int32(0), hidden)


@pytest.mark.parametrize("form", [lambda params: params, unstack_layers], ids=["stacks", "layers"])
def test_another_number_of_layers_is_an_error(form):
    params = copied_params()
    few = jax.tree.map(lambda stack: stack[:1], params["params"]["layers"])
    params = form({"params": params["params"] | {"layers": few}})
    with pytest.raises(ValueError, match="the parameters have 1 layers, the model 2"):
        apply_model(MODEL, params, TOKENS, POSITIONS, attend, jnp.int32(0))
