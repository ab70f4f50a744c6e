"""Properties of the decoder that hold for any parameters, and random parameters themselves."""

import dataclasses
import doctest
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.decoder
from models.checkpoints.hf_config import config_from_hf
from models.config import ModelConfig
from models.decoder import Decoder, apply_layer, embed, final_norm, unembed
from models.layer import enter_layer, pick_layer
from models.parameters import parameter_axes, parameter_shapes
from tests.support import plain_attention, tiny_models

TOKENS = 12


@functools.cache
def make(name: str) -> tuple[Decoder, dict[str, Any], Any]:
    config = config_from_hf(tiny_models.CONFIGS[name])
    decoder = Decoder(config, plain_attention.attend)
    tokens = jnp.asarray(tiny_models.make_tokens(tiny_models.CONFIGS[name])[:, :TOKENS])
    state = plain_attention.empty_state(config, tokens.shape[0], TOKENS)
    positions = jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)
    inputs = (tokens, positions, state)
    return decoder, jax.jit(decoder.init)(jax.random.key(3), *inputs), inputs


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_random_parameters(name: str) -> None:
    decoder, params, _ = make(name)
    leaves = jax.tree_util.tree_flatten_with_path(params["params"])[0]
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    assert shapes == parameter_shapes(decoder.config)
    for path, leaf in leaves:
        parameter = path[-1].key
        if parameter.endswith("norm"):
            assert (leaf == 1).all()
        elif parameter.endswith("bias"):
            assert (leaf == 0).all()
        else:
            # Variance 1 / inputs; drawn anew for every layer and every parameter.
            np.testing.assert_allclose(leaf.std() * leaf.shape[-1] ** 0.5, 1, atol=0.1)
            assert len(np.unique(leaf)) > 0.99 * leaf.size
    assert not np.array_equal(params["params"]["layers"]["gate"], params["params"]["layers"]["up"])


def test_every_axis_has_a_name() -> None:
    """Sizes that all differ, so that no name can stand for another."""
    config = ModelConfig("llama", 97, 5, 31, 57, 6, 3, 14, 64, qkv_bias=True, qk_norm=True)
    sizes = {
        "vocab": 97,
        "layers": 5,
        "embed": 31,
        "mlp": 57,
        "heads": 6 * 14,
        "kv_heads": 3 * 14,
        "head_dim": 14,
    }
    axes, shapes = parameter_axes(config), parameter_shapes(config)
    assert list(axes) == list(shapes)
    for path, shape in shapes.items():
        assert tuple(sizes[axis] for axis in axes[path]) == shape
        assert (axes[path][0] == "layers") == (path[0] == "layers")
    assert {axis for names in axes.values() for axis in names} == set(sizes)
    assert axes["layers", "query"] == ("layers", "heads", "embed")
    assert axes["layers", "output"] == ("layers", "embed", "heads")
    assert axes["layers", "key_bias"] == ("layers", "kv_heads")
    assert axes["layers", "query_norm"] == ("layers", "head_dim")


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_axes_are_those_of_the_parameters(name: str) -> None:
    config = config_from_hf(tiny_models.CONFIGS[name])
    axes, shapes = parameter_axes(config), parameter_shapes(config)
    assert {path: len(names) for path, names in axes.items()} == {
        path: len(shape) for path, shape in shapes.items()
    }
    assert shapes["layers", "down"] == (3, config.hidden_size, config.intermediate_size)
    assert shapes["layers", "key"][1] == config.num_kv_heads * config.head_dim
    assert (("unembedding",) in shapes) == (not config.tie_embeddings)


def test_the_modules_example_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(Decoder, "Decoder", models.decoder)
    assert example.examples
    report: list[str] = []
    doctest.DocTestRunner().run(example, out=report.append)
    assert not report


