"""The operations of Triton's intermediate language on NumPy's arrays: see `ttir_evaluator`."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tests.support.ttir_numbers import divided, shifted, to_integer, unsigned

NAME = r"%[\w#]+"
DTYPES = {
    "i1": np.dtype(bool),
    "i8": np.dtype(np.int8),
    "i16": np.dtype(np.int16),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": jnp.dtype(jnp.bfloat16),
}


class Pointer(NamedTuple):
    """Into an array: to one element, or to one for each element of a tensor."""

    array: np.ndarray
    offsets: Any


def kind_of(text: str) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and the shape that a type says."""
    match = re.fullmatch(r"tensor<((?:\d+x)+)(.*)>", text)
    if match is None:
        return DTYPES[text], ()
    return DTYPES[match[2]], tuple(int(size) for size in match[1].split("x")[:-1])


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "arith.addi": lambda x, y: x + y,
    "arith.subi": lambda x, y: x - y,
    "arith.muli": lambda x, y: x * y,
    "arith.addf": lambda x, y: x + y,
    "arith.subf": lambda x, y: x - y,
    "arith.mulf": lambda x, y: x * y,
    "arith.divf": lambda x, y: x / y,
    "arith.divsi": lambda x, y: divided(x, y)[0],
    "arith.remsi": lambda x, y: divided(x, y)[1],
    "arith.divui": lambda x, y: divided(unsigned(x), unsigned(y))[0].view(x.dtype),
    "arith.remui": lambda x, y: divided(unsigned(x), unsigned(y))[1].view(x.dtype),
    "arith.maxsi": np.maximum,
    "arith.minsi": np.minimum,
    "arith.maxui": lambda x, y: np.maximum(unsigned(x), unsigned(y)).view(x.dtype),
    "arith.minui": lambda x, y: np.minimum(unsigned(x), unsigned(y)).view(x.dtype),
    "arith.maxnumf": np.fmax,
    "arith.minnumf": np.fmin,
    "arith.maximumf": np.maximum,
    "arith.minimumf": np.minimum,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": lambda x, y: shifted(np.left_shift, x, y),
    "arith.shrsi": lambda x, y: shifted(np.right_shift, x, y),
    "arith.shrui": lambda x, y: shifted(np.right_shift, unsigned(x), y).view(np.asarray(x).dtype),
}

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "__nv_fabsf": np.abs,
    "__nv_ceilf": np.ceil,
    "__nv_expf": np.exp,
    "__nv_exp2f": np.exp2,
    "__nv_floorf": np.floor,
    "__nv_logf": np.log,
    "__nv_log2f": np.log2,
    "__nv_sqrtf": np.sqrt,
}


CASTS: dict[str, Callable[[Any, np.dtype], Any]] = {
    "arith.extui": lambda x, dtype: unsigned(x).astype(dtype),
    "arith.extsi": lambda x, dtype: np.asarray(x).astype(dtype),
    "arith.trunci": lambda x, dtype: np.asarray(x).astype(dtype),
    "arith.extf": lambda x, dtype: np.asarray(x).astype(dtype),
    "arith.truncf": lambda x, dtype: np.asarray(x).astype(dtype),
    "arith.sitofp": lambda x, dtype: np.asarray(x).astype(dtype),
    "arith.uitofp": lambda x, dtype: unsigned(x).astype(dtype),
    "arith.fptosi": to_integer,
    "arith.fptoui": lambda x, dtype: to_integer(x, np.dtype(f"u{dtype.itemsize}")).view(dtype),
}


def operation(word: str, text: str) -> Callable[[dict[str, Any]], Any]:
    """What computes an operation's result from a scope.

    Args:
        word: the operation's name.
        text: all that stands after the equals sign.
    """
    names = re.findall(NAME, text)
    if word in BINARY:
        function = BINARY[word]
        return lambda scope: function(*(scope[name] for name in names))
    if word in CASTS:
        cast, (dtype, _) = CASTS[word], kind_of(text.rsplit(" to ", 1)[1])
        return lambda scope: cast(scope[names[0]], dtype)
    if word in ("arith.cmpi", "arith.cmpf"):
        predicate = text.split()[1].rstrip(",")
        compare = COMPARISONS[predicate[-2:]]
        view = unsigned if word == "arith.cmpi" and predicate[0] == "u" else np.asarray
        return lambda scope: compare(*(view(scope[name]) for name in names))
    return OTHERS[word](text, names)


def _constant(text: str, _: Any) -> Any:
    literal = text.split()[1]
    if literal in ("true", "false"):
        return lambda scope: np.bool_(literal == "true")
    dtype, shape = kind_of(text.split(" : ")[1])
    literal = literal.removeprefix("dense<").removesuffix(">")
    if literal in ("true", "false"):
        value = np.full(shape, literal == "true")
    elif literal.startswith("0x"):
        bits = np.array(int(literal, 16), f"u{dtype.itemsize}").view(dtype)
        value = np.full(shape, bits)
    else:
        value = np.full(shape, int(literal), dtype)
    return lambda scope: value[()]


