"""Whether loaded parameters hold the numbers that a quantised folder stands for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.decoder import apply_model, unembed
from models.formats import WeightFormat, bytes_by_parameter
from models.quantised import QuantisedMatrix, formats_of
from tests.support.quantised_cases import dequantised
from wavejax import DenseAttention, Generator

_IN_LAYERS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
LAYERS = tuple(name for name in _IN_LAYERS if not name.endswith("norm"))
"""The matrices of a layer."""

_OTHERS = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "unembedding": "lm_head"}


def assert_holds(params: Any, expected: dict[str, np.ndarray], atol: float = 0) -> None:
    """Compare each parameter, dequantised, with the numbers of the file's tensors."""
    tree = params["params"]
    compared = 0
    for ours, name in _OTHERS.items():
        if ours in tree:
            np.testing.assert_allclose(
                _floats(tree[ours]), expected[f"{name}.weight"], rtol=0, atol=atol
            )
            compared += 1
    for ours, name in _IN_LAYERS.items():
        for layer, given in enumerate(_floats(tree["layers"][ours])):
            theirs = expected[f"model.layers.{layer}.{name}.weight"]
            np.testing.assert_allclose(given, theirs, rtol=0, atol=atol)
            compared += 1
    assert compared == len(expected)


def assert_kept(checkpoint: Any, expected: dict[str, np.ndarray], format: WeightFormat) -> None:
    """Hold a folder's floats and kept levels to its numbers, and the levels to what is counted."""
    assert_holds(checkpoint.load_params("float32"), expected)
    packed = checkpoint.load_params("float32", None, "packed")
    assert_holds(packed, expected)
    assert formats_of(packed) == {("layers", layer): format for layer in LAYERS}
    counted = bytes_by_parameter(checkpoint.config, 4, checkpoint.formats("packed"))
    assert sum(counted.values()) == sum(x.nbytes for x in jax.tree.leaves(packed))


def assert_same_steps(checkpoint: Any) -> None:
    """Hold the logits of kept levels to those of the folder's floats, and of their own."""
    floats, packed = (checkpoint.load_params("float32", None, kind) for kind in ("model", "packed"))
    assert formats_of(packed)
    ours = answer_logits(checkpoint.config, packed)
    for params in (floats, dequantised(packed)):
        theirs = answer_logits(checkpoint.config, params)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def _floats(leaf: Any) -> np.ndarray:
    if isinstance(leaf, QuantisedMatrix):
        leaf = leaf.dequantise(np.float32)
    return np.asarray(leaf)


def answer_logits(config: Any, params: Any) -> np.ndarray:
    """Logits of a prompt and of the answer to it: float32 ``[tokens, vocab]``."""
    generator = Generator(config, DenseAttention())
    state = generator.start(params, [[3, 14, 15, 9, 26, 5, 35]], 8)
    tokens = np.asarray(generator.decode_n(params, state, 6)[1])[:, 0].tolist()
    sequence = jnp.array([[3, 14, 15, 9, 26, 5, 35, *tokens]])

    def attend(layer: Any, query: Any, key: Any, value: Any, state: Any) -> Any:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True), state

    positions = jnp.arange(sequence.shape[1])[None]
    hidden, _ = apply_model(config, params, sequence, positions, attend, None)
    return np.asarray(unembed(config, params, hidden)[0])
