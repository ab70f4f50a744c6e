"""A tiny random model with a tokenizer and a chat template, and a way to run the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers

from tests.support.tiny_models import CONFIGS, make_tensors, write_folder
from wavejax.cli import compilation

VOCAB = 260
CONTEXT = 512
TINY = CONFIGS["llama"] | {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "max_position_embeddings": CONTEXT,
}
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
# Prompts of a few hundred tokens are then clustered, retrieved and estimated.
SMALL_ZONES = [
    *("--local-tokens", "8", "--growth-tokens", "16", "--cluster-size", "4"),
    *("--max-cluster-size", "8", "--segment-tokens", "128"),
    *("--min-candidate-tokens", "32", "--min-retrieved-tokens", "8"),
]


def write_tokenizer(folder: Path, **config: object) -> None:
    """A byte-level tokenizer without merges: every byte is a token."""
    special = ["<s>", "</s>", "<user>", "<answer>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    assert len(vocab) == VOCAB
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny")
    write_folder(folder, TINY, make_tensors(TINY))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of compilation, however slow the machine; in this process."""
    monkeypatch.setattr(compilation, "PATIENCE", 1e6)


class Result(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def generate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs `python -m wavejax.generate` in this process, in an empty folder."""
    from wavejax.generate import main

    empty = tmp_path / "cwd"
    empty.mkdir()
    monkeypatch.chdir(empty)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert list(empty.iterdir()) == []
        return Result(status, captured.out, captured.err)

    return run
