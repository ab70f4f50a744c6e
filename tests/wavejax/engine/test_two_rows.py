"""A step of one sequence as two rows of the model: the same tokens, attention sees one row."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.levels import quantise
from models.formats import INT4, INT8
from models.quantised import QuantisedMatrix
from models.unstacked import unstack_layers
from tests.support.tiny_generator import GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator
from wavejax.engine import two_rows

[PROMPT] = make_prompts((60,))


def layers_of_own():
    return unstack_layers(jax.tree.map(jnp.copy, make_params()))


@dataclasses.dataclass(frozen=True)
class Seeing(DenseAttention):
    """Full attention that notes how many rows a step's query has."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def decode(self, layer, query, key, value, state):
        self.seen.append((len(query), len(key), len(value)))
        return super().decode(layer, query, key, value, state)


def test_the_tokens_are_those_of_one_row(monkeypatch):
    generator, params = Generator(MODEL, Seeing(), GREEDY, unroll=True), layers_of_own()
    found = {}
    for both in (True, False):
        monkeypatch.setattr(two_rows, "takes_two", lambda *given, both=both: both)
        jax.clear_caches()
        state = generator.start(params, [PROMPT], 20)
        state, tokens = generator.decode_n(params, state, 20)
        found[both] = np.asarray(tokens), np.asarray(state.logits)
    np.testing.assert_array_equal(found[True][0], found[False][0])
    np.testing.assert_allclose(found[True][1], found[False][1], atol=1e-4)
    assert set(Seeing.seen) == {(1, 1, 1)}
    jax.clear_caches()


def test_a_step_by_layers_of_their_own_takes_two(monkeypatch):
    generator, asked = Generator(MODEL, DenseAttention(), GREEDY, unroll=True), []
    takes_two = two_rows.takes_two
    monkeypatch.setattr(two_rows, "takes_two", lambda *x: asked.append(takes_two(*x)) or asked[-1])
    jax.clear_caches()
    for prompts in ([PROMPT], [PROMPT, PROMPT[:30]]):
        state = generator.start(layers_of_own(), prompts, 20)
        generator.decode_n(layers_of_own(), state, 2)
        assert set(asked) == {len(prompts) == 1}
        asked.clear()
    jax.clear_caches()


@pytest.mark.parametrize("format, takes", [(None, True), (INT8, True), (INT4, False)])
def test_weights_in_groups_stay_one_row(format, takes):
    down = np.ones((4, 64), np.float32)
    if format is not None:
        arrays = {name: jnp.asarray(x) for name, x in quantise(down, format).items()}
        down = QuantisedMatrix(**arrays, columns=64, dtype=jnp.dtype("float32"))
    params = {"params": {"layers": ({"down": down},)}}
    assert two_rows.takes_two(params, 1, True) == takes
    assert not two_rows.takes_two(params, 1, False)
    assert not two_rows.takes_two(params, 2, True)
