"""Which attention answers: by default, and where `--attention` or a setting of one asks for it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.wavejax.cli.conftest import Result
from tests.wavejax.cli.test_generate import FULL, answers

Generate = Callable[..., Result]


def test_auto_gives_full_attentions_text_and_says_so(generate: Generate, tiny: Path) -> None:
    run = ("--raw", "--prompt", "abc", "--max-new-tokens", 4)
    expected = answers(generate(*FULL, tiny, *run, "--json"))
    found = generate("--model", tiny, *run, "--json")  # which is the default
    assert answers(found) == expected
    assert answers(generate("--attention", "auto", "--model", tiny, *run, "--json")) == expected
    said = json.loads(found.out)
    why = "by these settings wave attention would read all of 8 tokens too"
    assert (said["attention"], said["attention_reason"]) == ("full", why)
    assert f"full attention ({why}); all tokens are exact" in found.err


@pytest.mark.parametrize(
    "flags", [("--attention", "wave"), ("--tolerance", 0.5), ("--store", "host")]
)
def test_a_setting_of_wave_attention_asks_for_it(
    generate: Generate, tiny: Path, flags: tuple[str, object]
) -> None:
    found = generate("--model", tiny, "--prompt", "abc", "--max-new-tokens", 2, *flags, "--json")
    assert json.loads(found.out)["attention"] == "wave"
