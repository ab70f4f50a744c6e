"""The room that a kept sequence needs in a state, and whether there is that much."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from wavejax.config import WaveConfig
from wavejax.documents import arrays
from wavejax.documents.arrays import Part
from wavejax.documents.files import Folder


def grown_tokens(folder: Folder) -> int:
    """Count the tokens in a kept index that did not come with its prompt."""
    if "index/prompt_tokens" not in folder.arrays:
        return 0
    prompt = int(folder.arrays["index/prompt_tokens"].read())
    return int(folder.facts["sizes"]["tokens"]) - prompt


def shortest_prompt(folder: Folder, begun: Sequence[int]) -> int:
    """Count the tokens of the shortest prompt that a state for a document must be made for.

    The clusters that are kept are as large as those of the tokens that were indexed at once.

    Args:
        folder: the document's.
        begun: of each sequence, the tokens that go where prompts go.
    """
    if "index/prompt_tokens" not in folder.arrays:
        return min(begun)
    indexed = int(folder.arrays["index/prompt_tokens"].read())
    settings = folder.facts["fingerprints"]["settings"]
    beside = settings["sink_tokens"] + settings["local_tokens"]
    return min(*begun, indexed + beside) if indexed else 1


def check_arrays(folder: Folder, attention_state: Any) -> None:
    """Raise InputError where a state has an array that a document lacks."""
    for part in arrays.parts_of(attention_state):
        name = f"{part.name}/0" if part.by_layer else part.name
        if name not in folder.arrays:
            raise InputError(
                f"{folder.path} has no {name}: it was kept with other settings; read the document "
                "again"
            )


def check_room(
    folder: Folder, parts: dict[str, Part], kept: dict[str, np.ndarray], rows: int | None
) -> None:
    """Raise InputError where a part has no room for what is put there; `rows` None for all."""
    shapes = {name: array.shape for name, array in kept.items()}
    for name, part in parts.items():
        shape = shapes.get(name)
        if part.by_layer:
            kv_heads, tokens, *rest = folder.arrays[f"{name}/0"].shape
            shape = (kv_heads, tokens if rows is None else rows, *rest)
        if not arrays.fits(part, shape or (), part.by_layer):
            raise no_room()


def room_left(state: Any, config: WaveConfig | None, kept: dict[str, np.ndarray]) -> int:
    """Count the tokens that a slot has room for after a kept sequence, as `remaining` will."""
    if config is None:
        return int(state.keys.shape[3]) - int(kept["tokens"])
    grown = int(kept["index/tokens"]) - int(kept["index/prompt_tokens"])
    growths = int(state.index.growths) - grown // config.growth_tokens
    free = config.window_tokens - int(kept["steady/window_tokens"])
    return free + config.growth_tokens * growths


def no_room(more: str = "") -> InputError:
    """Say that a state has no room for a document."""
    return InputError(
        f"the state has no room for the document{more}: make it with the document's `start`, or "
        "`Generator.allocate` with more tokens"
    )
