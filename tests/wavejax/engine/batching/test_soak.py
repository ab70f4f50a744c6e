"""Hundreds of requests with cancellations and bad ones: nothing is lost, memory is flat."""

import contextlib
import gc
import itertools
import os
import threading
import time
import tracemalloc

import jax
import numpy as np
import pytest

from tests.support.batch_requests import ROOM, SAMPLERS, Alone, make_engine, make_request
from wavejax import InputError
from wavejax.engine.batching import QueueFull, Request

# It runs longer than it compiles.
pytestmark = [pytest.mark.optimised, pytest.mark.slow(120)]

# 41 rounds are some 2,000 requests.
ROUNDS = int(os.environ.get("WAVEJAX_SOAK_ROUNDS", "6"))
REQUESTS, SUBMITTERS = 50, 3
LENGTHS = (1, 5, 60, 127)


class Failed(Exception):
    """What a constraint raises."""


class Failing:
    """A constraint that fails after a few tokens."""

    def __init__(self):
        self.left = 3

    def allowed(self):
        if not self.left:
            raise Failed
        return np.ones(50, bool)

    def accept(self, token):
        self.left -= 1


def bad_request(rng):
    """One that `submit` refuses."""
    wrong = ({"prompt": []}, {"prompt": [99]}, {"max_new_tokens": 0}, {"prompt": [1] * 500})
    return Request(**({"prompt": [1], "max_new_tokens": 4} | wrong[int(rng.integers(4))]))


def submitter(engine, seed, found, errors):
    """Sends requests from a thread: some bad, some cancelled, some dropped, some read."""
    rng = np.random.default_rng(seed)
    kept = []
    for _ in range(REQUESTS // SUBMITTERS):
        kind = rng.random()
        try:
            if kind < 0.1:
                engine.submit(bad_request(rng))
                errors.append("taken")
                continue
            request = make_request(rng, LENGTHS, SAMPLERS)
            if kind < 0.15:
                request = Request([1, 2, 3], 9, stop_tokens=(), constraint=Failing())
            handle = engine.submit(request)
        except (InputError, QueueFull):
            found["refused"] += 1
            continue
        found["taken"] += 1
        if kind > 0.85:
            continue  # dropped: nobody holds the handle
        if kind > 0.7:
            threading.Timer(float(rng.random()) / 20, handle.cancel).start()
        kept.append(handle)
        if rng.random() < 0.3:
            list(kept.pop(int(rng.integers(len(kept)))).events())
    for handle in kept:
        with contextlib.suppress(Failed):
            found["answers"].append((handle.request, handle.result(300)))


def test_nothing_is_lost_and_memory_is_flat():
    engine = make_engine(queue_limit=40, max_stall_ms=20.0)
    alone, looks, taken, refused = Alone(), [], 0, 0
    tracemalloc.start()
    with engine:
        for number in range(ROUNDS):
            found, errors = {"taken": 0, "refused": 0, "answers": []}, []
            threads = [
                threading.Thread(target=submitter, args=(engine, (number, one), found, errors))
                for one in range(SUBMITTERS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors
            while engine.stats().unfinished:
                time.sleep(0.01)
            taken, refused = taken + found["taken"], refused + found["refused"]
            stats = engine.stats()
            assert (stats.submitted, stats.refused) == (taken, refused)
            assert sum(stats.finished.values()) == taken
            for request, answer in found["answers"][:5]:
                tokens, reason = alone(request)
                if answer.finish_reason == "interrupted":
                    assert answer.token_ids == tokens[: len(answer.token_ids)]
                else:
                    assert (answer.token_ids, answer.finish_reason) == (tokens, reason)
            batch = engine._scheduler.batches[0]
            assert batch.seats == [None] * ROOM.slots
            assert not batch.kept
            del found, threads
            gc.collect()
            arrays = sum(array.nbytes for array in jax.live_arrays())
            looks.append((arrays, tracemalloc.get_traced_memory()[0]))
    tracemalloc.stop()
    assert taken + refused == ROUNDS * (REQUESTS // SUBMITTERS) * SUBMITTERS
    assert {"stop", "length", "interrupted", "error"} == engine.stats().finished.keys()
    # From the second round on. Counts of penalties come and go.
    arrays, memory = zip(*looks[1:], strict=True)
    assert max(arrays) - min(arrays) <= ROOM.slots * 50 * 5 + 1024
    # A round may trace a program that none before it needed: half a megabyte, once. What is kept
    # of each request would be kept in every round: of 50 requests, 600 bytes each.
    assert min(later - earlier for earlier, later in itertools.pairwise(memory)) < 30_000
