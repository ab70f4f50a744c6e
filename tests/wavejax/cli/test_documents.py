"""`--save-document` and `--document`: the answers of the whole prompt, read once."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import wavejax
from tests.wavejax.cli.conftest import SMALL_ZONES, Result
from wavejax import InputError

Generate = Callable[..., Result]
TEXT = "The quick brown fox jumps over the lazy dog; " * 4
FULL = ("--attention", "full", "--max-new-tokens", 6, "--model")


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document that the library kept."""
    folder = tmp_path_factory.mktemp("kept")
    tokens = wavejax.read_document(wavejax.load(tiny, attention="full"), TEXT, folder)
    assert tokens == len(TEXT) + 4  # a byte is a token; two marks, and the empty line
    return folder


def test_a_question_costs_its_own_tokens(
    generate: Generate, tiny: Path, kept: Path, tmp_path: Path
) -> None:
    questions = ("Who is quick?", "And who is lazy, then?")
    asked = [part for question in questions for part in ("--prompt", question)]
    result = generate(*FULL, tiny, "--document", kept, "--json", *asked)
    assert result.status == 0, result.err
    found = json.loads(result.out)
    whole = [part for q in questions for part in ("--prompt", f"{TEXT}\n\n{q}")]
    expected = json.loads(generate(*FULL, tiny, "--json", *whole).out)
    assert found["answers"] == expected["answers"]
    assert found["reused_tokens"] == [len(TEXT) + 4] * 2
    # So does what the command itself keeps.
    folder = tmp_path / "mine"
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    done = generate(*FULL, tiny, "--save-document", folder, "--prompt-file", file)
    assert re.fullmatch(rf"kept {len(TEXT) + 4} tokens in {folder}: [\d.]+ kB\n", done.out)
    one = generate(*FULL, tiny, "--document", folder, *asked[:2])
    assert one.out == expected["answers"][0]["text"] + "\n"
    tokens = len(TEXT) + 4 + len(questions[0]) + 1
    assert f"document: {len(TEXT) + 4} of {tokens} tokens of the prompt were reused" in one.err


def test_a_text_that_is_continued(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    text = "Once upon a time"
    saved = generate(*FULL, tiny, "--raw", "--save-document", folder, "--prompt", text, "--json")
    assert json.loads(saved.out)["tokens"] == len(text) + 1
    found = generate(*FULL, tiny, "--document", folder, "--prompt", " there was").out
    assert found == generate(*FULL, tiny, "--raw", "--prompt", "Once upon a time there was").out


def test_python_asks_what_was_kept(tiny: Path, kept: Path) -> None:
    model = wavejax.load(tiny, attention="full")
    stream = wavejax.ask_document(model, kept, "Who is quick?", 6)
    text = "".join(piece.text for piece in stream)
    whole = model.generate(f"{TEXT}\n\nWho is quick?", 6)
    result = stream.result()
    assert (text, result.token_ids) == (whole.text, whole.token_ids)
    assert result.prompt_tokens == whole.prompt_tokens
    with pytest.raises(InputError, match="the question is empty"):
        wavejax.ask_document(model, kept, " ")
    with pytest.raises(InputError, match="the document is empty"):
        wavejax.read_document(model, " ", kept)


@pytest.mark.slow(40)
def test_wave_attention_in_the_command(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    """Exact where all tokens are retrieved; other settings of the index are refused."""
    folder = tmp_path / "kept"
    zones = [*SMALL_ZONES[:-2], "--min-retrieved-tokens", "500", "--max-new-tokens", "6"]
    done = generate("--model", tiny, *zones, "--save-document", folder, "--prompt", TEXT)
    assert done.status == 0, done.err
    ask = ("--document", folder, "--prompt", "Who is quick?")
    expected = generate(*FULL, tiny, "--prompt", f"{TEXT}\n\nWho is quick?").out
    for store in ("device", "host"):
        found = generate("--model", tiny, *zones, "--store", store, *ask)
        assert (found.status, found.out) == (0, expected), found.err
    other = generate("--model", tiny, *zones, "--cluster-size", "5", *ask)
    assert other.status == 2
    assert "kept with other settings: cluster_size is 4 there and 5 here" in other.err
    other = generate(*FULL, tiny, *ask)
    assert "another attention (WaveAttention there, DenseAttention here)" in other.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--document", "d", "--save-document", "e", "--prompt", "x"), "not both"),
        (("--document", "d", "--messages", "m"), "--messages is no text: give --prompt"),
        (("--document", "d", "--prompt", "x", "--system", "y"), "--system was decided when"),
        (("--document", "d", "--prompt", "x", "--raw"), "--chat or --raw was decided when"),
        (("--document", "d", "--prompt", "x"), "d is no kept document: it has no document.json"),
        (("--save-document", "d", "--prompt", "x", "--prompt", "y"), "keeps one text, and 2 are"),
        (("--save-document", "d"), "no prompt: give --prompt TEXT"),
    ],
)
def test_flags_that_make_no_sense(
    flags: tuple[str, ...], said: str, generate: Generate, tiny: Path
) -> None:
    result = generate(*FULL, tiny, *flags)
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert said in result.err
