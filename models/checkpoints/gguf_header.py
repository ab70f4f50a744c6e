"""Reads what stands before a GGUF file's tensor data, and checks that the data is all there.

The `gguf` package's own reader trusts the file: cut short, it fails anywhere, or not at all. The
layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import re
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from models.checkpoints.gguf_encodings import unknown_encoding
from models.errors import InputError
from models.paths import first_bytes, refuse_stand_in
from models.values import is_number, token_id

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
# The first bytes of what preceded GGUF in llama.cpp: ggml, ggmf and ggjt, little-endian.
_BEFORE_GGUF = (b"lmgg", b"fmgg", b"tjgg")
# Names of pieces that a large file was cut into, byte by byte, to be uploaded.
_PIECE = re.compile(r"\.gguf[.-](split-?[a-z]{1,2}|part[-_.]?[a-z0-9]+(of\d+)?)$", re.IGNORECASE)
# Kinds of tokens that end a text, by which the metadata name their ids.
END_KINDS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's place in the file.

    Attributes:
      shape: in row-major order (the file states it reversed).
      kind: how its numbers are encoded.
      offset, size: bytes from the file's start, and of data.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file's metadata and tensors by name, in the file's order."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def named_tokens(path: str | Path, metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the tokens that the metadata name, by kind: bos and `END_KINDS`.

    Raises InputError where one is no token id.
    """
    names = {kind: f"tokenizer.ggml.{kind}_token_id" for kind in ("bos", *END_KINDS)}
    return {
        kind: token_id(metadata[name], f"{path}: {name}")
        for kind, name in names.items()
        if name in metadata
    }


def read_gguf_header(path: Path) -> GgufHeader:
    """Read metadata and tensor table.

    Raises:
      InputError: not a GGUF file, a version or byte order not supported, or a file that is corrupt
        or shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise _not_gguf(path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def number_of(
    path: Path, metadata: Mapping[str, Any], name: str, default: float | int | None = None
) -> float:
    """Return the number of that name in the metadata, or `default`; InputError if there is none."""
    value = metadata.get(name, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]  # some files repeat a number for each layer
    if value is None:
        raise InputError(f"{path}: its metadata lacks {name}")
    if not is_number(value):
        raise InputError(f"{path}: {name} is {reprlib.repr(value)}; expected one number")
    return float(value)


def _not_gguf(path: Path) -> InputError:
    refuse_stand_in(path)
    what = f"{path} is not a GGUF file: it does not begin with GGUF"
    if first_bytes(path, 4) in _BEFORE_GGUF:
        return InputError(
            f"{path} is of a format that llama.cpp had before GGUF; take a GGUF file of the model"
        )
    if _PIECE.search(path.name):
        return InputError(f"{what}; if it is a piece of one, join the pieces in order with cat")
    return InputError(what)


class _Parser:
    """Walks the header once, from byte 4."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 4

    def header(self) -> GgufHeader:
        version = self.number("I")
        if version not in (2, 3):
            raise InputError(
                f"{self.path} is GGUF version {version} or big-endian; supported are versions 2 "
                "and 3, little-endian"
            )
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        metadata = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.number("I"))
        rows = [self.tensor_row() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.corrupt(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in rows:
            tensors[name] = self.locate(name, shape, kind, start + offset)
        return GgufHeader(metadata, tensors)

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self.string(), self.number("I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise self.corrupt(f"tensor {name} has {num_dimensions} dimensions")
        reversed_shape = [self.number("Q") for _ in range(num_dimensions)]
        return name, tuple(reversed(reversed_shape)), self.number("I"), self.number("Q")

    def locate(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        try:
            encoding = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
        except (ValueError, KeyError):
            raise InputError(f"{self.path}: tensor {name} has {unknown_encoding(kind)}") from None
        if shape and shape[-1] % block:
            raise self.corrupt(f"tensor {name} {shape} is not made of blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        if offset + size > len(self.data):
            raise InputError(
                f"{self.path} is truncated: tensor {name} ends at byte {offset + size}, the file "
                f"at {len(self.data)}; {self.way_out()}"
            )
        return GgufTensor(shape, encoding, offset, size)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind, length = self.number("I"), self.number("Q")
            if item_kind in _SCALARS:
                return list(self.numbers(_SCALARS[item_kind], length))
            if item_kind != _STRING:
                raise self.corrupt(f"an array has items of kind {item_kind}")
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise self.corrupt(f"a value is of kind {kind}")
        return self.number(_SCALARS[kind])

    def string(self) -> str:
        begin = self.advance(self.number("Q"))
        try:
            return self.data[begin : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt("a text is not UTF-8") from None

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        begin = self.advance(struct.calcsize("<" + code) * count)
        return struct.unpack_from(f"<{count}{code}", self.data, begin)

    def advance(self, size: int) -> int:
        """Pass `size` bytes, which must be there; give their first one's place."""
        begin = self.at
        if begin + size > len(self.data):
            raise self.corrupt("the file ends inside its header")
        self.at += size
        return begin

    def corrupt(self, what: str) -> InputError:
        return InputError(
            f"{self.path} is truncated or corrupt: {what} (at byte {self.at}); {self.way_out()}"
        )

    def way_out(self) -> str:
        if _PIECE.search(self.path.name):
            return "if it is a piece of a file, join the pieces in order with cat"
        return "download or copy it again"
