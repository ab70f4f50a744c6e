"""What ends an answer, how it is sampled, how many there are: --stop, --sampling, --samples."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from models.checkpoints.open import open_checkpoint
from models.errors import InputError
from tests.wavejax.cli.conftest import Result
from wavejax import convert
from wavejax.cli import generate_command
from wavejax.cli.model_sampling import sampling_text
from wavejax.engine.model_sampling import model_sampling
from wavejax.engine.sampling import Sampler

Generate = Callable[..., Result]
COMMON = ("--raw", "--max-new-tokens", 24, "--attention", "full", "--json")


def printed(result: Result) -> list[dict]:
    assert result.status == 0, result.err
    return json.loads(result.out)["answers"]


def stop_in(text: str) -> str:
    """Three characters in the middle that come there first, and end in no half character."""
    for start in range(4, len(text) - 3):
        stop = text[start : start + 3]
        if text.index(stop) == start and stop.isprintable() and "\ufffd" not in stop:
            return stop
    raise AssertionError(f"no stop text in {text!r}")


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A model that says letters: all other tokens' rows of its output layer are zero."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("talkative") / "model"
    shutil.copytree(tiny, folder)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(folder / "model.safetensors")
    letters = [vocab[letter] for letter in "abcdefghijklmnopqrstuvwxyz"]
    head = np.zeros_like(tensors["lm_head.weight"])
    head[letters] = tensors["lm_head.weight"][letters] * 3
    tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_an_answer_ends_before_a_stop_text(generate: Generate, talkative: Path) -> None:
    """Across the borders of tokens, each of which is one character here."""
    common = ("--model", talkative, "--prompt", "hello", *COMMON)
    (free,) = printed(generate(*common))
    stop = stop_in(free["text"])
    (ended,) = printed(generate(*common, "--stop", "never to come", "--stop", stop))
    assert ended["text"] == free["text"].partition(stop)[0]
    assert ended["finish_reason"] == "stop"
    # With the tokens that made it.
    length = len(free["text"].partition(stop)[0]) + len(stop)
    assert ended["token_ids"] == free["token_ids"][:length]
    # Begun at the very end, it is text.
    (whole,) = printed(generate(*common, "--stop", free["text"][-1] + "and more"))
    assert whole["text"] == free["text"]
    # And as it is printed.
    shown = [argument for argument in common if argument != "--json"]
    assert generate(*shown, "--stop", stop).out == ended["text"] + "\n"


def test_one_answer_stops_and_the_other_goes_on(generate: Generate, talkative: Path) -> None:
    common = ("--model", talkative, "--prompt", "hello", "--prompt", "worlds", *COMMON)
    free = printed(generate(*common))
    stop = stop_in(free[0]["text"])
    ended = printed(generate(*common, "--stop", stop))
    for one, answer in zip(free, ended, strict=True):
        assert answer["text"] == one["text"].partition(stop)[0]


def test_samples_of_each_prompt(generate: Generate, talkative: Path) -> None:
    common = ("--model", talkative, "--prompt", "hello", *COMMON, "--temperature", 1)
    both = printed(generate(*common, "--prompt", "worlds", "--samples", 2))
    named = [(one["prompt"], one["sample"], one["prompt_tokens"]) for one in both]
    assert named == [(1, 1, 6), (1, 2, 6), (2, 1, 7), (2, 2, 7)]
    three = printed(generate(*common, "--samples", 3))
    assert len({one["text"] for one in three}) == 3
    assert three == printed(generate(*common, "--samples", 3))
    assert three[0] == printed(generate(*common))[0]
    # Noise is by place in the batch.
    assert [one["text"] for one in both[:2]] == [one["text"] for one in three[:2]]
    other = printed(generate(*common, "--samples", 3, "--seed", 1))
    assert {one["text"] for one in other}.isdisjoint(one["text"] for one in three)


def test_names_of_samples_as_printed(generate: Generate, talkative: Path) -> None:
    common = ("--model", talkative, "--prompt", "hello", *COMMON[:-1], "--temperature", 1)

    def headers(*more: object) -> list[str]:
        result = generate(*common, *more)
        assert result.status == 0, result.err
        return re.findall(r"^=== (.*) ===$", result.out, re.MULTILINE)

    assert headers("--samples", 2) == ["sample 1 of 2", "sample 2 of 2"]
    assert headers("--samples", 2, "--prompt", "x")[1:3] == [
        "prompt 1 of 2, sample 2 of 2",
        "prompt 2 of 2, sample 1 of 2",
    ]


def test_samples_are_planned_for(generate: Generate, tiny: Path) -> None:
    common = ("--model", tiny, "--plan", "--json", "--temperature", 1, "--samples", 3)
    for given, prompts in ((("--context", 100), 3), (("--context", 100, "--batch", 2), 6),
                           (("--prompt", "x", "--prompt", "y"), 6)):  # fmt: skip
        assert json.loads(generate(*common, *given).out)["prompts"] == prompts


@pytest.mark.parametrize(
    "stated, values",
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None},
         {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"temperature": 1, "repetition_penalty": 1.05, "eos_token_id": 2},
         {"temperature": 1.0, "repetition_penalty": 1.05}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        # What is not sampled is greedy, whatever else stands there.
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
    ],
)  # fmt: skip
def test_sampling_values_of_a_model(tmp_path: Path, stated: dict, values: dict) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    found = model_sampling(tmp_path)
    assert found == values
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in values.items()
    }
    Sampler(**found)


@pytest.mark.parametrize(
    "stated, said",
    [
        (None, "has no generation_config.json; give `temperature`"),
        ({}, "states no temperature, top_p"),
        ({"temperature": "hot"}, 'temperature is "hot"; expected a number'),
        ({"temperature": True}, "temperature is true; expected a number"),
        ({"temperature": float("nan")}, "temperature is NaN; expected a number"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number"),
        ([], "holds a JSON list"),
        ("{", "is not JSON"),
    ],
)
def test_models_without_usable_values(tmp_path: Path, stated: object, said: str) -> None:
    if stated is not None:
        text = stated if isinstance(stated, str) else json.dumps(stated)
        (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(said)):
        model_sampling(tmp_path)
    with pytest.raises(InputError, match=r"has no generation_config\.json"):
        model_sampling(tmp_path / "model.gguf")


def test_values_for_reading() -> None:
    values = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert sampling_text(values) == "temperature 0.6, top_p 0.95, top_k 20"


@pytest.fixture
def sampled(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model, with sampling values of its own."""
    model = tmp_path / "sampled"
    shutil.copytree(tiny, model)
    stated = {"do_sample": True, "temperature": 0.5, "top_k": 7, "repetition_penalty": 1.25}
    (model / "generation_config.json").write_text(json.dumps(stated))
    return model


