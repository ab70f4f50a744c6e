"""What a request needs of a slot, and whether there can be such a slot."""

from collections.abc import Sequence

from models.errors import InputError
from wavejax.attention.dense import DenseAttention
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.wave import WaveAttention
from wavejax.engine.batching.request import Request
from wavejax.engine.batching.rooms import Room, check_fits


def room_of(request: Request) -> tuple[int, int]:
    """Count the tokens that a slot must have room for: a prompt's, and an answer's."""
    if request.kept is None:
        return len(request.prompt), request.max_new_tokens
    prompt_tokens, more = request.kept.room_of(request.prompt)
    return prompt_tokens, more + request.max_new_tokens


def reused_by(request: Request) -> int:
    """Count the prompt's tokens that need not be read."""
    return 0 if request.kept is None else request.kept.reused(request.prompt)


def parks(attention: AnyAttention) -> bool:
    """Whether slots of an attention can be parked: of those that are known to allow it.

    A class of one's own may read prompts in its own way, also one made of these.
    """
    return type(attention) in (WaveAttention, DenseAttention)


def check_room(
    request: Request, attention: AnyAttention, rooms: Sequence[Room], memory: int | None
) -> None:
    """Whether a request fits any room that there can be.

    Args:
        request: checked.
        attention: of all rooms.
        rooms, memory: as of `check_fits`.

    Raises:
        InputError: none holds it, or the attention takes nothing that was kept.
    """
    prompt_tokens, new_tokens = room_of(request)
    if request.kept is None:
        check_fits(rooms, memory, prompt_tokens, new_tokens)
        return
    if not parks(attention):
        raise InputError(
            "what was kept is for WaveAttention and DenseAttention, and this is a "
            f"{type(attention).__name__}: leave `kept` out"
        )
    try:
        check_fits(rooms, memory, prompt_tokens, new_tokens)
    except InputError as error:
        more, asked = new_tokens - request.max_new_tokens, request.max_new_tokens
        raise InputError(
            f"after {prompt_tokens} kept tokens, {more} more and {asked} new ones go where answers "
            f"go, and no room has that: {error}"
        ) from None
