"""Requests one after another to an engine whose slots go on from what they hold."""

from tests.support.batch_requests import run
from tests.support.tiny_generator import make_prompts
from wavejax import Sampler
from wavejax.engine.batching import Request, Room

ROOM = Room(prompt_tokens=448, new_tokens=192, slots=2)
FIRST, NEXT, OTHER = make_prompts((280, 30, 300))
DRAWN = Sampler(0.8)


def ask(engine, prompt, most, sampler=DRAWN, **given):
    """An answer, while nothing else is asked."""
    handle = engine.submit(Request(prompt, most, sampler, 3, **({"stop_tokens": ()} | given)))
    run(engine)
    return handle.result(0)


def request_of(prompt, most):
    return Request(prompt, most, DRAWN, 3, stop_tokens=())
