"""`--plan`: what a run would take of memory, without reading weights."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.checkpoints.open import Checkpoint
from tests.wavejax.cli.conftest import Result
from wavejax.planning import free_memory as memory

Generate = Callable[..., Result]
FULL = ("--plan", "--context", "9", "--attention", "full")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_params(*_: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(Checkpoint, "load_params", load_params)


def planned(result: Result) -> dict:
    assert (result.status, result.err) == (0, "")
    return json.loads(result.out)


def test_of_a_context(generate: Generate, tiny: Path) -> None:
    result = generate("--model", tiny, "--plan", "--context", 5000, "--batch", 3)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"Memory for {tiny.name}: 3 prompts, 5,000 + 256 tokens, float32")
    assert result.out.endswith("it fits\n")
    printed = planned(generate("--model", tiny, "--plan", "--json", "--context", 5000))
    assert (printed["prompts"], printed["prompt_tokens"], printed["new_tokens"]) == (1, 5000, 256)
    assert (printed["store"], printed["fits"]) == ("device", True)


def test_of_prompts_and_every_choice(generate: Generate, tiny: Path) -> None:
    common = ("--model", tiny, "--plan", "--json", "--raw", "--prompt", "x" * 200, "--prompt", "y")
    printed = planned(generate(*common, "--store", "host", "--dtype", "bfloat16"))
    assert (printed["prompts"], printed["prompt_tokens"]) == (2, 201)
    assert (printed["store"], printed["dtype"]) == ("host", "bfloat16")
    full = planned(generate(*common, "--attention", "full"))
    assert full["need"]["index"] == 0
    fewer = planned(generate(*common, "--cache-fraction", 0))
    assert fewer["need"]["slots"] < printed["need"]["slots"]


def test_auto_says_which_attention_and_why(generate: Generate, tiny: Path) -> None:
    common = ("--model", tiny, "--plan", "--context")
    short = generate(*common, 100).out
    why = "by these settings wave attention would read all of 356 tokens too"
    assert f"\nattention: full; {why}\nstore; it keeps" in short
    long = planned(generate(*common, 70_000, "--json"))
    assert (long["attention"], long["store"]) == ("wave", "device")
    assert "faster from some 60,000 tokens a sequence" in long["attention_reason"]


def test_full_attention_has_rows_in_int8_too(generate: Generate, tiny: Path) -> None:
    common = ("--model", tiny, "--plan", "--context", 1000, "--row-dtype", "int8")
    for attention in ("full", "auto"):
        found = planned(generate(*common, "--attention", attention, "--json"))
        assert found["attention"] == "full"
        plain = planned(generate(*common[:-2], "--attention", attention, "--json"))["need"]
        # The levels, a byte a number: a quarter of float32, but for the sequence's length.
        assert 4 * found["need"]["rows"] == plain["rows"] - 4
        assert found["need"]["steady"] > plain["steady"] == 0
    table = generate(*common, "--attention", "full").out
    assert re.search(r"keys and values .*\n.* scales .*\n", table)


def test_staged_rows_are_not_pinned(generate: Generate, tiny: Path) -> None:
    common = ("--model", tiny, "--plan", "--context", 5000, "--store", "host")
    for fetch in ("auto", "in_place", "staged"):
        need = planned(generate(*common, "--fetch", fetch, "--json"))["need"]
        assert need["host"] == need["rows"] > 0
        assert need["pinned"] == (0 if fetch == "staged" else need["rows"])
    assert "fetch: staged" in generate(*common, "--fetch", "staged").out


def test_what_does_not_fit_is_planned_and_refused(
    generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**24))
    result = generate("--model", tiny, "--plan", "--context", 10**6)
    assert result.status == 2
    assert "it does not fit: " in result.out
    assert result.err.startswith("error: not enough memory: ")
    assert "0.02 GiB free; the longest prompt that fits has " in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--context", "100"], "--plan"),
        (["--plan", "--batch", "2", "--prompt", "x"], "--batch needs --context"),
        (["--plan", "--context", "100", "--prompt", "x"], "not both"),
        (["--plan", "--context", "0"], "--context"),
        (["--plan", "--context", str(2**31)], "1<=x<=2147483647"),
        (["--plan", "--context", "9" * 25], "1<=x<=2147483647"),
        (["--plan", "--context", "100", "--batch", str(10**30)], "1<=x<=65536"),
        (["--plan"], "no prompt"),
        (["--plan", "--context", "9", "--store", "device", "--fetch", "staged"], "--store host"),
        ([*FULL, "--store", "host"], "--store host is for wave attention"),
        ([*FULL, "--fetch", "staged"], "--fetch is for wave attention"),
        ([*FULL, "--fetch", "in_place", "--store", "device"], "--fetch is for wave attention"),
    ],
)
def test_flags_that_make_no_sense(
    generate: Generate, tiny: Path, arguments: list[str], said: str
) -> None:
    result = generate("--model", tiny, *arguments)
    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_full_attention_takes_what_it_does_anyway(generate: Generate, tiny: Path) -> None:
    for flags in ((), ("--store", "auto", "--fetch", "auto"), ("--store", "device")):
        assert planned(generate("--model", tiny, *FULL, *flags, "--json"))["store"] == "device"


@pytest.mark.parametrize("fetch, gib", [("auto", "9"), ("staged", "8")])
def test_the_limits_are_set_before_the_device_starts(tiny: Path, fetch: str, gib: str) -> None:
    """In a process of its own, where nothing has started the device yet."""
    code = (
        "import os, sys, jax\n"
        "from jax._src import xla_bridge\n"
        "from wavejax import generate\n"
        "backend = jax.default_backend\n"
        "def first_use():\n"
        "    jax.default_backend = backend\n"
        "    assert not xla_bridge.backends_are_initialized()\n"
        "    print({k: v for k, v in os.environ.items() if k.startswith('XLA_')})\n"
        "    return backend()\n"
        "jax.default_backend = first_use\n"
        "sys.exit(generate.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "--model", tiny, "--plan", "--context", "3000"]
    command += ["--store", "host", "--fetch", fetch]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    run = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    limits = {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": gib, "XLA_CLIENT_MEM_FRACTION": "0.9"}
    assert run.stdout.splitlines()[0] == str(limits)
