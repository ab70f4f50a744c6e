"""The options of what is loaded and where it goes, shared by commands that load a model."""

from collections.abc import Callable

import click

from models.checkpoints.tensor_source import WEIGHT_DTYPES
from wavejax.cli.options import option, options_from
from wavejax.config import WaveConfig

MEMORY = "Memory"
RESEARCH = "Research: attention and its settings"


def model_option(group: str) -> Callable:
    """Make the option `--model`, in a group of --help."""
    return option(
        group,
        "--model",
        help="Hugging Face folder, GGUF file or converted checkpoint.  "
        "[default: the installed SmolLM2 package]",
    )


LOADING_OPTIONS = [
    option(
        MEMORY,
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        show_default=True,
        help="Of weights and caches; auto: float32 on a CPU, bfloat16 elsewhere.",
    ),
    option(
        MEMORY,
        "--weight-dtype",
        type=click.Choice(["auto", *WEIGHT_DTYPES]),
        default="auto",
        show_default=True,
        help="Of the weights' matrices. int8: 8 bits, a scale a channel; int4: 4 bits in groups of "
        "32, embeddings in 8; packed: as a GGUF file or a quantised folder has them; model: as "
        "--dtype; auto: model, since nothing else was measured on a GPU.",
    ),
    option(
        MEMORY,
        "--store",
        type=click.Choice(["auto", "host", "device"]),
        default="auto",
        show_default=True,
        help="Where wave attention keeps the keys and values; auto: on the device while they fit.",
    ),
    option(
        MEMORY,
        "--fetch",
        type=click.Choice(["auto", "in_place", "staged"]),
        default="auto",
        show_default=True,
        help="How rows on the host reach the device; in_place: kernels read them there; staged: "
        "the host gathers and sends them; auto: in_place where kernels can.",
    ),
    option(
        RESEARCH,
        "--attention",
        type=click.Choice(["wave", "full", "auto"]),
        default=None,
        help="auto: full where it should be faster, for short contexts, and wave where full is "
        "slower or does not fit; --plan says which and why.  [default: auto, or wave where one of "
        "its settings is given]",
    ),
    options_from(WaveConfig, RESEARCH, cache_fraction=MEMORY),
]
