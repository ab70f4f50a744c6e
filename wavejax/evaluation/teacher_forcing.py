"""Compares attentions on full attention's own answer, from one shared prefill."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.parameters import Params
from wavejax.dense_attention import DenseState
from wavejax.generator import NO_TOKEN, DecodeState, Generator
from wavejax.wave_attention import WaveAttention


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a method does on the tokens that full attention generated greedily.

    Attributes:
        kl: mean over the answer's tokens of KL(full || method), in nats.
        match: share of the answer's tokens that are the method's most probable ones too.
        kept: of the reference strings that full attention gives, the share whose tokens are all
            the method's most probable ones; NaN where full attention gives none.
    """

    kl: float
    match: float
    kept: float


def greedy(generator: Generator, params: Params, state: DecodeState, tokens: int) -> np.ndarray:
    """Generates with a copy of the state: int32 `[steps, batch]`."""
    _, answer = generator.decode_n(params, jax.tree.map(jnp.copy, state), tokens)
    return np.asarray(answer)


def share_prefill(
    generator: Generator, dense: DecodeState, prompt_tokens: int, new_tokens: int
) -> DecodeState:
    """Builds a wave generator's state from a full one's cache, without running the model.

    Prefill is exact whatever the attention, so the methods of a sample can share it.

    Args:
        generator: one with `WaveAttention`.
        dense: the state that a generator with `DenseAttention` started; not donated.
        prompt_tokens: the padded length of its longest prompt.
        new_tokens: room for so many tokens.
    """
    attention, full = generator.attention, dense.cache
    assert isinstance(attention, WaveAttention)
    assert isinstance(full, DenseState)
    batch = full.tokens.shape[0]
    cache = attention.init_state(generator.model, batch, prompt_tokens, new_tokens, full.keys.dtype)
    for sequence in range(batch):
        where = jnp.int32(sequence), full.tokens[sequence]
        for layer in range(generator.model.num_layers):
            cache = _write(
                attention, jnp.int32(layer), *where, full.keys, full.values, cache, prompt_tokens
            )
        cache = attention.finish_prefill(cache, *where)
    return DecodeState(
        cache, jnp.copy(dense.logits), jnp.copy(dense.finished), dense.seed + 0, dense.step + 0
    )


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnames="cache")
def _write(
    attention: WaveAttention,
    layer: Array,
    sequence: Array,
    length: Array,
    keys: Array,
    values: Array,
    cache: Any,
    room: int,
) -> Any:
    key, value = (jnp.swapaxes(x[layer, sequence, :, :room], 0, 1) for x in (keys, values))
    return attention.write_prompt(layer, key, value, cache, sequence=sequence, length=length)


def compare(
    answer: np.ndarray, full_logits: Array, logits: Array, references: list[np.ndarray]
) -> Agreement:
    """Compares a method's logits with full attention's over one answer.

    Args:
        answer: `[steps]`, the tokens forced.
        full_logits, logits: `[steps, vocab]`, from which each token would have been drawn.
        references: for each reference string that the answer gives, the steps of its tokens.
    """
    steps = answer != NO_TOKEN
    full = jax.nn.log_softmax(jnp.asarray(full_logits, jnp.float32))
    other = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    kl = np.asarray(jnp.sum(jnp.exp(full) * (full - other), axis=-1))[steps]
    same = np.asarray(jnp.argmax(other, axis=-1)) == answer
    kept = [same[places].all() for places in references]
    return Agreement(
        float(kl.mean()), float(same[steps].mean()), float(np.mean(kept)) if kept else float("nan")
    )


def places_of(reference: str, pieces: list[str]) -> np.ndarray | None:
    """The steps whose texts spell the reference in the answer; None if it is not there."""
    ends = np.cumsum([len(piece) for piece in pieces])
    start = "".join(pieces).find(reference)
    if start < 0:
        return None
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, start + len(reference) - 1, side="right"))
    return np.arange(first, last + 1)
