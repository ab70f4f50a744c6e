"""The command of `wavejax.convert`."""

import os
import shutil
import stat
from pathlib import Path

import click
from tqdm import tqdm

from models.checkpoints.open import open_checkpoint, write_orbax
from models.checkpoints.orbax import refuse_existing
from models.errors import InputError
from models.paths import stat_of
from models.text.tokenizer import load_tokenizer
from wavejax.cli.guard import main_guard
from wavejax.engine.model_sampling import FILE as GENERATION_CONFIG
from wavejax.planning.free_memory import host_available


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the parameters in DESTINATION.",
)
def convert(source: Path, destination: Path, dtype: str) -> None:
    """Convert SOURCE (a Hugging Face folder, a .gguf file or a converted folder).

    DESTINATION must not exist; it appears once it is complete.
    """
    refuse_existing(destination)
    parent = _writable_parent(destination)
    checkpoint = open_checkpoint(source)
    # Before the weights, so that a model without a tokenizer is refused at once.
    tokenizer = load_tokenizer(source)
    size = checkpoint.parameter_bytes(dtype)
    _refuse_if_short("memory", size, host_available())
    _refuse_if_short("disk space", size, shutil.disk_usage(parent).free)
    # disable=None: no bar where stderr is no terminal.
    with tqdm(unit=" tensors", desc=f"reading {source.name}", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def add_files(folder: Path) -> None:
            tokenizer.save(folder)
            if (source / GENERATION_CONFIG).is_file():  # the model's own sampling values
                shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)

        write_orbax(checkpoint, destination, dtype, show, add_files)
    click.echo(f"wrote {destination}: {size / 1e9:.2f} GB of parameters as {dtype}")


def _refuse_if_short(what: str, needed: int, there_is: int) -> None:
    if needed > there_is:
        raise InputError(
            f"not enough {what}: the model needs {needed / 1e9:.1f} GB, there is "
            f"{there_is / 1e9:.1f} GB; free some or choose a smaller --dtype"
        )


def _writable_parent(destination: Path) -> Path:
    """Return the innermost folder there is above `destination`.

    Raise InputError if it takes no new one.
    """
    above = ((parent, stat_of(parent)) for parent in destination.absolute().parents)
    parent, found = next((parent, found) for parent, found in above if found is not None)
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{destination} cannot be written: {parent} is no folder; name another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{destination} cannot be written: {parent} is not writable; name another folder"
        )
    return parent


main = main_guard(convert)
