"""What a decoder needs to know about a model, whichever file the model came from."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import InputError
from models.families import FAMILIES, unknown_architecture
from models.values import INT32_LIMIT

ROPE_KINDS = ("linear", "llama3", "yarn", "divisors")


@dataclass(frozen=True)
class RopeScaling:
    """How a model's rotary frequencies differ from plain RoPE.

    Attributes:
      kind: ``linear`` (positions divided by `factor`), ``llama3`` (Llama 3.1), ``yarn`` (Peng et
        al. 2023, arXiv:2309.00071) or ``divisors`` (every frequency divided by its own number,
        which is how GGUF files state Llama 3.1's scaling).
      factor: how many times longer the context becomes.
      original_context: tokens of context before scaling (llama3, yarn).
      low_freq_factor, high_freq_factor: llama3's borders, as divisors of `original_context`.
      attention_factor: multiplies cosine and sine, so queries and keys alike (yarn).
      beta_fast, beta_slow: yarn's borders, in rotations over the original context.
      truncate: whether yarn's borders are rounded outwards to whole dimensions.
      divisors: one number for each frequency, `head_dim / 2` of them (divisors).
    """

    kind: str
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise InputError(
                f"RoPE scaling {self.kind!r} is not supported; supported are: "
                + ", ".join(ROPE_KINDS[:3])
            )
        numbers = (self.factor, self.attention_factor, self.beta_fast, self.beta_slow)
        if not all(math.isfinite(number) and number > 0 for number in (*numbers, *self.divisors)):
            raise InputError(f"RoPE scaling {self.kind} has a number that is not positive: {self}")
        if self.kind in ("llama3", "yarn") and self.original_context <= 0:
            raise InputError(f"RoPE scaling {self.kind} needs original_max_position_embeddings > 0")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError("RoPE scaling llama3 needs 0 < low_freq_factor < high_freq_factor")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and variations. Hashable: a static argument of compiled functions.

    Attributes:
      architecture: a key of `families.FAMILIES`, the model's family.
      vocab_size: rows of the embedding.
      num_layers, hidden_size, intermediate_size: depth, width, and width of the MLP.
      num_heads, num_kv_heads, head_dim: query heads, key/value heads that they share, and the size
        of each (not always `hidden_size / num_heads`).
      rope_theta: base wavelength of RoPE.
      rope_scaling: None for plain RoPE.
      norm_eps: epsilon of every RMSNorm.
      tie_embeddings: logits reuse the embedding instead of a matrix of their own.
      qkv_bias: query, key and value projections add a bias.
      qk_norm: each query and key head is normalised before RoPE.
      max_context: most tokens that a sequence may hold. Where the model slides a window over its
        attention, this is the window: within it sliding and full attention are the same.
      stop_token_ids: tokens that end a text.
      bos_token_id: the token that begins a text, if the file names one.
      sliding_window: the window's tokens, where the model slides one; None where it does not, or
        where an older converted folder does not say.
      rope_layers: for each layer whether RoPE turns its queries and keys; None where it does in
        all layers.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    stop_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    sliding_window: int | None = None
    rope_layers: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.architecture not in FAMILIES:
            raise InputError(unknown_architecture(self.architecture))
        for name in _SIZES:
            if getattr(self, name) <= 0:
                raise InputError(f"the model's {name} is {getattr(self, name)}; expected 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"the model's {self.num_heads} query heads cannot share its "
                f"{self.num_kv_heads} kv heads"
            )
        if self.head_dim % 2:
            raise InputError(f"the model's head_dim is {self.head_dim}; RoPE needs an even one")
        if not self.rope_theta > 1 or not self.norm_eps >= 0:
            raise InputError(
                f"rope_theta {self.rope_theta} must exceed 1, norm_eps {self.norm_eps} be 0 or more"
            )
        if self.rope_layers is not None and len(self.rope_layers) != self.num_layers:
            raise InputError(
                f"the model says of {len(self.rope_layers)} layers whether they have RoPE; "
                f"expected its {self.num_layers}"
            )
        divisors = self.rope_scaling.divisors if self.rope_scaling else ()
        if divisors and len(divisors) != self.head_dim // 2:
            raise InputError(
                f"the model has {len(divisors)} RoPE divisors; head_dim {self.head_dim} needs "
                f"{self.head_dim // 2}"
            )

    def to_json(self) -> dict[str, object]:
        """Plain values that `from_json` turns back into an equal config."""
        values = dataclasses.asdict(self)
        if self.rope_layers is None:  # as older folders have it: the same model, the same text
            del values["rope_layers"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "ModelConfig":
        """Return the config that `to_json` described.

        Raise InputError where a field does not fit.
        """
        try:
            stored: dict[str, Any] = dict(values)
            scaling = stored.get("rope_scaling")
            if scaling is not None:
                scaling = RopeScaling(**{**scaling, "divisors": tuple(scaling["divisors"])})
            lists = {"stop_token_ids": tuple(stored["stop_token_ids"])}
            if stored.get("rope_layers") is not None:
                lists["rope_layers"] = tuple(stored["rope_layers"])
            return cls(**{**stored, "rope_scaling": scaling, **lists})
        except InputError:
            raise
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"the stored model config does not fit this version: {error}"
            ) from None


_SIZES = (
    "vocab_size",
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_context",
)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature as a factor of queries and keys: 1 + 0.1 `mscale` ln(`factor`)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def scaled_context(context: int, scaling: RopeScaling | None, where: str) -> int:
    """Return the tokens of context that YaRN makes of `context`.

    Raise InputError where that is absurd.
    """
    if scaling is None or scaling.kind != "yarn":
        return context
    return max(context, times_longer(scaling.original_context, scaling.factor, where))


def times_longer(context: int, factor: float, where: str) -> int:
    """`factor` times `context` tokens; InputError that begins with `where` for too many."""
    scaled = factor * context
    if not scaled < INT32_LIMIT:
        raise InputError(
            f"{where}: RoPE scaling's factor {factor} makes a context of {scaled:g} "
            f"tokens; expected fewer than {INT32_LIMIT}"
        )
    return int(scaled)
