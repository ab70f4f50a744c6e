"""How a Hugging Face config.json says that a folder is quantised."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from models.checkpoints.hf_awq import awq_method
from models.checkpoints.hf_compressed_config import compressed_method
from models.checkpoints.hf_fp8 import fp8_method
from models.checkpoints.hf_gptq import gptq_method
from models.checkpoints.hf_layout import Method
from models.errors import InputError

# The second is the first one's older name.
_KEYS = ("quantization_config", "compression_config")

_METHODS: dict[str, Callable[[Mapping[str, Any]], Method]] = {
    "fp8": fp8_method,
    "compressed-tensors": compressed_method,
    "gptq": gptq_method,
    "awq": awq_method,
}


def quantisation_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a config.json says of quantisation, None if nothing; InputError if no object."""
    for key in _KEYS:
        settings = config.get(key)
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise InputError(f"config.json: {key} is {reprlib.repr(settings)}; expected an object")
        return settings
    return None


def quantisation_method(settings: Mapping[str, Any]) -> Method:
    """Give the reader of what `quantisation_settings` returns.

    Raises:
      InputError: a method, or a setting of one, that is not read.
    """
    name = settings.get("quant_method")
    read = _METHODS.get(name) if isinstance(name, str) else None
    if read is None:
        raise InputError(
            f"config.json: quantization_config's quant_method is {reprlib.repr(name)}, which is "
            f"not read; read are: {', '.join(_METHODS)}: take one of those, the model that was "
            "quantised, or a GGUF file of it"
        )
    return read(settings)


def quantisation_notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what the settings ask for besides the weights, and is not done."""
    if settings.get("kv_cache_scheme"):
        return (
            "keys and values: the folder asks for quantised ones (kv_cache_scheme), which is not "
            "done; `row_dtype='int8'` keeps them in 8 bits",
        )
    return ()
