"""What a kept document depends on: the model, its weights, the tokenizer, the settings."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from models.config import ModelConfig
from models.errors import InputError
from models.joined import separate_layer
from models.parameters import Params
from models.text.tokenizer import Tokenizer
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.wave import WaveAttention
from wavejax.config import DECODE_SETTINGS
from wavejax.engine.modes import own_modes

# Of a model, what no key or value depends on.
_FREE_OF_MODEL = ("max_context", "stop_token_ids", "bos_token_id", "sliding_window")
# Of wave attention's settings, what nothing that is kept depends on.
_FREE_SETTINGS = (*DECODE_SETTINGS, "cache_fraction", "audit", "tolerance")
# Settings that documents kept before them do not name, and what they were then.
_ADDED = {"row_dtype": "model", "reach": 0.0, "pooled_covariance": False}
_PROBE = 'The "naïve" fox\'s 12,345 cafés:\n\n\t漢字 -- x_1 = 0.5;  done!'


def fingerprints(
    model_config: ModelConfig,
    params: Params,
    attention: AnyAttention,
    tokenizer: Tokenizer | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Describe what a kept document depends on, in plain values.

    Args:
        model_config: the model's.
        params: its parameters.
        attention: what keeps keys and values. Where they are, on the device or the host, is free.
        tokenizer: None where token ids are all there is.
        weights: `weights_fingerprint(params)`, where it is known already.
    """
    said = settings_of(model_config, attention) | {
        "weights": weights or weights_fingerprint(params),
        "dtype": params["params"]["embedding"].dtype.name,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "template": None if tokenizer is None else _digest(tokenizer.chat_template),
    }
    return json.loads(json.dumps(said))


def settings_of(model_config: ModelConfig, attention: AnyAttention) -> dict[str, Any]:
    """Describe the part of `fingerprints` that is settings: no weight is read."""
    model = model_config.to_json()
    settings: dict[str, Any] = {"row_dtype": attention.row_dtype}
    if isinstance(attention, WaveAttention):
        settings = dataclasses.asdict(attention.config)
    said = {
        "model": {name: x for name, x in model.items() if name not in _FREE_OF_MODEL},
        "attention": type(attention).__name__,
        "settings": {name: x for name, x in settings.items() if name not in _FREE_SETTINGS},
    }
    return json.loads(json.dumps(said))


def check_fingerprints(where: str, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a document was kept with and what is to go on with it.

    Args:
        where: how to name the document in a message.
        kept, now: of `fingerprints`. A tokenizer that one of them has not is not compared.

    Raises:
        InputError: they differ; it names how.
    """
    for group, ways in (
        ("model", "load it with the model that read it"),
        ("settings", "give the settings that it was read with"),
    ):
        theirs, ours = kept.get(group) or {}, now.get(group) or {}
        theirs = {name: x for name, x in _ADDED.items() if name in ours} | theirs
        if kept["attention"] != now["attention"]:
            theirs = ours = {}  # said below
        different = [
            f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
            for name in dict.fromkeys([*theirs, *ours])
            if theirs.get(name) != ours.get(name)
        ]
        if different:
            raise InputError(
                f"{where} was kept with {'another model' if group == 'model' else 'other settings'}"
                f": {', '.join(different[:3])}; {ways}, or read the document again"
            )
    for name, what in (
        ("attention", "another attention"),
        ("dtype", "another dtype"),
        ("weights", "other weights of the model, or in another `weight_dtype`"),
        ("tokenizer", "another tokenizer"),
        ("template", "another chat template"),
    ):
        theirs, ours = kept.get(name), now.get(name)
        if theirs != ours and theirs is not None and ours is not None:
            names = f" ({theirs} there, {ours} here)" if name in ("attention", "dtype") else ""
            raise InputError(
                f"{where} was kept with {what}{names}; load it with what read it, or read the "
                "document again"
            )


def weights_fingerprint(params: Params) -> str:
    """Digest all weights: equal for equal ones, their layers stacked or unstacked.

    One pass over the memory, in whole numbers, so that it is the same on every device.
    """
    with own_modes():
        tree = dict(params["params"])
        layers = tree.pop("layers")
        if isinstance(layers, tuple):
            # All are under way before the first is waited for.
            sums = jax.device_get([_sums_of_layer(one) for one in layers])
            stacked = {name: [int(one[name]) for one in sums] for name in sums[0]}
        else:
            sums = jax.vmap(_sums)(layers)
            stacked = {name: x.tolist() for name, x in sums.items()}
        ends = {name: int(x) for name, x in jax.device_get(_sums(tree)).items()}
    return _digest({"layers": stacked, **ends})


@jax.jit
def _sums_of_layer(layer: dict[str, Any]) -> dict[str, Array]:
    return _sums(separate_layer(layer))


@jax.jit
def _sums(parameters: dict[str, Any]) -> dict[str, Array]:
    """Sum each array, by its parameter's name; of a quantised matrix each of its arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(parameters)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {name: _sum(x) for name, (_, x) in zip(names, leaves, strict=True)}


def _sum(array: Array) -> Array:
    """Add a mix of each number's bits and its place up, modulo 2**32.

    MurmurHash3's finaliser mixes: without it a change of the upper bits of an even count of
    numbers, as of all signs, would add up to nothing.
    """
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32).reshape(-1)
    place = lax.iota(jnp.uint32, bits.shape[0])
    mixed = bits ^ place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ mixed >> shift) * jnp.uint32(factor)
    return jnp.sum(mixed ^ mixed >> 16, dtype=jnp.uint32)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Digest what a tokenizer does: its vocabulary, its special tokens, and a text's tokens.

    Not how it is written down, which changes with the library's version.
    """
    backend = tokenizer.backend
    added = backend.get_added_tokens_decoder()
    return _digest(
        {
            "vocab": backend.get_vocab(with_added_tokens=True),
            "added": {index: [token.content, token.special] for index, token in added.items()},
            "probe": tokenizer.encode(_PROBE, add_special=True),
        }
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