def test_options_count_for_more_than_the_models_values(
    generate: Generate, sampled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sampler] = []

    def keep(_: object, __: object, sampler: Sampler, ___: object) -> None:
        seen.append(sampler)
        raise InputError("seen enough")

    monkeypatch.setattr(generate_command, "Generator", keep)
    common = ("--model", sampled, "--prompt", "x")
    generate(*common)
    generate(*common, "--sampling", "model")
    # A default that is given is given.
    generate(*common, "--sampling", "model", "--top-k", 0, "--min-p", 0.1, "--temperature", 0)
    assert seen == [
        Sampler(),
        Sampler(temperature=0.5, top_k=7, repetition_penalty=1.25),
        Sampler(temperature=0.0, min_p=0.1, repetition_penalty=1.25),
    ]


def test_the_models_values_are_in_the_facts(
    generate: Generate, sampled: Path, tmp_path: Path
) -> None:
    common = ("--prompt", "x", "--max-new-tokens", 2, "--attention", "full", "--json")
    result = generate("--model", sampled, *common, "--sampling", "model", "--top-k", 9)
    said = "; sampling as the model has it: temperature 0.5, repetition_penalty 1.25; "
    assert said in result.err
    stated = json.loads(result.out)["sampler"]
    assert (stated["temperature"], stated["top_k"]) == (0.5, 9)
    assert "sampling" not in generate("--model", sampled, *common).err
    # A converted model has them too.
    converted = tmp_path / "converted"
    assert convert.main([str(sampled), str(converted)]) == 0
    assert model_sampling(converted) == model_sampling(sampled)


def test_rope_scaling_lets_a_longer_prompt_in(generate: Generate, tiny: Path) -> None:
    context = open_checkpoint(tiny).config.max_context
    arguments = ("--model", tiny, "--raw", "--prompt", "x" * (context + 10), "--plan")
    refused = generate(*arguments)
    assert refused.status == 2
    assert "--rope-scaling yarn:2" in refused.err
    assert "--max-context" not in refused.err
    assert generate(*arguments, "--rope-scaling", "yarn:2").status == 0
