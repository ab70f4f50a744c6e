"""Rules that move a tile's elements or join them: shapes, sums, scans, matrix products."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.own_triton._rules import Equation, Translator, rule
from pallas_kernels.own_triton.arithmetic import cast, operation
from pallas_kernels.own_triton.writer import Value, element_of, type_of


@rule("broadcast_to")
def _broadcast(at: Translator, equation: Equation) -> Value:
    return at.writer.broadcast(equation.inputs[0], equation.out_avals[0].shape)


@rule("broadcast_in_dim")
def _broadcast_in_dim(at: Translator, equation: Equation) -> Value:
    x = equation.inputs[0]
    shape = equation.out_avals[0].shape
    if x.shape:
        for axis in range(len(shape)):
            if axis not in equation.params["broadcast_dimensions"]:
                x = at.writer.expand(x, axis)
    return at.writer.broadcast(x, shape)


@rule("reshape", "squeeze")
def _reshape(at: Translator, equation: Equation) -> Value:
    x = equation.inputs[0]
    return reshape(at, x, equation.avals[0], equation.out_avals[0].shape)


def reshape(at: Translator, x: Value, aval: Any, shape: tuple[int, ...]) -> Value:
    """Give a tensor, or a scalar, another shape; its elements keep their order."""
    if not x.shape:
        return at.writer.broadcast(x, shape)
    if not shape:
        # Triton's reshape makes no scalar: the sum of one element does.
        for _ in x.shape:
            x = _reduce(at, x, 0, operation("add", aval))
        return x
    kind = type_of(x.element, shape)
    return at.writer.make(f"tt.reshape {x.name} : {x.type} -> {kind}", x.element, shape)


@rule("transpose")
def _transpose(at: Translator, equation: Equation) -> Value:
    return transpose(at, equation.inputs[0], equation.params["permutation"])


def transpose(at: Translator, x: Value, permutation: tuple[int, ...]) -> Value:
    """Put a tensor's axes in another order."""
    shape = tuple(x.shape[axis] for axis in permutation)
    order = ", ".join(map(str, permutation))
    return at.writer.make(
        f"tt.trans {x.name} {{order = array<i32: {order}>}} : {x.type} -> "
        f"{type_of(x.element, shape)}",
        x.element,
        shape,
    )


@rule("iota")
def _iota(at: Translator, equation: Equation) -> Value:
    shape, dimension = equation.params["shape"], equation.params["dimension"]
    x = count(at, 0, shape[dimension])
    x = cast(at, x, jnp.int32, equation.params["dtype"])
    for axis in range(len(shape)):
        if axis != dimension:
            x = at.writer.expand(x, axis)
    return at.writer.broadcast(x, shape)


def count(at: Translator, first: int, size: int) -> Value:
    """Make the int32 numbers from `first` on, `size` of them."""
    return at.writer.make(
        f"tt.make_range {{end = {first + size} : i32, start = {first} : i32}} : "
        f"{type_of('i32', (size,))}",
        "i32",
        (size,),
    )


def _join(at: Translator, kind: str, attributes: str, x: Value, shape: Any, joined: str) -> Value:
    """Write an operation with a region that joins two elements into one."""
    value = Value(at.writer.name(), x.element, shape)
    left, right, both = (Value(at.writer.name(), x.element) for _ in range(3))
    at.writer.line(f'{value.name} = "{kind}"({x.name}) <{{{attributes}}}> ({{')
    at.writer.line(f"^bb0({left.name}: {x.element}, {right.name}: {x.element}):")
    with at.writer.block():
        at.writer.line(f"{both.name} = {joined} {left.name}, {right.name} : {x.element}")
        at.writer.line(f"{kind}.return {both.name} : {x.element}")
    at.writer.line(f"}}) : ({x.type}) -> {value.type}")
    return value


def _reduce(at: Translator, x: Value, axis: int, joined: str) -> Value:
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return _join(at, "tt.reduce", f"axis = {axis} : i32", x, shape, joined)


def _reduction(name: str) -> Any:
    def lower(at: Translator, equation: Equation) -> Value:
        [x], [aval] = equation.inputs, equation.avals
        axes = equation.params["axes"]
        if len(axes) > 1 and len(axes) == len(x.shape):
            # All axes: of a vector that holds the same, in one go.
            x, axes = reshape(at, x, aval, (aval.size,)), (0,)
        for axis in sorted(axes, reverse=True):
            x = _reduce(at, x, axis, operation(name, aval))
        return x

    return lower


for _name, _joined in (("reduce_sum", "add"), ("reduce_max", "max"), ("reduce_min", "min")):
    rule(_name)(_reduction(_joined))


@rule("cumsum")
def _cumsum(at: Translator, equation: Equation) -> Value:
    [x], [aval] = equation.inputs, equation.avals
    if equation.params["reverse"]:
        raise NotImplementedError("own Triton lowering: cumsum from the end")
    attributes = f"axis = {equation.params['axis']} : i32, reverse = false"
    return _join(at, "tt.scan", attributes, x, x.shape, operation("add", aval))


@rule("dot_general")
def _dot(at: Translator, equation: Equation) -> Value:
    (a, b), [out] = equation.inputs, equation.out_avals
    (of_a, of_b), batch = equation.params["dimension_numbers"]
    ranks = len(a.shape), len(b.shape)
    if ranks != (2, 2) or len(of_a) != 1 or any(batch) or out.dtype != jnp.float32:
        raise NotImplementedError("own Triton lowering: a product other than of matrices, float32")
    if tuple(of_a) == (0,):
        a = transpose(at, a, (1, 0))
    if tuple(of_b) == (1,):
        b = transpose(at, b, (1, 0))
    exact = equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    # Of float32 alone it matters: "ieee" keeps all bits.
    precision = "ieee" if exact or equation.avals[0].dtype != jnp.float32 else "tf32"
    zero = at.writer.constant(0.0, jnp.float32, out.shape)
    return at.writer.make(
        f"tt.dot {a.name}, {b.name}, {zero.name}, inputPrecision = {precision} : "
        f"{a.type} * {b.type} -> {zero.type}",
        element_of(out.dtype),
        out.shape,
    )
