"""What a config.json says of compressed-tensors: which matrices, in which layout."""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.checkpoints.hf_compressed import CompressedLayout
from models.checkpoints.hf_settings import block_size, setting
from models.errors import InputError

_PACKED = "pack-quantized"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized")
_ANOTHER = "take another one, the model that was quantised, or a GGUF file of it"
_WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class _Group:
    targets: tuple[str, ...]
    layout: CompressedLayout


@dataclass(frozen=True)
class CompressedMethod:
    """The groups of a config.json, in their order."""

    groups: tuple[_Group, ...]

    suffixes = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )

    def layout(self, module: str) -> CompressedLayout:
        """Give the layout of a module's matrix, by the first target that names it.

        Names go before patterns, and those before classes, as in compressed-tensors.

        Raises:
          InputError: no group's targets name it.
        """
        for names in (_is_name, _is_pattern, _is_class):
            for group in self.groups:
                if any(names(target, module) for target in group.targets):
                    return group.layout
        raise InputError(
            f"{_WHERE} has no group whose targets name {module}, yet its weights are compressed: "
            "add it there, or take another file"
        )


def compressed_method(settings: Mapping[str, Any]) -> CompressedMethod:
    """Read the settings of a config.json.

    Raises:
      InputError: a format, or a kind of numbers, that is not read.
    """
    transforms = settings.get("transform_config")
    if transforms:
        raise InputError(f"{_WHERE} has a transform_config, which is not read; {_ANOTHER}")
    sparsity = settings.get("sparsity_config")
    sparse = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if sparse and sparse != "dense":
        raise InputError(
            f"{_WHERE} has a sparsity_config of the format {reprlib.repr(sparse)}, which is not "
            f"read; {_ANOTHER}"
        )
    groups = settings.get("config_groups")
    cache_alone = groups == {} and settings.get("kv_cache_scheme")
    if not isinstance(groups, Mapping) or not (groups or cache_alone):
        raise InputError(f"{_WHERE}'s config_groups are {reprlib.repr(groups)}; expected groups")
    # Groups of activations alone are of no matter here: activations stay floats.
    weighed = {name: x for name, x in groups.items() if not _of_activations(x)} or groups
    return CompressedMethod(tuple(_group(name, x, settings) for name, x in weighed.items()))


def _of_activations(group: Any) -> bool:
    return isinstance(group, Mapping) and group.get("weights") is None


def _group(name: str, group: Any, settings: Mapping[str, Any]) -> _Group:
    where = f"{_WHERE}'s {name}"
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{where} is {reprlib.repr(group)}; expected an object with targets")
    for target in filter(_pattern, targets):
        try:
            re.compile(str(_pattern(target)))
        except re.error as error:
            raise InputError(f"{where} has the target {target!r}: {error}") from None
    format = setting(group, "format", settings.get("format"))
    if format not in _FORMATS:
        raise InputError(
            f"{where} has the format {reprlib.repr(format)}, which is not read; read are "
            f"{', '.join(_FORMATS)}: {_ANOTHER}"
        )
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise InputError(
            f"{where} quantises no weights but activations, which stay floats here: "
            "remove quantization_config from config.json to read the weights"
        )
    return _Group(tuple(targets), _layout(where, weights, packed=format == _PACKED))


def _layout(where: str, weights: Mapping[str, Any], packed: bool) -> CompressedLayout:
    bits, kind = setting(weights, "num_bits", 8), setting(weights, "type", "int")
    read = [("int", 8), ("int", 4)] if packed else [("int", 8), ("int", 4), ("float", 8)]
    if (kind, bits) not in read:
        raise InputError(
            f"{where} has weights of type {kind!r} and {bits!r} bits, which are not read; read are "
            f"int of 4 and 8, and float of 8 that are not packed: {_ANOTHER}"
        )
    group = setting(weights, "group_size", None)
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy not in ("tensor", "channel", "group", "block"):
        raise InputError(
            f"{where} has the strategy {strategy!r}, which is not read; read are tensor, channel, "
            f"group and block: {_ANOTHER}"
        )
    if strategy == "group" and (type(group) is not int or group < 1):
        raise InputError(f"{where} has the group_size {group!r}; expected a whole number from 1 on")
    symmetric = bool(setting(weights, "symmetric", True))
    if kind == "float" and strategy == "group":
        raise InputError(f"{where} has floats in groups, which are not read; {_ANOTHER}")
    if not symmetric and (kind == "float" or strategy == "block"):
        raise InputError(
            f"{where} has zero points of floats or blocks, which are not read; {_ANOTHER}"
        )
    return CompressedLayout(
        bits=int(bits),
        is_float=kind == "float",
        packed=packed,
        strategy=strategy,
        group=group if strategy == "group" else None,
        block=_block(weights) if strategy == "block" else None,
        symmetric=symmetric,
        # "weight" and "static" sort columns and put them back: groups follow each other.
        ordered=weights.get("actorder") not in ("group", "dynamic", True),
    )


def _block(weights: Mapping[str, Any]) -> tuple[int, int]:
    block = weights.get("block_structure")
    if isinstance(block, str):  # "128x128", as it was once written
        block = [int(size) if size.isdecimal() else size for size in block.split("x")]
    return block_size(block, "block_structure")


def _pattern(target: str) -> str | None:
    return target.removeprefix("re:") if target.startswith("re:") else None


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    pattern = _pattern(target)
    return pattern is not None and re.match(pattern, module) is not None


def _is_class(target: str, module: str) -> bool:
    """Whether the target is the class of the module in transformers."""
    return target == ("Embedding" if module.endswith("embed_tokens") else "Linear")
