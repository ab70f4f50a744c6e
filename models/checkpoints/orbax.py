"""Our own checkpoint folder: Orbax parameters, and the model's config beside them."""

import contextlib
import gc
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.model_path import CONFIG_FILE
from models.checkpoints.new_folder import make_folder, refuse_existing, signals_put_off
from models.checkpoints.tensor_files import read_json
from models.checkpoints.tensor_problems import report_problems
from models.checkpoints.tensor_source import parameter_dtype, refuse_overflow
from models.config import ModelConfig
from models.errors import InputError
from models.parameters import Params, nest, parameter_shapes
from models.paths import is_file, refuse_lfs_pointer

__all__ = ["CONFIG_FILE", "load_orbax", "open_orbax", "refuse_existing", "save_orbax"]

_FORMAT = "wavejax-orbax-1"
_PARAMS = "params"


def open_orbax(folder: Path) -> ModelConfig:
    """Read the config of a folder that `save_orbax` wrote and check its tensors' shapes.

    Raises:
      InputError: not such a folder, or incomplete.
    """
    stored = read_json(folder / CONFIG_FILE)
    if stored.get("format") != _FORMAT or not isinstance(stored.get("config"), dict):
        raise InputError(f"{folder / CONFIG_FILE} does not say {_FORMAT}; convert the model again")
    config = ModelConfig.from_json(stored["config"])
    _check_sizes(folder, stored.get("sizes"))
    with _checkpointer() as checkpointer:
        metadata = _or_input_error(folder, lambda: checkpointer.metadata(_params(folder)))
    stored_tree = getattr(metadata, "item_metadata", metadata)
    leaves = jax.tree_util.tree_flatten_with_path(getattr(stored_tree, "tree", stored_tree))[0]
    given = {
        ".".join(str(getattr(key, "key", key)) for key in path): tuple(leaf.shape)
        for path, leaf in leaves
    }
    shapes = parameter_shapes(config)
    report_problems(str(folder), {".".join(path): shape for path, shape in shapes.items()}, given)
    return config


def load_orbax(folder: Path, config: ModelConfig, dtype: str) -> Params:
    """Read the parameters as arrays of `dtype` on JAX's default device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(shape, parameter_dtype(dtype), sharding=sharding)
        for path, shape in parameter_shapes(config).items()
    }
    with _checkpointer() as checkpointer:
        tree = _or_input_error(
            folder, lambda: checkpointer.restore(_params(folder), nest(dict(wanted)))
        )
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        refuse_overflow(f"{folder}: {jax.tree_util.keystr(path)}", leaf)
    return {"params": tree}


def save_orbax(
    config: ModelConfig, params: Params, folder: Path, add_files: Callable[[Path], None]
) -> None:
    """Write parameters and config to a new folder, which appears only once it is complete.

    Args:
      config: the model's.
      params: as `Decoder.init` gives them.
      folder: must not exist.
      add_files: called with the unfinished folder, to put more files there.

    Raises:
      InputError: `folder` exists, or cannot be written.
    """

    def fill(unfinished: Path) -> None:
        # Orbax's threads write on after an interruption, as if still wanted.
        with signals_put_off(), _checkpointer() as checkpointer:
            checkpointer.save(_params(unfinished), params["params"])
        sizes = {str(path.relative_to(unfinished)): size for path, size in _sizes(unfinished)}
        stored = {"format": _FORMAT, "config": config.to_json(), "sizes": sizes}
        (unfinished / CONFIG_FILE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        add_files(unfinished)

    with _threads_unheard():
        try:
            reason = _error_of(lambda: make_folder(folder, fill))
            if reason is not None:
                raise InputError(f"{folder} cannot be written: {reason}")
        except BaseException:
            gc.collect()  # as they are freed, Orbax's tasks log errors that nobody asked them for
            raise


def _error_of(write: Callable[[], None]) -> str | None:
    """Why files could not be written; None if they were. The error itself is let go of."""
    try:
        write()
    except InputError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:
        # Of a full disk, tensorstore makes a ValueError and tokenizers a plain Exception.
        if type(error) not in (ValueError, Exception):
            raise
        number = re.search(r"os[_ ]error(?:_code=')? ?(\d+)", str(error))
        return os.strerror(int(number[1])) if number else " ".join(str(error).split())[:200]
    return None


@contextlib.contextmanager
def _threads_unheard() -> Iterator[None]:
    """Keep Orbax's and tensorstore's threads from printing tracebacks of errors.

    The first error is raised where it is waited for, so that all can be said there.
    """
    level, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.ERROR)
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of tasks that were given up
            yield
    finally:
        logging.disable(level)
        sys.unraisablehook = hook


def _sizes(folder: Path) -> list[tuple[Path, int]]:
    files = sorted(path for path in (folder / _PARAMS).rglob("*") if path.is_file())
    return [(path, path.stat().st_size) for path in files]


def _check_sizes(folder: Path, sizes: Any) -> None:
    """Find a truncated file by its size: Orbax would find it too, but only after much reading."""
    for name, size in (sizes if isinstance(sizes, dict) else {}).items():
        file = folder / name
        there_is = file.stat().st_size if is_file(file) else None
        if there_is != size:
            refuse_lfs_pointer(file)
            given = "is missing" if there_is is None else f"has {there_is} bytes"
            raise InputError(
                f"{folder} is truncated or corrupt: {name} {given}, expected {size}; convert the "
                "model again"
            )


def _checkpointer() -> Any:
    # Importing Orbax takes seconds, which only those who use it should wait for.
    import orbax.checkpoint

    # StandardCheckpointer would write in the background.
    return orbax.checkpoint.Checkpointer(orbax.checkpoint.StandardCheckpointHandler())


def _params(folder: Path) -> Path:
    return folder.resolve() / _PARAMS


def _or_input_error(folder: Path, action: Callable[[], Any]) -> Any:
    """Return what `action` gives.

    Orbax has no error of its own for damage: any stands for it here.
    """
    if not (folder / _PARAMS).is_dir():
        raise InputError(f"{folder} lacks its folder {_PARAMS}; convert the model again")
    try:
        return action()
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise InputError(
            f"{folder} is truncated or corrupt ({type(error).__name__}: {reason}); convert the "
            "model again"
        ) from None
