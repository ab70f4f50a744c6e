"""The field `tolerance`, and what `usage` tells of it, by OpenAI's own client."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.wavejax.server.conftest import HTTP, NAME, WAVE, Running, make_engine
from wavejax import LanguageModel

SETTINGS = dataclasses.replace(WAVE, tolerance=0.5, tolerance_draws=16, tolerance_cap=2)
TEXT = "The town lies in a wide valley. The bridge over the river Elm was opened in 1907. " * 2
GIVEN: Any = {"model": NAME, "prompt": TEXT, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def bounded(start: Callable[..., Running], tiny_model: LanguageModel) -> Iterator[Running]:
    """A server whose attention has a tolerance."""
    model = dataclasses.replace(tiny_model, attention=SETTINGS)
    with make_engine(model, steps=1) as engine:  # counts no step past an answer
        yield start(engine=engine, tolerance=SETTINGS.tolerance)


def usage_of(server: Running, **fields: Any) -> dict[str, Any]:
    extra = {"ignore_eos": True} | fields
    found = server.client.completions.create(**GIVEN, extra_body=extra)
    assert found.usage is not None
    return found.usage.model_dump()


@pytest.mark.slow
def test_usage_tells_how_it_was_met(bounded: Running) -> None:
    by_default, wide = usage_of(bounded)["tolerance"], usage_of(bounded, tolerance=1)["tolerance"]
    for met in (by_default, wide):
        assert 0 <= met["more"] <= met["within"] <= 1
        assert met["computed"] == 0
    assert by_default["within"] <= wide["within"]
    assert "tolerance" not in usage_of(bounded, tolerance=0)
    text = bounded.client.responses.create(
        model=NAME, input="Hi there, valley. " * 6, max_output_tokens=4, extra_body={"tolerance": 1}
    )
    assert text.usage is not None
    assert 0 <= text.usage.model_dump()["tolerance"]["within"] <= 1
    assert 0 < text.usage.model_dump()["attention"]["retrieved"] < 1


@pytest.mark.parametrize("wrong", [-0.1, 1.1, "0.1", True])
def test_what_is_none_is_refused(bounded: Running, wrong: object) -> None:
    found = HTTP.post(f"{bounded.url}/v1/completions", json=GIVEN | {"tolerance": wrong})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "tolerance"


def test_a_server_without_one_refuses_it(server: Running) -> None:
    assert not usage_of(server).keys() & {"tolerance", "attention"}
    with pytest.raises(openai.BadRequestError, match="start it with `--tolerance`") as refused:
        usage_of(server, tolerance=0.1)
    assert refused.value.param == "tolerance"
    assert refused.value.code == "unsupported_parameter"
