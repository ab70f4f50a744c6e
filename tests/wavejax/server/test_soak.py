"""Hundreds of requests by HTTP, bad and cancelled ones too: nothing is lost, and metrics add up."""

import asyncio
import collections
import gc
import itertools
import os
import tracemalloc
from collections.abc import Callable
from typing import Any

import httpx
import jax
import numpy as np
import pytest

from tests.wavejax.server.conftest import NAME, Running, wait_for
from tests.wavejax.server.test_metrics import read
from wavejax.engine.batching import BatchEngine
from wavejax.server.service import Limits

pytestmark = pytest.mark.slow(60)

# 34 rounds are some 2,000 requests.
ROUNDS = int(os.environ.get("WAVEJAX_SOAK_ROUNDS", "3"))
MORE_ROUNDS = 4  # where no round has shown yet that memory is flat
REQUESTS, AT_A_TIME = 60, 8
GONE = "499"
# A round may trace a program that none before it needed. What is kept of each request would be kept
# in every round: of 60 requests, 500 bytes each.
FLAT = 30_000

# What is wrong, and the status that it is refused with.
BAD: list[tuple[dict[str, Any] | bytes, int]] = [
    (b"{", 400),
    (b'"' + b"x" * 70_000 + b'"', 413),
    ({"model": "other"}, 404),
    ({"prompt": []}, 400),
    ({"prompt": "x" * 5000}, 400),
    ({"max_tokens": 0}, 400),
    ({"temperature": -1}, 400),
    ({"seed": 2**40}, 400),
    ({"document": "none"}, 404),
    ({"logit_bias": {"1": 3}}, 400),
]


def body_of(rng: np.random.Generator) -> dict[str, Any]:
    """A request that is answered."""
    body = {
        "model": NAME,
        "prompt": "The bridge. " * int(rng.integers(1, 12)),
        "max_tokens": int(rng.integers(1, 24)),
        "temperature": float(rng.choice([0.0, 0.7, 1.3])),
        "seed": int(rng.integers(9)),
    }
    more = ({}, {}, {"stop": ["e"]}, {"logprobs": 2}, {"presence_penalty": 0.5})
    body |= more[int(rng.integers(len(more)))]
    if body["temperature"] and rng.random() < 0.3:
        body["n"] = 2
    return body


async def send(client: httpx.AsyncClient, rng: np.random.Generator) -> str:
    """Sends one request; returns the status that the server has counted, 499 for one it left."""
    kind, body = rng.random(), body_of(rng)
    if kind < 0.2:
        wrong, status = BAD[int(rng.integers(len(BAD)))]
        content: dict[str, Any] = (
            {"content": wrong, "headers": {"content-type": "application/json"}}
            if isinstance(wrong, bytes)
            else {"json": body | wrong}
        )
        got = await client.post("/v1/completions", **content)
        assert got.status_code == status, (wrong, got.text)
        assert got.json()["error"]["message"]
        return str(status)
    if kind < 0.6:
        got = await client.post("/v1/completions", json=body)
        if got.status_code == 200:
            assert len(got.json()["choices"]) == body.get("n", 1)
            assert got.json()["usage"]["completion_tokens"] > 0
        else:
            assert got.status_code == 429, got.text
        return str(got.status_code)
    leaves = kind > 0.75
    if leaves:
        body = body | {"max_tokens": 200, "ignore_eos": True}
        body.pop("stop", None)
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as got:
        if got.status_code != 200:
            await got.aread()
            assert got.status_code == 429, got.text
            return "429"
        last = ""
        async for line in got.aiter_lines():
            last = line or last
            if leaves and line.startswith("data:"):
                return GONE
    assert last == "data: [DONE]"
    return "200"


def least_growth(looks: list[tuple[int, int]]) -> int:
    """The fewest bytes by which a round made Python's memory grow, the first one left out."""
    memory = [traced for _, traced in looks[1:]]
    return min(later - earlier for earlier, later in itertools.pairwise(memory))


async def send_all(url: str, seed: int, told: collections.Counter[str]) -> None:
    """Sends a round's requests, some at a time."""
    at_a_time = asyncio.Semaphore(AT_A_TIME)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(number: int) -> None:
            async with at_a_time:
                told[await send(client, np.random.default_rng((seed, number)))] += 1

        await asyncio.gather(*(one(number) for number in range(REQUESTS)))


def test_nothing_is_lost_and_metrics_add_up(
    start: Callable[..., Running], tiny_engine: BatchEngine
) -> None:
    server = start(limits=Limits(new_tokens=200, request_bytes=65_536))
    engine = server.service.engine
    wait_for(lambda: engine.stats().unfinished == 0)  # other tests' requests
    before, told, looks = read(server), collections.Counter[str](), []
    lost = "wavejax:http_responses_total "
    reads = 0
    tracemalloc.start()
    for number in range(ROUNDS + MORE_ROUNDS):
        if number >= ROUNDS and least_growth(looks) < FLAT:
            break
        asyncio.run(send_all(server.url, number, told))
        sent = REQUESTS * (number + 1)
        assert sum(told.values()) == sent

        def counted() -> dict[str, float]:
            nonlocal reads
            reads += 1  # each look at the metrics is counted by the next
            after = read(server)
            return {name: value - before.get(name, 0.0) for name, value in after.items()}

        def all_counted(sent: int = sent) -> bool:
            grown = counted()
            answers = sum(value for name, value in grown.items() if name.startswith(lost))
            return engine.stats().unfinished == 0 and answers - reads == sent

        wait_for(all_counted)
        grown = counted()
        statuses = {
            name.removeprefix(lost): value
            for name, value in grown.items()
            if name.startswith(lost) and value
        }
        statuses["200"] -= reads
        # A client may leave just as the last piece is sent.
        late = told[GONE] - statuses.get(GONE, 0.0)
        assert 0 <= late <= sent / 50
        assert statuses == dict(told) | {GONE: told[GONE] - late, "200": told["200"] + late}
        reasons = ("stop", "length", "abort", "error")
        ends = {one: grown[f"vllm:request_success_total {one}"] for one in reasons}
        assert sum(ends.values()) == grown["wavejax:requests_submitted_total"]
        assert ends["error"] == 0
        assert 0 < ends["abort"] <= 2 * told[GONE]
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            assert grown[name] == 0
        gc.collect()
        arrays = sum(array.nbytes for array in jax.live_arrays())
        looks.append((arrays, tracemalloc.get_traced_memory()[0]))
    tracemalloc.stop()
    assert {"200", "400", "404", "413", GONE} <= told.keys()
    for batch in tiny_engine._scheduler.batches:
        assert not batch.answers
        assert not batch.kept
    arrays = [held for held, _ in looks[1:]]
    assert max(arrays) - min(arrays) < 2**20
    assert least_growth(looks) < FLAT, looks
