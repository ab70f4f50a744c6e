"""What restoring a document holds at once: XLA pins memory for every layer that is on its way."""

import jax
import pytest

import wavejax
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention
from wavejax.documents import restore


@pytest.mark.parametrize("attention", [DenseAttention(), WaveAttention(CONFIG, "device")])
def test_a_layer_is_waited_for_before_the_next_is_put(attention, tmp_path, monkeypatch):
    generator, [prompt] = Generator(MODEL, attention, GREEDY), make_prompts((300,))
    given = {"generator": generator, "params": make_params()}
    state = generator.start(make_params(), [prompt], 4)
    wavejax.save_document(state, tmp_path / "d", token_ids=prompt, **given)
    document = wavejax.load_document(tmp_path / "d", **given)
    waited, layers, wait, put = [], [], jax.block_until_ready, restore.arrays.put

    def put_too(part, slot, kept, layer=None):
        if layer is not None:
            layers.append(layer)
            assert any(array is part.array for array in waited)
        return put(part, slot, kept, layer)

    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or wait(x))
    monkeypatch.setattr(restore.arrays, "put", put_too)
    document.start(generator, 4)
    assert {*layers} == {*range(MODEL.num_layers)}
