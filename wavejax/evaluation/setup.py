"""What the evaluation scripts share: the model, lists of numbers, facts of the run."""

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.open import Checkpoint, find_default_model, open_checkpoint
from models.errors import InputError
from models.text.tokenizer import Tokenizer, load_tokenizer
from wavejax.cli.compilation import keep_compiled_programs
from wavejax.store.shape import CacheShape


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is evaluated, its weights not yet read.

    Attributes:
        checkpoint: where the weights are.
        tokenizer: the model's.
        dtype: of weights and caches.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    dtype: str

    @property
    def name(self) -> str:
        """The checkpoint's file or folder name."""
        return self.checkpoint.path.name

    @property
    def cache_shape(self) -> CacheShape:
        """The layers and heads of the model's KV cache."""
        return CacheShape.of(self.checkpoint.config)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """An answer ends after any of these."""
        stops = self.tokenizer.stop_ids | set(self.checkpoint.config.stop_token_ids)
        return tuple(sorted(stops))

    def check_length(self, length: int) -> None:
        """Raise InputError for a length that the model was not made for."""
        _refuse_longer("length", length, self.checkpoint)


def make_room_for(*files: Path | None) -> None:
    """Make the folders of files that will be written in the end; raise InputError."""
    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # A file is written anew beside itself, and takes its own place (`files.replacing`).
            written = file if file.exists() and not file.is_file() else file.resolve().parent
            if file.is_dir() or not os.access(written, os.W_OK):
                raise InputError(f"cannot write {file}: name a file in a folder of yours")
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror}") from error


def check_context(checkpoint: Checkpoint, context: int, new_tokens: int) -> None:
    """Raise InputError for an answer that leaves no prompt, or more than the model was made for.

    Args:
        checkpoint: the model's.
        context: tokens of prompt and answer together.
        new_tokens: of the answer.
    """
    if not 0 < new_tokens < context:
        raise InputError(
            f"`new_tokens={new_tokens}` must be from 1 and less than `context={context}`"
        )
    _refuse_longer("`context`", context, checkpoint)


def _refuse_longer(what: str, tokens: int, checkpoint: Checkpoint) -> None:
    most = checkpoint.config.max_context
    if tokens > most:
        raise InputError(f"{what} {tokens} is above the model's context, {most} tokens")


def open_subject(model: str | None, dtype: str) -> Subject:
    """Open a model: the installed SmolLM2 if none is named; raise InputError.

    Starts JAX's device, for which it has compiled programs kept (`keep_compiled_programs`).

    Args:
        model: a path, as for `python -m wavejax.generate`.
        dtype: "auto" is float32 on a CPU, bfloat16 elsewhere.
    """
    checkpoint = open_checkpoint(model if model is not None else find_default_model())
    keep_compiled_programs()
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Subject(checkpoint, load_tokenizer(checkpoint.path), dtype)


def parse_numbers(text: str, kind: type, what: str) -> list[Any]:
    """Numbers above zero, separated by commas; raises InputError."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{what} are {text!r}; give numbers separated by commas") from error
    if min(numbers) <= 0:
        raise InputError(f"{what} are {text!r}; each must be above 0")
    return sorted(set(numbers))


def run_facts() -> dict[str, str]:
    """Versions and the device, for the record."""
    try:
        version = importlib.metadata.version("wavejax")
    except importlib.metadata.PackageNotFoundError:  # run from its folder, never installed
        version = "unknown"
    return {
        "wavejax": version,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
