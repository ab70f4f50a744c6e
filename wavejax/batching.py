"""A batch engine of a loaded model: requests side by side, each when it comes."""

from collections.abc import Sequence
from typing import Unpack

from models.quantised import formats_of
from wavejax.engine.batching import BatchEngine, Room
from wavejax.engine.batching.options import EngineOptions
from wavejax.engine.checks import MOST_INT32, whole_number
from wavejax.engine.generator import Generator
from wavejax.language_model import LanguageModel
from wavejax.planning.free_memory import free_besides
from wavejax.planning.rooms import plan_rooms

SMALLEST_ROOM = 8192  # Tokens of prompts in the first room; the next ones have four times as many.


def batch_engine(
    model: LanguageModel,
    *,
    slots: int = 8,
    max_context: int | None = None,
    max_new_tokens: int = 2048,
    rooms: Sequence[Room] | None = None,
    **options: Unpack[EngineOptions],
) -> BatchEngine:
    """Make an engine that answers requests to a model side by side.

    It plans where keys and values go, and how many slots fit the memory that is free.

    Args:
        model: of `wavejax.load`.
        slots: the most requests of one room that run at a time; fewer where not all fit.
        max_context: the most tokens of a request, prompt and answer; None: as the model has it.
        max_new_tokens: the most tokens of an answer.
        rooms: sizes of slots; None: prompts of 8,192 tokens, and four times as many, and so on, as
            far as `max_context` goes.
        options: as of `BatchEngine`.

    Returns:
        the engine. It works from `start` on, or in a `with` block.

    Raises:
        InputError: an argument is none that can be used, or not one slot fits.

    Example:
        >>> import wavejax
        >>> model = wavejax.load(attention="full")
        >>> with wavejax.batch_engine(model, slots=2, max_context=512, max_new_tokens=64) as engine:
        ...     prompts = [model.encode(text)[0].ids for text in ("Hello", "Name a colour.")]
        ...     handles = [engine.submit(wavejax.Request(ids, 4)) for ids in prompts]
        ...     answers = [handle.result() for handle in handles]
        >>> [len(answer.token_ids) <= 4 for answer in answers]
        [True, True]
    """
    whole_number("`slots`", slots, 1, MOST_INT32)
    most = whole_number("`max_new_tokens`", max_new_tokens, 1, MOST_INT32)
    own = model.max_context or model.config.max_context
    context = own if max_context is None else whole_number("`max_context`", max_context, 2)
    most = min(most, context - 1)
    if rooms is None:
        sizes = [min(SMALLEST_ROOM, context)]
        while sizes[-1] < context:
            sizes.append(min(4 * sizes[-1], context))
        rooms = [Room(size, most, slots) for size in sizes]
    free = free_besides(model.params)
    given = model.config, model.attention, rooms, model.dtype
    formats = formats_of(model.params)
    plan = plan_rooms(*given, store=model.store, fetch=model.fetch, free=free, formats=formats)
    generator = Generator(model.config, plan.attention, stop_tokens=model.stop_tokens)
    options.setdefault("memory", plan.memory)
    options.setdefault("tokenizer", model.tokenizer)
    return BatchEngine(generator, model.params, plan.rooms, max_context=context, **options)