def test_layer_by_layer_equals_the_whole() -> None:
    decoder, params, (tokens, positions, state) = make("qwen3")
    config = decoder.config
    whole, whole_state = jax.jit(decoder.apply)(params, tokens, positions, state)
    hidden = embed(config, params, tokens)
    seen = []

    def attend(layer: Any, query: Any, key: Any, value: Any, state: Any) -> Any:
        assert layer.dtype == jnp.int32
        assert query.shape == (2, TOKENS, config.num_heads, config.head_dim)
        assert key.shape == value.shape == (2, TOKENS, config.num_kv_heads, config.head_dim)
        seen.append(int(layer))
        return plain_attention.attend(layer, query, key, value, state)

    for layer in range(config.num_layers):
        hidden, state = apply_layer(config, params, layer, hidden, positions, attend, state)
    assert seen == list(range(config.num_layers))
    np.testing.assert_allclose(final_norm(config, params, hidden), whole, atol=1e-5)
    for left, right in zip(state, whole_state, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_layers_without_rope_see_no_positions() -> None:
    """By a number that is known and by one that is traced; in a loop, written out, one by one."""
    decoder, params, (tokens, positions, state) = make("qwen2_yarn")  # whose RoPE has a factor
    config = dataclasses.replace(decoder.config, rope_layers=(True, False, True))
    hidden = embed(config, params, tokens)
    moved = positions + jnp.arange(TOKENS) ** 2 + 1
    enter = functools.partial(enter_layer, config)
    for layer, has_rope in enumerate(config.rope_layers or ()):
        weights = pick_layer(params, layer)
        here, there = (enter(weights, layer, hidden, at) for at in (positions, moved))
        traced = jax.jit(enter)(weights, jnp.int32(layer), hidden, moved)
        usual = enter_layer(decoder.config, weights, layer, hidden, moved)
        for left, right, by_number in zip(here[:2], there[:2], traced[:2], strict=True):
            assert np.array_equal(left, right) != has_rope
            np.testing.assert_allclose(by_number, right, atol=1e-5)
        assert np.array_equal(there[0], usual[0]) == has_rope
        np.testing.assert_array_equal(there[2], usual[2])

    def run(config: ModelConfig, unroll: bool = False) -> Any:
        decoder = Decoder(config, plain_attention.attend, unroll=unroll)
        return jax.jit(decoder.apply)(params, tokens, positions, state)[0]

    whole, state_now = run(config), state
    np.testing.assert_allclose(run(config, unroll=True), whole, atol=1e-5)
    for layer in range(config.num_layers):
        hidden, state_now = apply_layer(
            config,
            params,
            jnp.int32(layer),
            hidden,
            positions,
            plain_attention.attend,
            state_now,
        )
    np.testing.assert_allclose(final_norm(config, params, hidden), whole, atol=1e-5)
    assert np.abs(run(decoder.config) - whole).max() > 1e-2
    everywhere = dataclasses.replace(config, rope_layers=(True, True, True))
    np.testing.assert_allclose(run(everywhere), run(decoder.config), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype: Any) -> None:
    decoder, exact_params, inputs = make("llama")
    apply = jax.jit(decoder.apply)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), exact_params)
    hidden, _ = apply(params, *inputs)
    logits = unembed(decoder.config, params, hidden)
    assert (hidden.dtype, logits.dtype) == (dtype, jnp.float32)
    exact_hidden, _ = apply(exact_params, *inputs)
    exact = unembed(decoder.config, exact_params, exact_hidden)
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 0 < error < (0.05 if dtype == jnp.bfloat16 else 0.005)


def test_positions_matter_only_relatively() -> None:
    """RoPE: shifting all positions changes nothing; moving one token does."""
    decoder, params, (tokens, positions, state) = make("llama31")
    apply = jax.jit(decoder.apply)
    base, _ = apply(params, tokens, positions, state)
    shifted, _ = apply(params, tokens, positions + 100, state)
    np.testing.assert_allclose(shifted, base, atol=1e-4)
    moved, _ = apply(params, tokens, positions.at[:, 0].add(5), state)
    assert np.abs(moved - base).max() > 1e-2


def test_a_long_prompts_mlp_goes_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, params, (tokens, positions, state) = make("llama")
    whole, _ = jax.jit(decoder.apply)(params, tokens, positions, state)
    inner = decoder.config.intermediate_size
    for block, at_once in [(4, 4), (6, 6), (8, 4), (11, TOKENS)]:  # of 12 tokens
        monkeypatch.setattr("models.layer.MLP_BLOCK", block)
        apply = jax.jit(lambda *inputs: decoder.apply(*inputs))  # compiled anew
        text = apply.lower(params, tokens, positions, state).as_text()
        assert f"tensor<2x{at_once}x{inner}xf32>" in text
        np.testing.assert_allclose(apply(params, tokens, positions, state)[0], whole, atol=1e-5)
