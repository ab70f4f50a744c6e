"""A step of one sequence as two rows of the model: the same tokens, attention sees one row."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models.checkpoints.levels import quantise
from models.formats import INT4, INT8
from models.quantised import QuantisedMatrix
from models.unstacked import unstack_layers
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention
from wavejax.engine import two_rows

[PROMPT] = make_prompts((60,))


def layers_of_own():
    return unstack_layers(jax.tree.map(jnp.copy, make_params()))


@dataclasses.dataclass(frozen=True)
class Seeing(DenseAttention):
    """Full attention that notes how many rows a step's query, key and value have."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def decode(self, layer, query, key, value, state):
        self.seen.append((len(query), len(key), len(value)))
        return super().decode(layer, query, key, value, state)


@pytest.fixture
def fed(monkeypatch):
    """The shapes of the tokens that steps feed to the model, each time one is traced."""
    shapes, apply_model = [], decoder.apply_model

    def noted(config, params, tokens, *others, **settings):
        shapes.append(tokens.shape)
        return apply_model(config, params, tokens, *others, **settings)

    monkeypatch.setattr(decoder, "apply_model", noted)
    jax.clear_caches()
    yield shapes
    jax.clear_caches()


@pytest.mark.parametrize("name", ["full", "wave"])
def test_the_tokens_are_those_of_one_row(name, fed, monkeypatch):
    attention = Seeing() if name == "full" else WaveAttention(CONFIG, "device")
    generator, params = Generator(MODEL, attention, GREEDY, unroll=True), layers_of_own()
    found = {}
    for both in (True, False):
        monkeypatch.setattr(two_rows, "takes_two", lambda *given, both=both: both)
        jax.clear_caches()
        state = generator.start(params, [PROMPT], 20)
        state, tokens = generator.decode_n(params, state, 20)
        found[both] = np.asarray(tokens), np.asarray(state.logits)
        assert set(fed) == {(1 + both, 1)}
        fed.clear()
    np.testing.assert_array_equal(found[True][0], found[False][0])
    np.testing.assert_allclose(found[True][1], found[False][1], atol=1e-4)
    if name == "full":
        assert set(Seeing.seen) == {(1, 1, 1)}


def test_a_step_by_layers_of_their_own_takes_two(fed):
    generator = Generator(MODEL, DenseAttention(), GREEDY, unroll=True)
    for prompts in ([PROMPT], [PROMPT, PROMPT[:30]]):
        state = generator.start(layers_of_own(), prompts, 20)
        generator.decode_n(layers_of_own(), state, 2)
        assert set(fed) == {(2, 1)}
        fed.clear()
    state = Generator(MODEL, DenseAttention(), GREEDY).start(make_params(), [PROMPT], 20)
    Generator(MODEL, DenseAttention(), GREEDY).decode_n(make_params(), state, 2)
    assert set(fed) == {(1, 1)}


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
