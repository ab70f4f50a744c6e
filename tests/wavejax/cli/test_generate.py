"""What `python -m wavejax.generate` prints, with a tiny random model."""

import dataclasses
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.errors import InputError
from models.text.tokenizer import TextStream, Tokenizer, load_tokenizer
from models.unstacked import unstack_layers
from tests.wavejax.cli.conftest import SMALL_ZONES, Result
from wavejax import Generator, loading
from wavejax.cli import generate_command as module
from wavejax.cli.generate_command import command
from wavejax.config import WaveConfig
from wavejax.engine.sampling import Sampler
from wavejax.engine.staged import StagedEngine

Generate = Callable[..., Result]
LONG = "The quick brown fox jumps over the lazy dog; " * 6
# For what is not about wave attention: full attention compiles in less time.
FULL = ("--attention", "full", "--model")
FACTS = (
    r"first token after [\d.]+ s; [\d.]+ tokens/s; {exact}; "
    r"(cache hits: [\d.]+%; )?"
    r"KV cache: [\d.]+ [kM]?B on the device, [\d.]+ [kM]?B on the host\n"
)


def answers(result: Result) -> list[dict]:
    assert result.status == 0, result.err
    return json.loads(result.out)["answers"]


@pytest.mark.parametrize("settings", [WaveConfig, Sampler])
def test_every_setting_has_a_flag(settings: type) -> None:
    options = {option.name: option for option in command.params}
    for field in dataclasses.fields(settings):
        option = options[field.name]
        assert option.default == field.default
        assert option.help == field.metadata["help"]
        flag = "--" + field.name.replace("_", "-")
        assert option.opts == [flag]
        if isinstance(field.default, bool):
            assert option.secondary_opts == [f"--no-{flag[2:]}"]


@pytest.mark.parametrize(
    "kept",
    [
        ("tolerance", "reach", "pooled_covariance"),
        ("estimation_fraction", "token_codes", "pooled_covariance"),
        ("tolerance", "token_codes", "moment_rank", "bounds"),
    ],
    ids=",".join,
)
def test_flags_reach_attention_and_sampler(
    generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...]
) -> None:
    """Every number one above its default, shares halved, the ratio doubled, every flag turned.

    But for one of each two that do not go together.
    """
    seen = []

    def keep(model: object, attention: object, sampler: Sampler, stop: tuple[int, ...]) -> None:
        seen.extend([attention, sampler, stop])
        raise InputError("seen enough")

    monkeypatch.setattr(module, "Generator", keep)
    flags, expected = [], {}
    for field in dataclasses.fields(WaveConfig) + dataclasses.fields(Sampler):
        flag, value = field.name.replace("_", "-"), field.default
        if field.name in kept:
            expected[field.name] = value
        elif isinstance(value, bool):
            expected[field.name] = not value
            flags.append(f"--no-{flag}" if value else f"--{flag}")
        elif isinstance(value, str):
            expected[field.name] = "int8"  # of moments and rows: there is no other
            flags += [f"--{flag}", "int8"]
        else:
            # Of the fields at 1, only the ratio may be more.
            other = 2.0 if field.name == "admission_ratio" else (value or 1) / 2
            expected[field.name] = value + 1 if isinstance(value, int) else other
            flags += [f"--{flag}", str(expected[field.name])]
    result = generate("--model", tiny, "--prompt", "x", "--store", "device", *flags)
    assert result.err == "error: seen enough\n"
    attention, sampler, stop = seen
    assert attention.store == "device"
    assert stop == (1, 2)  # </s> by name, and config.json's
    for settings in (attention.config, sampler):
        for name, value in dataclasses.asdict(settings).items():
            assert value == expected[name], name