def _result(text: str) -> str:
    return text.rsplit(" -> ", 1)[1]


def _shape(text: str) -> tuple[int, ...]:
    """The shape of a result, which may be of pointers."""
    match = re.match(r"tensor<((?:\d+x)*)", _result(text))
    return tuple(int(size) for size in match[1].split("x")[:-1]) if match else ()


def _reshaping(function: Callable[[Any, tuple[int, ...]], Any]) -> Any:
    def make(text: str, names: list[str]) -> Any:
        shape = _shape(text)

        def compute(scope: dict[str, Any]) -> Any:
            x = scope[names[0]]
            if isinstance(x, Pointer):
                return Pointer(x.array, function(x.offsets, shape))
            return function(np.asarray(x), shape)

        return compute

    return make


def _load(text: str, names: list[str]) -> Any:
    def compute(scope: dict[str, Any]) -> Any:
        pointer, *masked = (scope[name] for name in names)
        offsets = np.asarray(pointer.offsets)
        mask = np.broadcast_to(masked[0] if masked else True, offsets.shape)
        _check(pointer, mask)
        # What is masked and has no other value may be anything.
        found = pointer.array[np.where(mask, offsets, 0)]
        other = masked[1] if len(masked) > 1 else np.full_like(found, 99)
        return np.where(mask, found, other).astype(found.dtype)[()]

    return compute


def _store(text: str, names: list[str]) -> Any:
    def compute(scope: dict[str, Any]) -> None:
        pointer, value, *masked = (scope[name] for name in names)
        offsets = np.asarray(pointer.offsets)
        mask = np.broadcast_to(masked[0] if masked else True, offsets.shape)
        _check(pointer, mask)
        value = np.broadcast_to(value, offsets.shape)
        assert value.dtype == pointer.array.dtype, (value.dtype, pointer.array.dtype)
        pointer.array[offsets[mask]] = value[mask]

    return compute


def _check(pointer: Pointer, mask: Any) -> None:
    at = np.asarray(pointer.offsets)[mask]
    if at.size and (at.min() < 0 or at.max() >= pointer.array.size):
        raise IndexError(f"element {at.min()} to {at.max()} of {pointer.array.size}")


def _atomic_add(text: str, names: list[str]) -> Any:
    assert " add, acq_rel, gpu, " in text

    def compute(scope: dict[str, Any]) -> Any:
        pointer, value = (scope[name] for name in names)
        _check(pointer, np.bool_(True))
        before = pointer.array[pointer.offsets]
        pointer.array[pointer.offsets] = before + value
        return before

    return compute


def _dot(text: str, names: list[str]) -> Any:
    def compute(scope: dict[str, Any]) -> Any:
        a, b, start = (np.asarray(scope[name], np.float64) for name in names)
        return (a @ b + start).astype(np.float32)

    assert "inputPrecision = ieee" in text
    return compute


def _make_range(text: str, _: Any) -> Any:
    match = re.search(r"end = (\d+) : i32, start = (\d+)", text)
    assert match is not None
    value = np.arange(int(match[2]), int(match[1]), dtype=np.int32)
    return lambda scope: value


def _transpose(text: str, names: list[str]) -> Any:
    match = re.search(r"array<i32: ([\d, ]+)>", text)
    assert match is not None
    order = [int(axis) for axis in match[1].split(",")]
    return lambda scope: np.transpose(scope[names[0]], order)


def _program(text: str, _: Any) -> Any:
    axis = "xyz".index(text.split()[1])
    return lambda scope: np.int32(scope["program"][axis])


def _moved(scope: dict[str, Any], pointer: str, by: str) -> Pointer:
    array, offsets = scope[pointer]
    return Pointer(array, np.asarray(offsets + np.asarray(scope[by], np.int64)))


def _called(text: str, names: list[str]) -> Any:
    match = re.search(r'symbol = "(\w+)"', text)
    assert match is not None
    function = FUNCTIONS[match[1]]
    return lambda scope: function(scope[names[0]])


def _bitcast(text: str, names: list[str]) -> Any:
    dtype, _ = kind_of(_result(text))
    return lambda scope: np.asarray(scope[names[0]]).view(dtype)[()]


OTHERS: dict[str, Callable[[str, list[str]], Any]] = {
    "arith.constant": _constant,
    "arith.select": lambda _, n: lambda scope: np.where(*(scope[name] for name in n[:3])),
    "gpu.barrier": lambda *_: lambda scope: None,
    "tt.addptr": lambda _, n: lambda scope: _moved(scope, *n),
    "tt.atomic_rmw": _atomic_add,
    "tt.bitcast": _bitcast,
    "tt.broadcast": _reshaping(np.broadcast_to),
    "tt.dot": _dot,
    "tt.expand_dims": _reshaping(np.reshape),
    "tt.extern_elementwise": _called,
    "tt.get_program_id": _program,
    "tt.load": _load,
    "tt.make_range": _make_range,
    "tt.reshape": _reshaping(np.reshape),
    "tt.splat": _reshaping(np.broadcast_to),
    "tt.store": _store,
    "tt.trans": _transpose,
}
