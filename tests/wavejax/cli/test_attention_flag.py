"""Which attention answers: by default, and where `--attention` or a setting of one asks for it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import wavejax
from tests.wavejax.cli.conftest import Result
from tests.wavejax.cli.test_generate import FULL, answers
from wavejax import DenseAttention

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


@pytest.mark.parametrize("attention", ["full", "auto"])
def test_full_attention_may_have_rows_in_int8(
    generate: Generate, tiny: Path, attention: str
) -> None:
    run = ("--model", tiny, "--prompt", "abc", "--max-new-tokens", 4, "--attention", attention)
    found = generate(*run, "--row-dtype", "int8", "--json")
    assert "; all tokens are read, in int8; " in found.err
    model = wavejax.load(tiny, attention=DenseAttention(row_dtype="int8"))
    assert answers(found)[0]["token_ids"] == [*model.generate("abc", 4).token_ids]
    facts, plain = (json.loads(each.out)["facts"] for each in (found, generate(*run, "--json")))
    assert (facts["rounded"], plain["rounded"]) == (True, False)
    assert facts["device_bytes"] < 0.4 * plain["device_bytes"]