@pytest.mark.slow
def test_same_command_same_bytes_whether_alone_or_in_a_batch(
    generate: Generate, tiny: Path, tmp_path: Path
) -> None:
    """With prompts from the command line and from a file."""
    file = tmp_path / "prompt.txt"
    file.write_text("\ufeff" + LONG, encoding="utf-8")
    common = ("--model", tiny, "--max-new-tokens", 12, *SMALL_ZONES)
    # Of unequal lengths, but in one bucket: they share a compiled program where they run alone.
    prompts = [("--prompt", "Something else. " + LONG[:250]), ("--prompt-file", file)]
    both = (*common, *prompts[0], *prompts[1])

    alone = [generate(*common, *prompt).out for prompt in prompts]
    printed = [f"=== prompt {i} of 2 ===\n{text}\n" for i, text in enumerate(alone, 1)]
    assert generate(*both).out == "".join(printed)
    from_json = answers(generate(*both, "--json"))
    assert [answer["text"] + "\n" for answer in from_json] == alone

    # Sampled, each has the noise of its place: the first one that which it has alone.
    sampled = ("--json", "--temperature", 1, "--top-k", 40, "--seed", 5)
    batch = answers(generate(*both, *sampled))
    assert batch == answers(generate(*both, *sampled))
    assert batch[0] == answers(generate(*common, *prompts[0], *sampled))[0]
    other = answers(generate(*both, *sampled, "--seed", 6))
    for first, second in zip(batch, other, strict=True):
        assert first["token_ids"] != second["token_ids"]


@pytest.mark.parametrize("attention", ["wave", "full"])
def test_json_and_facts(generate: Generate, tiny: Path, attention: str) -> None:
    result = generate(
        "--model", tiny, "--prompt", LONG, "--max-new-tokens", 9, "--json",
        "--attention", attention, "--store", "device", *SMALL_ZONES, "--retrieval-fraction", 0.3,
    )  # fmt: skip
    assert result.status == 0
    exact = "all tokens are exact" if attention == "full" else r"tokens retrieved: [\d.]+%"
    assert re.fullmatch(FACTS.format(exact=exact), result.err), result.err
    assert result.out.count("\n") == 1
    printed = json.loads(result.out)
    assert printed["model"] == str(tiny)
    assert printed["attention"] == attention
    (answer,) = printed["answers"]
    assert answer["prompt_tokens"] == len(LONG) + 3  # <s>, <user>, <answer>
    assert 1 <= len(answer["token_ids"]) <= 9
    assert answer["finish_reason"] in ("length", "stop")
    facts = printed["facts"]
    assert facts["first_token_seconds"] > 0
    assert facts["device_bytes"] > 0
    assert facts["host_bytes"] == 0
    # Nothing is cached where the rows are on the device.
    assert facts["hit_ratio"] is None
    assert "cache hits" not in result.err
    if attention == "full":
        assert facts["retrieved_share"] == 1.0
    else:
        assert 0.25 < facts["retrieved_share"] < 0.35


def test_a_short_prompt_is_exact(generate: Generate, tiny: Path) -> None:
    """Its tokens are all in the window: nothing is indexed, so nothing retrieved."""
    arguments = ("--model", tiny, "--prompt", "hello", "--max-new-tokens", 3, "--json")
    result = generate(*arguments)
    assert "; all tokens are exact; " in result.err
    assert "%" not in result.err
    assert json.loads(result.out)["facts"]["indexed_tokens"] == 0


def test_hits_are_shown_where_there_is_a_cache(generate: Generate, tiny: Path) -> None:
    result = generate(
        *("--model", tiny, "--prompt", LONG, "--max-new-tokens", 9, "--json", "--store", "host"),
        *SMALL_ZONES,
    )
    assert result.status == 0, result.err
    assert re.search(r"cache hits: [\d.]+%; ", result.err)
    facts = json.loads(result.out)["facts"]
    assert 0 <= facts["hit_ratio"] <= 1
    assert facts["host_bytes"] > 0


