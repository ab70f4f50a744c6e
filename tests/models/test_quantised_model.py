"""A model of quantised matrices: stacked, apart or in a Flax module, it is that of its numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.decoder import Decoder, apply_model, unembed
from models.formats import INT4, INT8, bytes_by_parameter, formats_of_dtype
from models.quantised import QuantisedMatrix, formats_of
from models.unstacked import only_layer, unstack_layers
from tests.support.quantised_cases import dequantised, quantised_params
from tests.support.tiny_generator import ATTENTIONS, MODEL, make_params, make_prompts
from wavejax import Generator

DTYPES = ["int8", "int4"]
NEW_TOKENS = 12


@functools.cache
def params_of(weight_dtype):
    return quantised_params(MODEL, make_params(), weight_dtype)


def apart(params):
    return unstack_layers(jax.tree.map(jnp.copy, params))


def generated(params, attention="dense", unroll=False):
    generator = Generator(MODEL, ATTENTIONS[attention], unroll=unroll)
    state = generator.start(params, make_prompts((70, 41)), NEW_TOKENS)
    first = np.asarray(state.logits)
    state, tokens = generator.decode_n(params, state, NEW_TOKENS)
    return np.asarray(tokens), first, np.asarray(state.logits)


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_all_forms_give_the_tokens_of_the_dequantised_model(weight_dtype):
    params = params_of(weight_dtype)
    expected = generated(dequantised(params))
    for form, unroll in [(params, False), (params, True), (apart(params), True)]:
        tokens, *logits = generated(form, unroll=unroll)
        np.testing.assert_array_equal(tokens, expected[0])
        for ours, theirs in zip(logits, expected[1:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    # The numbers are others than before, so that all this says something.
    assert np.abs(expected[1] - generated(make_params())[1]).max() > 1e-3


def test_wave_attention_reads_them_too():
    params = params_of("int8")
    tokens, *_ = generated(params, "wave")
    np.testing.assert_array_equal(tokens, generated(dequantised(params), "wave")[0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_looked_up_and_multiplied_by(tied):
    config = ModelConfig("llama", 50, 1, 32, 48, 4, 2, 8, 100, tie_embeddings=tied)
    decoder = Decoder(config, lambda layer, query, key, value, state: (query, state))
    inputs = jnp.arange(6)[None], jnp.arange(6)[None], None
    params = quantised_params(config, decoder.init(jax.random.key(1), *inputs), "int8")
    assert ("unembedding" in params["params"]) != tied
    floats = dequantised(params)
    hidden, _ = decoder.apply(params, *inputs)
    expected, _ = apply_model(config, floats, inputs[0], inputs[1], decoder.attend, None)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    logits = unembed(config, params, hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, unembed(config, floats, hidden), atol=1e-5)


def test_what_is_quantised_and_what_is_not():
    for weight_dtype, layers in zip(DTYPES, (INT8, INT4), strict=True):
        params = params_of(weight_dtype)
        formats = formats_of(params)
        assert formats == formats_of(apart(params)) == formats_of_dtype(MODEL, weight_dtype)
        names = {path[-1] for path in formats}
        assert names >= {"query", "key", "value", "output", "gate", "up", "down"}
        assert names == names - {"attention_norm", "mlp_norm", "final_norm"}
        assert {formats["layers", "down"], formats["embedding",]} == {layers, INT8}
        sizes = bytes_by_parameter(MODEL, 4, formats)
        assert sum(sizes.values()) == sum(x.nbytes for x in jax.tree.leaves(params))
    assert formats_of(make_params()) == formats_of_dtype(MODEL, "model") == {}


def test_one_layer_of_those_apart_is_one_program():
    params = apart(params_of("int4"))
    first, second = (jax.tree.structure(only_layer(params, layer)) for layer in (0, 1))
    assert first == second
    output = params["params"]["layers"][1]["output"]
    assert isinstance(output, QuantisedMatrix)
    assert output.shape == (32, 64)
    assert output.dtype == jnp.float32
