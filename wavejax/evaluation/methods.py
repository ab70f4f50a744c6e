"""The methods by name, all at one budget of tokens: attentions that differ in decoding only."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from models.errors import InputError
from wavejax.attention.dense import DenseAttention
from wavejax.attention.wave import WaveAttention
from wavejax.config import WaveConfig
from wavejax.evaluation.ablations import AblatedAttention
from wavejax.evaluation.baselines import Rank, SparseAttention

FULL = "full"
METHODS = {
    FULL: "full attention; full[row_dtype=int8] for rounded keys and values",
    "oracle": "the tokens of most true mass; nothing is estimated",
    "streaming_llm": "sinks and a window extended to the budget",
    "quest": "pages of 16 tokens by the upper bound of their logits",
    "paper": "RetroInfer's settings: whole clusters of 16, 23.2 % estimated",
    "wave": "wave attention: clusters and token codes, all others estimated",
    "wave_no_estimation": "the same, nothing estimated",
    "wave_no_codes": "the same, whole clusters retrieved",
    "ablation": "wave attention with code_bits, rotated, group_by or corrected of another kind",
}
# An ablation without settings is wave attention again, only slower.
DEFAULT_METHODS = tuple(name for name in METHODS if name != "ablation")
_RANKS: dict[str, Rank] = {
    "oracle": "mass",
    "streaming_llm": "recency",
    "quest": "page_bound",
}
# What an ablation has more than wave attention.
_PARTS = {
    field.name: type(field.default)
    for field in dataclasses.fields(AblatedAttention)[len(dataclasses.fields(WaveAttention)) :]
}
_OWN: dict[str, dict[str, Any]] = {
    "wave_no_estimation": {"estimation_fraction": 0.0},
    "wave_no_codes": {"token_codes": False},
}


def parse_methods(
    text: str, budget: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, DenseAttention | WaveAttention]:
    """Attentions by the name that each was given.

    Args:
        text: names separated by commas; a name may be followed by settings of its own, fields of
            `WaveConfig`: `wave[candidate_fraction=0.1,cluster_size=16]`; an ablation's also of
            `AblatedAttention`; full attention's `row_dtype` alone.
        budget: settings of all of them.
        defaults: of `WaveConfig`, as they were when the methods ran; None: as they are.

    Raises:
        InputError: a name or a field is not known, a value does not fit its field, or the method
            has no use for it.
    """
    found = {}
    today = dataclasses.asdict(WaveConfig())
    then = {k: v for k, v in (defaults or {}).items() if k in today and v != today[k]}
    for spec in re.split(r",(?![^\[]*\])", text):
        match = re.fullmatch(r"\s*(\w+)\s*(?:\[(.*)\])?\s*", spec)
        if match is None or match[1] not in METHODS:
            raise InputError(
                f"no method {spec.strip()!r}; there are: {', '.join(METHODS)}, each with settings "
                "if wanted, as in wave[candidate_fraction=0.1,cluster_size=16]"
            )
        settings = _settings(match[2] or "", match[1])
        try:
            found[re.sub(r"\s", "", spec)] = _attention(match[1], then, budget, settings)
        except InputError as error:
            # Fields between brackets, where no flag stands for them.
            raise InputError(f"{spec.strip()}: {str(error).replace('`', '')}") from error
    return found


def _attention(
    name: str, defaults: dict[str, Any], budget: dict[str, Any], settings: dict[str, Any]
) -> DenseAttention | WaveAttention:
    if name == FULL:
        row_dtype = settings.pop("row_dtype", "model")
        if settings:
            raise InputError(f"{FULL} has no settings but row_dtype, and {settings} were given")
        return DenseAttention(row_dtype=row_dtype)
    if "admission_ratio" in settings and (name in _RANKS or name == "ablation"):
        raise InputError(
            f"{name} has no row cache, so it admits nothing to one; leave admission_ratio out, or "
            "give it to wave"
        )
    if name == "ablation":
        parts = {part: settings.pop(part) for part in _PARTS if part in settings}
        config = WaveConfig(**{**defaults, **budget, **settings})
        return AblatedAttention(config, "device", **parts)
    if name == "paper":
        # Its own settings are not defaults.
        paper = dataclasses.asdict(WaveConfig.paper())
        defaults = {k: v for k, v in defaults.items() if paper[k] == getattr(WaveConfig(), k)}
    own = {**defaults, **_OWN.get(name, {}), **budget, **settings}
    if name in _RANKS:
        return SparseAttention(WaveConfig(**own), _RANKS[name])
    make = WaveConfig.paper if name == "paper" else WaveConfig
    config = make(**own)
    # On the device: it is answers that are compared, not memory. What is admitted to the row cache
    # depends on what is in it.
    return WaveAttention(config, "device", cached=config.admission_ratio > 1)


def _settings(text: str, method: str) -> dict[str, Any]:
    kinds = {field.name: type(field.default) for field in dataclasses.fields(WaveConfig)}
    if method == "ablation":
        kinds |= _PARTS
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in kinds:
            raise InputError(f"no setting {name!r} in {part!r}; there are: {', '.join(kinds)}")
        found[name] = _value(name, value, kinds[name])
    return found


def _value(name: str, text: str, kind: type) -> Any:
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return {int: int, float: float, str: str}[kind](text)
    except (KeyError, ValueError) as error:
        raise InputError(f"{name} is {text!r}; it must be of type {kind.__name__}") from error