def test_layers_are_unstacked_where_they_are_written_out_and_there_is_room(
    generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*FULL, tiny, "--prompt", "hello", "--max-new-tokens", 3, "--json")
    expected = answers(generate(*common))
    unstacked = []

    def unstack(params: dict) -> dict:
        unstacked.append(unstack_layers(params))
        return unstacked[-1]

    monkeypatch.setattr(loading, "unstack_layers", unstack)
    assert answers(generate(*common)) == expected
    assert not unstacked  # a CPU loops over the layers
    monkeypatch.setattr(Generator, "unrolls", True)
    assert answers(generate(*common)) == expected
    assert len(unstacked) == 1

    need = SimpleNamespace(weights=70, loading=50, largest_stack=20)
    for room, expected_choice in ((90, True), (89, False), (None, True)):
        plan = SimpleNamespace(need=need, free=SimpleNamespace(device=room))
        assert loading.unstacks.__wrapped__(SimpleNamespace(unrolls=True), plan) is expected_choice


def test_chat_or_raw(generate: Generate, tiny: Path) -> None:
    common = (*FULL, tiny, "--prompt", "hello", "--max-new-tokens", 1, "--json")
    for flag, length in (([], 8), (["--chat"], 8), (["--raw"], 6)):
        assert answers(generate(*common, *flag))[0]["prompt_tokens"] == length


def test_a_text_is_continued_and_a_message_answered(
    generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continuation's first space depends on the text before it; an answer begins anew."""
    given, stream = [], Tokenizer.stream

    def keep(self: Tokenizer, prompt_ids: Sequence[int] = ()) -> TextStream:
        given.append(list(prompt_ids))
        return stream(self, prompt_ids)

    monkeypatch.setattr(Tokenizer, "stream", keep)
    common = (*FULL, tiny, "--prompt", "hello", "--max-new-tokens", 1)
    assert generate(*common, "--raw").status == generate(*common, "--chat").status == 0
    assert given == [load_tokenizer(tiny).encode("hello", add_special=True), []]


def test_standard_input(generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = (*FULL, tiny, "--max-new-tokens", 3, "--json")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("grüß".encode())))
    piped = answers(generate(*common, "--prompt-file", "-"))
    assert piped == answers(generate(*common, "--prompt", "grüß"))


def test_one_token_and_a_longer_context_than_the_model_says(generate: Generate, tiny: Path) -> None:
    common = (*FULL, tiny, "--raw", "--prompt", "x" * 600, "--max-new-tokens", 1)
    assert generate(*common).status == 2
    result = generate(*common, "--max-context", 700)
    assert result.status == 0
    assert "one token" in result.err


def test_stops_at_a_stop_token(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    common = ("--prompt", "hello", "--max-new-tokens", 20, "--json")
    (free,) = answers(generate(*FULL, tiny, *common))
    assert free["finish_reason"] == "length"
    # The fifth token, or the first place of the same token, becomes a stop token.
    stop = free["token_ids"][4]
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    (ended,) = answers(generate(*FULL, model, *common))
    length = free["token_ids"].index(stop) + 1
    assert ended["token_ids"] == free["token_ids"][:length]
    assert ended["finish_reason"] == "stop"
    assert free["text"].startswith(ended["text"].rstrip("\ufffd"))


def test_progress_only_where_wanted(generate: Generate, tiny: Path) -> None:
    common = (*FULL, tiny, "--prompt", "hello", "--max-new-tokens", 1)
    shown = generate(*common, "--progress")
    assert "loading the model" in shown.err
    assert "reading the prompt" in shown.err
    hidden = generate(*common)
    assert hidden.err.count("\n") == 1
    assert "loading" not in hidden.err
    assert shown.out == hidden.out


@pytest.mark.slow
def test_the_default_model_answers(generate: Generate) -> None:
    result = generate("--prompt", "What is the capital of France?", "--max-new-tokens", 8)
    assert result.status == 0
    assert "Paris" in result.out


@pytest.mark.slow(35)
def test_staged_rows_give_the_same_answers(
    generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--model", tiny, "--prompt", LONG, "--max-new-tokens", 20, "--json", *SMALL_ZONES)
    common = (*common, "--store", "host")
    fed, feed = [], StagedEngine.feed
    monkeypatch.setattr(StagedEngine, "feed", lambda *args: fed.append(1) or feed(*args))
    in_place = answers(generate(*common, "--fetch", "in_place"))
    assert not fed
    assert in_place == answers(generate(*common, "--fetch", "staged"))
    assert len(fed) >= 19
