"""Codes of real keys: SmolLM2's, of a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from models.checkpoints.open import find_default_model, open_checkpoint
from models.text.tokenizer import load_tokenizer
from pallas_kernels.encode_tokens import rotation
from pallas_kernels.encode_tokens.reference import unpack_signs
from wavejax import DenseAttention, Generator
from wavejax.evaluation.haystack import load_haystack

# A real model runs longer than it compiles.
pytestmark = pytest.mark.optimised


@pytest.fixture(scope="module")
def smollm2():
    """Configuration, float32 parameters and tokenizer."""
    path = find_default_model()
    checkpoint = open_checkpoint(path)
    return checkpoint.config, checkpoint.load_params("float32"), load_tokenizer(path)


@pytest.mark.slow(10)
def test_codes_error_on_real_keys_is_as_theory_says(smollm2):
    """The codes' estimates of q.k for real keys and queries: no bias, and RaBitQ's deviation."""
    config, params, tokenizer = smollm2
    text = tokenizer.encode(load_haystack().take(450), add_special=True)[:600]
    attention = DenseAttention()
    state = Generator(config, attention).start(params, [text], 1)
    layer, head = 12, 1
    keys = state.attention_state.keys.data[layer, 0, head, : len(text)]
    centroids = jnp.broadcast_to(keys.reshape(-1, keys.shape[-1])[:512].mean(0), keys.shape)
    queries = keys[-64:]  # of the same distribution as queries are, up to a rotation
    head_dim = keys.shape[-1]
    errors, expected = [], []
    gaussian = jax.random.normal(jax.random.key(0), (32, head_dim, head_dim))
    for matrix in [jnp.asarray(rotation(head_dim)), *jnp.linalg.qr(gaussian)[0]]:
        coded = ops.encode_tokens(keys, centroids, matrix)
        signs = unpack_signs(coded.codes, head_dim).astype(jnp.float32)
        estimate = coded.scales * ((queries @ matrix.T) @ signs.T)
        residual = keys - centroids
        length = jnp.linalg.norm(residual, axis=-1)
        along = queries @ residual.T
        errors.append(np.asarray(estimate - along))
        across = jnp.sqrt(jnp.maximum((queries**2).sum(-1)[:, None] - (along / length) ** 2, 0))
        cosine = length / (coded.scales * np.sqrt(head_dim))
        tangent = jnp.sqrt(1 - cosine**2) / cosine
        expected.append(np.asarray(across * length * tangent / np.sqrt(head_dim - 1)))
    normalised = np.stack(errors) / np.stack(expected)
    # A mean over 33 rotations of errors that share them: its own deviation is about 1 / sqrt(33).
    assert abs(normalised.mean()) < 0.2
    assert normalised.std() == pytest.approx(1.0, abs=0.1)
