"""Requests to a batch engine on the tiny model, and what `Generator` gives each alone."""

import dataclasses

import numpy as np

from tests.support.tiny_generator import MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, Sampler
from wavejax.engine.batching import BatchEngine, Request, Room
from wavejax.engine.generator import NO_TOKEN

ROOM = Room(prompt_tokens=128, new_tokens=64, slots=3)
SAMPLERS = [
    Sampler(),
    Sampler(1.1),
    Sampler(0.8, top_k=5),
    Sampler(1.3, top_p=0.9, min_p=0.01),
    Sampler(repetition_penalty=1.5),
    Sampler(0.9, presence_penalty=1.0, frequency_penalty=-0.5),
]


def make_engine(attention=None, rooms=(ROOM,), **options):
    """An engine that works in the test's own thread, by `turn`."""
    generator = Generator(MODEL, attention or DenseAttention(), stop_tokens=(7,))
    return BatchEngine(generator, make_params(), rooms, **options)


def make_request(rng, lengths, samplers, most=24):
    """A request of random length, sampler, seed, stops and maximum."""
    prompt = make_prompts((int(rng.choice(lengths)),), seed=int(rng.integers(3)))[0]
    stops = (None, (), (int(rng.integers(50)), int(rng.integers(50))))
    return Request(
        prompt,
        max_new_tokens=int(rng.integers(1, most + 1)),
        sampler=samplers[int(rng.integers(len(samplers)))],
        seed=int(rng.integers(-9, 9)),
        sequence=int(rng.integers(4)),
        stop_tokens=stops[int(rng.integers(len(stops)))],
    )


class Alone:
    """What `Generator` gives a request by itself: its tokens up to its end."""

    def __init__(self, attention=None, stop_tokens=(7,), most=24, params=None):
        self._generator = Generator(MODEL, attention or DenseAttention())
        self._stop_tokens, self._most = stop_tokens, most
        self._params = make_params() if params is None else params

    def __call__(self, request):
        given = {"seed": request.seed, "sequences": [request.sequence]}
        prompt = [int(token) for token in request.prompt]
        state = self._generator.start(
            self._params, [prompt], self._most, samplers=[request.sampler], **given
        )
        generator = dataclasses.replace(self._generator, sampler=request.sampler)
        tokens = np.asarray(generator.decode_n(self._params, state, self._most)[1])[:, 0].tolist()
        stops = self._stop_tokens if request.stop_tokens is None else request.stop_tokens
        answer = []
        for token in tokens[: request.max_new_tokens]:
            if token == NO_TOKEN:
                return tuple(answer), "not finite"
            answer.append(token)
            if token in stops:
                return tuple(answer), "stop"
        return tuple(answer), "length"


def run(engine):
    """Does all the work there is."""
    while engine.turn():
        pass
