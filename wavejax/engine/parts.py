"""What a generator is made of, and the engine that it picks."""

import dataclasses

from models.config import ModelConfig
from models.errors import InputError
from wavejax.attention.protocol import AnyAttention, Attention
from wavejax.engine.checks import as_stop_tokens
from wavejax.engine.compiled import CompiledEngine
from wavejax.engine.interface import Engine
from wavejax.engine.sampling import Sampler
from wavejax.engine.staged import StagedEngine


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a `Generator`, which says what each is for."""

    model_config: ModelConfig
    attention: AnyAttention
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    stop_tokens: tuple[int, ...] = ()
    unroll: bool | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("model_config", ModelConfig),
            ("attention", Attention),
            ("sampler", Sampler),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                article = "an" if kind is Attention else "a"
                raise InputError(
                    f"`{name}` is of type {type(value).__name__}; give {article} {kind.__name__}"
                )
        try:
            hash(self.attention)
        except TypeError as error:
            raise InputError(
                f"`attention`, a {type(self.attention).__name__}, has no hash, by which its "
                "programs are kept: make it a frozen dataclass, of fields that have one"
            ) from error
        stops = as_stop_tokens(self.stop_tokens, self.model_config.vocab_size)
        object.__setattr__(self, "stop_tokens", stops)

    @property
    def engine(self) -> Engine:
        """What runs the model, by the attention; may start JAX's device."""
        kind: type[Engine] = StagedEngine if self.staged else CompiledEngine
        return kind(self.model_config, self.attention, self.stop_tokens, self.unroll)

    @property
    def staged(self) -> bool:
        """Whether rows are staged; see `wavejax.engine.staged`."""
        return self.attention.staged

    @property
    def unrolls(self) -> bool:
        """See `Engine.unrolls`."""
        return self.engine.unrolls
