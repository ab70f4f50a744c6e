"""A server of a tiny model on a free port of this machine, in a thread; one a test module."""

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `wavejax[serve]` is not installed")

import httpx
import openai

import wavejax
from models.text.tokenizer import Tokenizer
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import CONTEXT, TEMPLATE, TINY, write_tokenizer
from wavejax import LanguageModel, WaveConfig
from wavejax.batching import batch_engine
from wavejax.documents.shelf import Shelf
from wavejax.engine.batching import BatchEngine
from wavejax.server.app import create_app
from wavejax.server.running import QuietServer, listening_socket, server_config
from wavejax.server.service import Limits, Service

NAME = "tiny"
WAVE = WaveConfig(
    local_tokens=8,
    growth_tokens=16,
    segment_tokens=128,
    cluster_size=4,
    max_cluster_size=8,
    min_candidate_tokens=16,
    min_retrieved_tokens=8,
)
HTTP = httpx.Client(timeout=120)  # httpx's own five seconds are few where programs compile


@dataclasses.dataclass
class Running:
    """A server that runs.

    Attributes:
        url: where, without a slash at the end.
        service: behind it.
        client: of OpenAI's package, for it; it does not try again.
        model: what answers.
    """

    url: str
    service: Service
    client: openai.OpenAI
    model: LanguageModel


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny random model that knows chat; a byte is a token."""
    folder = tmp_path_factory.mktemp("served") / NAME
    write_folder(folder, TINY, make_tensors(TINY))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return wavejax.load(folder, attention="full")


def make_engine(model: LanguageModel, **options: Any) -> BatchEngine:
    """An engine for two sequences side by side, each of the model's whole context."""
    return batch_engine(model, slots=2, max_new_tokens=400, **options)


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: LanguageModel) -> Iterator[BatchEngine]:
    """An engine that has compiled its programs once for all tests of a worker."""
    with make_engine(tiny_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def start(tiny_model: LanguageModel, tiny_engine: BatchEngine) -> Iterator[Callable[..., Running]]:
    """Starts servers, which end with the module."""
    ends: list[Callable[[], None]] = []

    def run(
        *,
        key: str | None = None,
        limits: Limits | None = None,
        engine: Any = None,
        shelf: Shelf | None = None,
        tokenizer: Tokenizer | None = None,
        tolerance: float = 0.0,
    ) -> Running:
        service = Service(
            name=NAME,
            tokenizer=tokenizer or tiny_model.tokenizer,
            engine=engine or tiny_engine,
            context=CONTEXT,
            vocab=tiny_model.config.vocab_size,
            stop_tokens=tiny_model.stop_tokens,
            limits=limits or Limits(new_tokens=64),
            shelf=shelf,
            tolerance=tolerance,
        )
        socket = listening_socket("127.0.0.1", 0)
        server = QuietServer(server_config(create_app(service, key), drain_seconds=5))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([socket])))
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        socket.listen()  # so that a client can connect at once
        thread.start()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0)

        def end() -> None:
            client.close()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

        ends.append(end)
        return Running(url, service, client, tiny_model)

    yield run
    for end in ends:
        end()


@pytest.fixture(scope="module")
def server(start: Callable[..., Running]) -> Running:
    """A server without a key."""
    return start()


def wait_for(true: Callable[[], bool]) -> None:
    """Waits until it is true, 20 seconds at most.

    A client has its answer a moment before the server has counted and logged it.
    """
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def access_lines() -> Iterator[list[str]]:
    """Lines of the access log, as they come."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, kept = logging.getLogger("wavejax.server.access"), Kept()
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(kept)
    logger.setLevel(level)
