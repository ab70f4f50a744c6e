"""A model in one GGUF file, or in several parts of which the first is given."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoints.gguf_header import GgufTensor, number_of, read_gguf_header
from models.errors import InputError
from models.paths import is_file

# As llama-gguf-split and the gguf package name parts; they find each other by these names.
_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_PART_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_MOST_NAMED = 5


@dataclass(frozen=True)
class GgufParts:
    """The metadata of a model, and where each of its tensors lies.

    Attributes:
      metadata: the first part's, which are the model's.
      tensors: by name, in the order of the parts.
      file_of: the part that holds each tensor.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    file_of: dict[str, Path]


def read_gguf_parts(path: Path) -> GgufParts:
    """Read the headers of a GGUF file and of the parts that belong to it.

    Args:
      path: a whole file, or the first part of several.

    Raises:
      InputError: another part than the first, parts that are missing, that do not belong together
        or hold another number of tensors than they say; or as `read_gguf_header` does.
    """
    header = read_gguf_header(path)
    count = _whole_number(path, header.metadata, _COUNT, 1)
    if count <= 1:
        return GgufParts(header.metadata, header.tensors, dict.fromkeys(header.tensors, path))
    files = _files(path, count, _whole_number(path, header.metadata, _PART_NUMBER, 0))
    expected = _whole_number(path, header.metadata, _TENSORS, -1)
    tensors, file_of = dict(header.tensors), dict.fromkeys(header.tensors, path)
    for number, file in enumerate(files[1:], 1):
        part = read_gguf_header(file)
        said = tuple(
            _whole_number(file, part.metadata, key, default)
            for key, default in ((_PART_NUMBER, -1), (_COUNT, 1), (_TENSORS, expected))
        )
        if said != (number, count, expected):
            raise InputError(
                f"{file} does not belong to {path}: it says that it is part {said[0] + 1} of "
                f"{said[1]} of a model of {said[2]} tensors, expected part {number + 1} of {count} "
                f"of {expected} tensors; download all parts again"
            )
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise InputError(
                f"{file}: its tensor {twice} stands in {file_of[twice].name} too; download all "
                "parts again"
            )
        tensors |= part.tensors
        file_of |= dict.fromkeys(part.tensors, file)
    if expected not in (-1, len(tensors)):
        raise InputError(
            f"{path}: its {count} parts hold {len(tensors)} tensors, expected {expected}; download "
            "all parts again"
        )
    return GgufParts(header.metadata, tensors, file_of)


def first_part(path: Path) -> Path:
    """Return the first part of the model that `path` is another part of; else `path`.

    Raises InputError as `read_gguf_header` does, for a file that is named as another part is.
    """
    named = _PART_NAME.fullmatch(path.name)
    if named is None or int(named["number"]) <= 1 or not is_file(path):
        return path
    first = path.with_name(f"{named['stem']}-00001-of-{named['count']}.gguf")
    if not is_file(first):
        return path  # reading it will say so
    is_other = _whole_number(path, read_gguf_header(path).metadata, _PART_NUMBER, 0) > 0
    return first if is_other else path


def is_other_part(name: str) -> bool:
    """Whether a file's name is that of another part than the first."""
    named = _PART_NAME.fullmatch(name)
    return named is not None and int(named["number"]) > 1


def _files(path: Path, count: int, number: int) -> list[Path]:
    """All parts, the first being `path`; InputError if it is not, or if others are missing."""
    named = _PART_NAME.fullmatch(path.name)
    if number != 0:
        what = f"{path} is part {number + 1} of the {count} parts of a model; give the first part"
        if named is None:
            raise InputError(what)
        first = path.with_name(f"{named['stem']}-00001-of-{named['count']}.gguf")
        absent = "" if is_file(first) else ", which is not there: download it to the same folder"
        raise InputError(f"{what}, {first}{absent}")
    if named is None or (int(named["number"]), int(named["count"])) != (1, count):
        raise InputError(
            f"{path} is the first of {count} parts, which are found by their names; expected a "
            f"name that ends in -00001-of-{count:05d}.gguf: give the parts their names back, or "
            "join them with llama-gguf-split --merge"
        )
    files = [
        path.with_name(f"{named['stem']}-{part:05d}-of-{count:05d}.gguf")
        for part in range(1, count + 1)
    ]
    missing = [file.name for file in files if not is_file(file)]
    if missing:
        more = ", ..." if len(missing) > _MOST_NAMED else ""
        raise InputError(
            f"{path} lacks {len(missing)} of its {count} parts: "
            f"{', '.join(missing[:_MOST_NAMED])}{more}; download them to the same folder"
        )
    return files


def _whole_number(path: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    return int(number_of(path, metadata, key, default))
