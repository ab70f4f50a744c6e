"""The decoder against what transformers computed (scripts/record_reference_outputs.py)."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.open import find_default_model, open_checkpoint
from models.decoder import Decoder, apply_layer, embed, final_norm, unembed
from tests.support import plain_attention, tiny_models

# The outputs compared are those of users.
pytestmark = pytest.mark.optimised

REFERENCES = Path(os.environ.get("WAVEJAX_REFERENCES") or Path(__file__).parents[1] / "references")
TOLERANCE = 5e-5


@pytest.mark.parametrize(
    ("name", "unroll"), [*((name, False) for name in tiny_models.CONFIGS), ("qwen2", True)]
)
def test_tiny_model_matches_transformers(name: str, unroll: bool, tmp_path: Path) -> None:
    reference = np.load(REFERENCES / f"{name}.npz")
    tiny_config = tiny_models.CONFIGS[name]
    np.testing.assert_array_equal(reference["tokens"], tiny_models.make_tokens(tiny_config))
    tiny_models.write_folder(tmp_path, tiny_config, tiny_models.make_tensors(tiny_config))
    checkpoint = open_checkpoint(tmp_path)
    config, params = checkpoint.config, checkpoint.load_params("float32")
    decoder = Decoder(config, plain_attention.attend, unroll=unroll)

    @jax.jit
    def step(tokens, positions, state):
        hidden, state = decoder.apply(params, tokens, positions, state)
        return unembed(config, params, hidden), plain_attention.advance(state, tokens.shape[1])

    tokens = jnp.asarray(reference["tokens"])
    batch, total = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(total), tokens.shape)
    state = plain_attention.empty_state(config, batch, total)
    prefill = reference["prefill"].shape[1]
    logits, state = step(tokens[:, :prefill], positions[:, :prefill], state)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - reference["prefill"]).max() < TOLERANCE

    steps = reference["decode"].shape[1]
    assert steps == 32
    decoded = []
    for at in range(prefill, prefill + steps):
        logits, state = step(tokens[:, at : at + 1], positions[:, at : at + 1], state)
        decoded.append(logits)
    assert np.abs(jnp.concatenate(decoded, 1) - reference["decode"]).max() < TOLERANCE


def test_smollm2_file_matches_transformers_on_real_text() -> None:
    """Layer by layer, with one compiled program for all layers."""
    reference = np.load(REFERENCES / "smollm2_gguf.npz")
    checkpoint = open_checkpoint(find_default_model())
    config, params = checkpoint.config, checkpoint.load_params("float32")
    tokens = jnp.asarray(reference["tokens"])[None]
    assert tokens.shape == (1, 256)
    positions = jnp.arange(tokens.shape[1])[None]
    state = plain_attention.empty_state(config, 1, tokens.shape[1])

    @jax.jit
    def run_layer(params, layer, hidden, state):
        return apply_layer(config, params, layer, hidden, positions, plain_attention.attend, state)

    hidden = embed(config, params, tokens)
    for layer in range(config.num_layers):
        hidden, state = run_layer(params, jnp.int32(layer), hidden, state)
    assert run_layer._cache_size() == 1
    logits = unembed(config, params, final_norm(config, params, hidden))[0]
    np.testing.assert_array_equal(logits.argmax(-1), reference["argmax"])
    assert np.abs(logits.max(-1) - reference["max_logits"]).max() < 1e-3
