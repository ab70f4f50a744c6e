"""Triton's intermediate language as text: values with a type, and lines that make them.

The language is MLIR: https://mlir.llvm.org/docs/LangRef/ and
https://triton-lang.org/main/dialects/dialects.html.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

# Triton's integers have no sign: an operation has one.
_ELEMENTS = {
    "bool": "i1",
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "int8": "i8",
    "uint8": "i8",
    "int16": "i16",
    "uint16": "i16",
    "int32": "i32",
    "uint32": "i32",
    "int64": "i64",
    "uint64": "i64",
}


def element_of(dtype: Any) -> str:
    """Return Triton's name of a dtype.

    Raises:
        NotImplementedError: no kernel of ours has it.
    """
    name = jnp.dtype(dtype).name
    if name not in _ELEMENTS:
        raise NotImplementedError(f"own Triton lowering: dtype {name}")
    return _ELEMENTS[name]


def memory_element_of(dtype: Any) -> str:
    """Return Triton's name of a dtype as it lies in memory: a bool takes a byte."""
    element = element_of(dtype)
    return "i8" if element == "i1" else element


def type_of(element: str, shape: tuple[int, ...]) -> str:
    """Return the type of a tensor, or of a scalar where the shape is empty."""
    return f"tensor<{'x'.join([*map(str, shape), element])}>" if shape else element


@dataclasses.dataclass(frozen=True)
class Value:
    """What a line has made.

    Attributes:
        name: in the text.
        element: Triton's name of its elements' type.
        shape: of the tensor; empty for a scalar.
    """

    name: str
    element: str
    shape: tuple[int, ...] = ()

    @property
    def type(self) -> str:
        """Its type in the text."""
        return type_of(self.element, self.shape)


@dataclasses.dataclass(frozen=True)
class Ref:
    """An array in the GPU's memory, or in host memory that the GPU reads.

    Attributes:
        pointer: to its first element.
        shape, dtype: the array's.
    """

    pointer: Value
    shape: tuple[int, ...]
    dtype: Any


class Writer:
    """Writes lines, and gives each value that they make a name of its own."""

    def __init__(self, platform: str):
        """For a platform, by JAX's name of it: "cuda" or "rocm"."""
        self.platform = platform
        self._lines: list[str] = []
        self._depth = 0
        self._names = 0

    def text(self) -> str:
        """Return all lines."""
        return "\n".join(self._lines) + "\n"

    def line(self, text: str) -> None:
        """Write a line that makes no value."""
        self._lines.append("  " * self._depth + text)

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Indent what is written inside."""
        self._depth += 1
        yield
        self._depth -= 1

    def name(self) -> str:
        """Return a name that nothing has."""
        self._names += 1
        return f"%v{self._names}"

    def make(self, operation: str, element: str, shape: tuple[int, ...] = ()) -> Value:
        """Write an operation of one result.

        Args:
            operation: all that stands after the equals sign.
            element, shape: the result's.
        """
        value = Value(self.name(), element, shape)
        self.line(f"{value.name} = {operation}")
        return value

    def unary(self, operation: str, x: Value, element: str | None = None) -> Value:
        """Write an operation on one value's elements; a new element type makes it a cast."""
        result = Value("", element or x.element, x.shape)
        types = x.type if element is None else f"{x.type} to {result.type}"
        return self.make(f"{operation} {x.name} : {types}", result.element, x.shape)

    def binary(self, operation: str, x: Value, y: Value, element: str | None = None) -> Value:
        """Write an operation on two values of one type; `element` is the result's, if another."""
        if x.type != y.type:
            raise TypeError(f"own Triton lowering: {operation} of {x.type} and {y.type}")
        return self.make(
            f"{operation} {x.name}, {y.name} : {x.type}", element or x.element, x.shape
        )

    def constant(self, number: Any, dtype: Any, shape: tuple[int, ...] = ()) -> Value:
        """Write a number, or a tensor that holds one number everywhere.

        Args:
            number: Python's or NumPy's.
            dtype: its dtype, or the name of an element's type.
            shape: of the tensor.
        """
        element = dtype if isinstance(dtype, str) else element_of(dtype)
        literal = _literal(number, element)
        kind = type_of(element, shape)
        literal = f"dense<{literal}>" if shape else literal
        # MLIR reads a truth value's type off the value.
        typed = literal if kind == "i1" else f"{literal} : {kind}"
        return self.make(f"arith.constant {typed}", element, shape)

    def broadcast(self, x: Value, shape: tuple[int, ...]) -> Value:
        """Repeat a scalar, or the axes of length one, and put new axes in front."""
        if x.shape == shape:
            return x
        if not x.shape:
            kind = type_of(x.element, shape)
            return self.make(f"tt.splat {x.name} : {x.type} -> {kind}", x.element, shape)
        while len(x.shape) < len(shape):
            x = self.expand(x, 0)
        if x.shape == shape:
            return x
        kind = type_of(x.element, shape)
        return self.make(f"tt.broadcast {x.name} : {x.type} -> {kind}", x.element, shape)

    def expand(self, x: Value, axis: int) -> Value:
        """Put in an axis of length one."""
        shape = (*x.shape[:axis], 1, *x.shape[axis:])
        if not x.shape:
            return self.broadcast(x, shape)
        return self.make(
            f"tt.expand_dims {x.name} {{axis = {axis} : i32}} : {x.type} -> "
            f"{type_of(x.element, shape)}",
            x.element,
            shape,
        )


def _literal(number: Any, element: str) -> str:
    """Write a number as MLIR reads it without loss: a float by its bits."""
    if element == "i1":
        return "true" if number else "false"
    if element.startswith("i"):
        bits = int(element[1:])
        whole = int(number) % (1 << bits)
        return str(whole - (1 << bits) if whole >> (bits - 1) else whole)
    dtype = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}[element]
    made = np.asarray(number).astype(dtype)
    return f"0x{int.from_bytes(made.tobytes(), 'little'):0{made.itemsize * 2}X}"
