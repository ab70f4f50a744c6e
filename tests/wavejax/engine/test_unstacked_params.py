"""The generator on layers of their own: the same tokens, as few programs, no weight copied."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.unstacked import unstack_layers
from tests.support.tiny_generator import ATTENTIONS, GREEDY, MODEL, make_params, make_prompts
from wavejax import DecodeState, Generator
from wavejax.engine import compiled
from wavejax.store.shape import CacheShape

# It looks at compiled programs.
pytestmark = pytest.mark.optimised

NEW_TOKENS = 80  # Enough for an index to grow.
FORMS = ("stacks", "layers")


@functools.cache
def params_of(form):
    if form == "stacks":
        return make_params()
    return unstack_layers(jax.tree.map(jnp.copy, make_params()))


def make_generator(attention):
    return Generator(MODEL, ATTENTIONS[attention], GREEDY, unroll=True)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "wave"])
def test_both_forms_give_the_same_and_one_program_reads_all_layers(attention):
    generator, prompts = make_generator(attention), make_prompts((262, 318))
    seen = []
    for form in FORMS:
        params = params_of(form)
        compiled.prefill_layer.clear_cache()  # other tests' generators may have compiled it
        state = generator.start(params, prompts, NEW_TOKENS)
        assert compiled.prefill_layer._cache_size() == 1
        first = np.asarray(state.logits)
        state, tokens = generator.decode_n(params, state, NEW_TOKENS)
        seen.append((first, np.asarray(tokens), np.asarray(state.logits)))
        # Forced, the tokens come from the logits of both forms.
        state = generator.start(params, prompts, NEW_TOKENS)
        _, logits = generator.force(params, state, jnp.asarray(seen[0][1][:8]))
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), seen[0][1][:8])
    (first, tokens, last), (other_first, other_tokens, other_last) = seen
    np.testing.assert_array_equal(tokens, other_tokens)
    np.testing.assert_allclose(first, other_first, rtol=0, atol=1e-5)
    np.testing.assert_allclose(last, other_last, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_staged_rows_take_both_forms():
    attention = dataclasses.replace(ATTENTIONS["wave"], fetch="staged")
    generator, prompts = Generator(MODEL, attention, GREEDY), make_prompts((262,))
    seen = []
    for form in FORMS:
        state = generator.start(params_of(form), prompts, 4)
        seen.append(np.asarray(generator.decode_n(params_of(form), state, 4)[1]))
    np.testing.assert_array_equal(*seen)


def weight_slices(text):
    """Shapes of a layer's matrices that a program slices out of something."""
    stacks = make_params()["params"]["layers"].values()
    matrices = {stack.shape[1:] for stack in stacks if stack.ndim == 3}
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:dynamic-)?slice\(", text)
    shapes = [tuple(int(x) for x in shape.split(",")) for shape in found]
    return [shape for shape in shapes if shape[-2:] in matrices and shape[:-2] in {(), (1,)}]


@pytest.mark.parametrize("attention", ["dense", pytest.param("wave", marks=pytest.mark.slow(30))])
def test_a_step_slices_weights_out_of_stacks_only(attention):
    generator = make_generator(attention)
    cache = ATTENTIONS[attention].init_state(CacheShape.of(MODEL), 3, 320, NEW_TOKENS, jnp.float32)
    logits = jnp.zeros((3, MODEL.vocab_size), jnp.float32)
    state = DecodeState(cache, logits, jnp.zeros(3, bool), jnp.int32(0), jnp.int32(0))

    def slices(form):
        lowered = compiled.decode_n.lower(generator.engine, params_of(form), state, jnp.int32(8), 8)
        return weight_slices(lowered.compile().as_text())

    assert slices("layers") == []
    # Seven matrices in each layer; those equal in shape may share code.
    assert len(slices("stacks")) >= len(make_params()["params"]["layers"]) - 2
