"""The sizes of a KV cache: what an attention must know of a model."""

import dataclasses
from typing import Literal, get_args

from models.config import ModelConfig
from models.errors import InputError

LayerKind = Literal["full"]
# The first axes of most arrays of a state: see `CacheShape.stack`, and `logical_axes`.
STACK = ("layers", "sequences", "kv_heads")
ROW = ("key_value", "head_dim")


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """The layers and heads of a KV cache.

    >>> CacheShape(layers=2, kv_heads=8, head_dim=128).stack(batch=3)
    (2, 3, 8)

    Attributes:
        layers: of the model, one or more.
        kv_heads: heads of keys and values in each layer, one or more.
        head_dim: numbers in a key, and in a value.
        kinds: of each layer, how it attends; left out, "full" in all: to every token before it.

    Raises:
        InputError: a size is below 1, or `kinds` are not one of the known kinds for each layer.
    """

    layers: int
    kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        kinds = self.kinds or ("full",) * self.layers
        if len(kinds) != self.layers:
            raise InputError(f"kinds are {len(kinds)}; give one for each of {self.layers} layers")
        known = get_args(LayerKind)
        if wrong := set(kinds) - set(known):
            raise InputError(f"a layer's kind is {min(wrong)!r}; it must be one of {known}")
        object.__setattr__(self, "kinds", kinds)

    @classmethod
    def of(cls, model_config: ModelConfig) -> "CacheShape":
        """Describe the shape of a model's KV cache."""
        return cls(model_config.num_layers, model_config.num_kv_heads, model_config.head_dim)

    def stack(self, batch: int) -> tuple[int, int, int]:
        """Return the first axes of every array of the cache: layers, sequences, kv heads.

        Only layers that attend to all tokens have one.
        """
        return self.kinds.count("full"), batch, self.kv_heads
