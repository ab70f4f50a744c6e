"""`--explain`, and the environment variable that chooses an implementation."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pallas_kernels as ops
from pallas_kernels import triton_route
from pallas_kernels.dispatch import VARIABLE
from tests.wavejax.cli.conftest import Result
from wavejax.cli.explaining import asked_for_kernels

Generate = Callable[..., Result]


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    ops.forget()
    yield
    ops.forget()


def test_it_says_what_each_op_took_and_why(generate: Generate, tiny: Path) -> None:
    # A batch that no other test has: what comes from `jit`'s cache is not traced again.
    common = ("--attention", "full", "--model", tiny, *7 * ("--prompt", "x"))
    plain = generate(*common, "--max-new-tokens", 2)
    assert "attend_dense" not in plain.err
    told = generate(*common, "--max-new-tokens", 2, "--explain")
    assert told.status == 0
    title, row, facts = told.err.splitlines()
    assert title.split() == ["op", "implementation", "platform", "reason"]
    assert row.split(maxsplit=3) == ["attend_dense", "xla", "cpu", "there are no kernels for cpu"]
    assert facts.startswith("first token after")
    assert told.out == plain.out
    printed = json.loads(generate(*common, "--max-new-tokens", 2, "--explain", "--json").out)
    [choice] = printed["ops"]
    assert (choice["op"], choice["implementation"]) == ("attend_dense", "xla")


def test_a_plan_runs_nothing_to_explain(generate: Generate, tiny: Path) -> None:
    result = generate("--model", tiny, "--prompt", "x", "--plan", "--explain")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: --explain is for a run")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cuda", "error: WAVEJAX_IMPLEMENTATION: no implementation 'cuda'; give one of auto, xla"),
        (
            "triton",
            "error: WAVEJAX_IMPLEMENTATION is triton, and there are no such kernels for cpu",
        ),
        ("tpu", "error: WAVEJAX_IMPLEMENTATION is tpu, and there are no such kernels for cpu"),
    ],
)
def test_a_variable_that_cannot_hold_is_one_line(
    generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    result = generate("--model", tiny, "--prompt", "x", "--max-new-tokens", 2)
    assert (result.status, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mosaic", "error: WAVEJAX_TRITON: no route 'mosaic'; give jax, own or stock"),
        ("stock", "error: WAVEJAX_TRITON is stock, and that way wants the package triton: pip"),
    ],
)
def test_a_route_that_cannot_be_taken_is_one_line(
    generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv(triton_route.VARIABLE, value)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *of: None if name == "triton" else found(name, *of),
    )
    result = generate("--model", tiny, "--prompt", "x", "--max-new-tokens", 2)
    assert (result.status, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith(message)


def test_what_kernels_do_not_support_is_one_line_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = NotImplementedError("an_op: head_dim is 32; the kernel knows 64")
    assert asked_for_kernels(error) is None
    monkeypatch.setenv(VARIABLE, "xla")
    assert asked_for_kernels(error) is None
    for asked in ("triton", "tpu", "mosaic_gpu"):
        monkeypatch.setenv(VARIABLE, asked)
        line = asked_for_kernels(error)
        assert line is not None
        assert line.startswith(f"{error}; WAVEJAX_IMPLEMENTATION={asked} allows nothing else")
