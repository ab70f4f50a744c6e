"""The keywords of `LanguageModel.stream`, typed for those that hand them on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypedDict

from wavejax.engine.sampling import Sampler


class PromptOptions(TypedDict, total=False):
    """How a prompt becomes token ids; see `LanguageModel.stream`."""

    raw: bool | None
    system: str | None
    template_args: Mapping[str, object] | None
    control_tokens: bool


class StreamOptions(PromptOptions, total=False):
    """How prompts are answered; see `LanguageModel.stream`."""

    sampler: Sampler | Literal["model"] | None
    seed: int
    stop: str | Sequence[str]
    samples: int
    progress: Callable[[int, int], None] | None
