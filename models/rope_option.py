"""RoPE scaling that a user asks for, of a model whose files state none."""

import dataclasses
import math

from models.config import ModelConfig, RopeScaling, times_longer, yarn_attention_factor
from models.errors import InputError

_FORMS = "yarn:FACTOR, yarn:FACTOR:ORIGINAL_CONTEXT or linear:FACTOR, as in yarn:4"


def with_rope_scaling(config: ModelConfig, text: str) -> ModelConfig:
    """Return the config of the same model with RoPE scaled, and the longer context that this gives.

    Args:
      config: of a model that does not scale RoPE.
      text: ``yarn:FACTOR``, ``yarn:FACTOR:ORIGINAL_CONTEXT`` or ``linear:FACTOR``. FACTOR says how
        many times longer the context becomes. ORIGINAL_CONTEXT, in tokens, is the one that YaRN's
        frequencies start from; the model's `max_context` unless given. The same settings as
        `rope_scaling` of config.json give the same numbers.

    Raises:
      InputError: another text, a model that scales RoPE already, or one whose context its sliding
        window ends.
    """
    kind, factor, original = _parse(text, config.max_context)
    scaling = config.rope_scaling
    if scaling is not None:
        by = "" if scaling.kind == "divisors" else f" ({scaling.kind}, factor {scaling.factor:g})"
        raise InputError(
            f"RoPE scaling {text!r}: the model scales RoPE already{by}, up to "
            f"{config.max_context} tokens; leave the option out"
        )
    context = times_longer(original, factor, repr(text))
    if context <= config.max_context:
        raise InputError(
            f"RoPE scaling {text!r} makes a context of {context} tokens; the model has "
            f"{config.max_context} without it"
        )
    window = config.sliding_window or context
    if window <= config.max_context:
        raise InputError(
            f"RoPE scaling {text!r}: the model's context ends with its sliding window of {window} "
            "tokens, which RoPE scaling does not widen; leave the option out"
        )
    if kind == "yarn":
        scaling = RopeScaling(
            "yarn",
            factor=factor,
            original_context=original,
            attention_factor=yarn_attention_factor(factor),
        )
    else:
        scaling = RopeScaling("linear", factor=factor)
    return dataclasses.replace(config, rope_scaling=scaling, max_context=min(context, window))


def suggest_rope_scaling(config: ModelConfig, tokens: int) -> str | None:
    """Return the text for `with_rope_scaling` that makes room for `tokens`; None where none would.

    The factor is the smallest power of two that does: YaRN is made for the factors 2 to 32.
    """
    ends_before = config.sliding_window is not None and config.sliding_window < tokens
    if config.rope_scaling is not None or ends_before or tokens <= config.max_context:
        return None
    factor = 2 ** math.ceil(math.log2(tokens / config.max_context))
    return f"yarn:{factor}" if factor <= 32 else None


def _parse(text: str, max_context: int) -> tuple[str, float, int]:
    """Kind, factor and original context that a text asks for."""
    wrong = InputError(f"RoPE scaling {text!r}; expected {_FORMS}")
    kind, *numbers = text.strip().split(":")
    if len(numbers) not in {"yarn": (1, 2), "linear": (1,)}.get(kind, ()):
        raise wrong
    try:
        factor = float(numbers[0])
        original = int(numbers[1]) if len(numbers) == 2 else max_context
    except ValueError:
        raise wrong from None
    if not (math.isfinite(factor) and factor > 1):
        raise InputError(f"RoPE scaling {text!r}: its factor is {numbers[0]}; expected more than 1")
    if not 1 <= original <= max_context:
        raise InputError(
            f"RoPE scaling {text!r}: its original context is {original} tokens; expected 1 to the "
            f"model's {max_context}, of which the factor makes more"
        )
    return kind, factor, original
