"""`--sampling model`: the values of the model's own generation_config.json."""

from typing import Any


def sampling_text(values: dict[str, Any]) -> str:
    """Return the values for reading: "temperature 0.6, top_p 0.95"."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
