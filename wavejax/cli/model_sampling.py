"""`--sampling model`: the values of the model's own generation_config.json."""

from pathlib import Path
from typing import Any

from wavejax.cli.flags import errors_in_flags
from wavejax.engine import model_sampling as library


def model_sampling(model: Path) -> dict[str, Any]:
    """`wavejax.engine.model_sampling.model_sampling`, whose errors name flags."""
    with errors_in_flags():
        return library.model_sampling(model)


def sampling_text(values: dict[str, Any]) -> str:
    """The values for reading: "temperature 0.6, top_p 0.95"."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
