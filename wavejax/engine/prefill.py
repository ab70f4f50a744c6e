"""Reads one prompt: all layers of an engine, one after another."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from models import unstacked
from models.parameters import Params
from wavejax.engine import compiled
from wavejax.engine.interface import Engine
from wavejax.engine.prompts import bucket
from wavejax.engine.state import commit


def read_prompt(
    engine: Engine,
    params: Params,
    prompt: Int[np.ndarray, "_tokens"],
    sequence: int,
    attention_state: Any,
    logits: Array,
    progress: Callable[[int], None] | None = None,
) -> tuple[Any, Array]:
    """Run a prompt through the model and write its cache.

    Args:
        engine: what runs the layers.
        params: the model's parameters.
        prompt: token ids.
        sequence: where in the batch it goes.
        attention_state: as the engine holds it; donated.
        logits: `[batch, vocab]` float32; donated.
        progress: called with the layers done; then this waits for each layer, one behind.

    Returns:
        the attention state, and the logits with the prompt's next token's.
    """
    layers, ends = engine.model_config.num_layers, unstacked.without_layers(params)
    padded = np.zeros((1, bucket(len(prompt))), np.int32)
    padded[0, : len(prompt)] = prompt
    where = np.int32(sequence), np.int32(len(prompt))
    hidden = commit(compiled.embed(engine.model_config, ends, jnp.asarray(padded)))
    for layer in range(layers):
        previous, weights = hidden, unstacked.only_layer(params, layer)
        hidden, attention_state = engine.prefill_layer(
            weights, hidden, np.int32(layer), *where, attention_state
        )
        if progress is not None and layer > 0:
            # One layer behind, so that the device always has the next one queued.
            previous.block_until_ready()
            progress(layer)
    attention_state, logits = engine.finish_prefill(ends, hidden, *where, attention_state, logits)
    if progress is not None:
        logits.block_until_ready()
        progress(layers)
    return attention_state, logits
