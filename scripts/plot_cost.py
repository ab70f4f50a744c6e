"""Plots KL against the bytes that a step reads, of the folders of several evaluations.

    python scripts/plot_cost.py results-05b results-15b --out kl_by_bytes.png

The folders are those of evaluate.py, or of report_attention.py: nothing is run and nothing in them
is changed. Folders of one model and length share a panel. Prints the table of costs of each folder.
"""

from pathlib import Path
from typing import Any

import click

from models.errors import InputError
from wavejax.cli.entry import exit_process
from wavejax.cli.guard import main_guard
from wavejax.evaluation import plots
from wavejax.evaluation.cost_report import (
    Point,
    panels_of,
    plot_kl_by_bytes,
    points_of,
    summarise_costs,
)
from wavejax.evaluation.origins import CACHE_SHAPE
from wavejax.evaluation.records import SETTINGS, read_results
from wavejax.evaluation.setup import make_room_for
from wavejax.evaluation.summary import tabulate
from wavejax.store.shape import CacheShape


@click.command(
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=Path)
@click.option("--out", type=Path, required=True, help="The PNG file.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="MODEL=LAYERS,KV_HEADS,HEAD_DIM",
    help="Of a model, by its name in settings.json, where an older folder does not say it. "
    "Repeatable.",
)
def command(folders: tuple[Path, ...], out: Path, shapes: tuple[str, ...]) -> None:
    """Plot KL against bytes read by a step, for every method of evaluations' folders."""
    make_room_for(out)
    tabulate()
    plots.pyplot()
    given = dict(map(parse_shape, shapes))
    panels: dict[str, list[Point]] = {}
    tables = []
    for folder in folders:
        content, records = read_results(folder)
        settings = content["settings"]
        for name in ("model", "dtype"):
            if name not in settings:
                raise InputError(f"{folder / SETTINGS} has no {name!r}: no evaluation wrote it")
        shape = shape_of(folder, content, given)
        points, unknown = points_of(records, shape, settings)
        tables += [f"# {folder.name}: {settings['model']}", summarise_costs(points, unknown)]
        for title, found in panels_of(settings["model"], points).items():
            panels.setdefault(title, []).extend(found)
    print("\n\n".join(tables))
    if not panels:
        raise InputError("no method of these folders is known any more: there is nothing to plot")
    plot_kl_by_bytes(panels, out)


def parse_shape(text: str) -> tuple[str, CacheShape]:
    """Read a model's name and its shape; raise InputError."""
    model, _, sizes = text.rpartition("=")
    try:
        layers, kv_heads, head_dim = map(int, sizes.split(","))
    except ValueError as error:
        raise InputError(
            f"--shape is {text!r}; give MODEL=LAYERS,KV_HEADS,HEAD_DIM, as in model.gguf=24,2,64"
        ) from error
    return model, CacheShape(layers, kv_heads, head_dim)


def shape_of(folder: Path, content: dict[str, Any], given: dict[str, CacheShape]) -> CacheShape:
    """Return the shape of a folder's model; raise InputError where nothing says it."""
    model, known = content["settings"]["model"], content.get("parts", {}).get(CACHE_SHAPE)
    if known is not None:
        return CacheShape(**known)
    if model not in given:
        raise InputError(
            f"{folder / SETTINGS} does not say the layers and heads of {model}, as older ones do "
            f"not: give --shape {model}=LAYERS,KV_HEADS,HEAD_DIM"
        )
    return given[model]


main = main_guard(command)

if __name__ == "__main__":
    exit_process(main())
