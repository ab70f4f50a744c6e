"""Rules of arithmetic: each works on elements one by one."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.own_triton._rules import (
    Equation,
    Translator,
    broadcast_inputs,
    is_float,
    is_signed,
    rule,
)
from pallas_kernels.own_triton.writer import Value, element_of

# Operations on floats, on integers with a sign, and on integers without. Of two floats `max` and
# `min` return the one that is a number, as with JAX's own lowering: kernels count on it.
_BINARY = {
    "add": ("arith.addf", "arith.addi", "arith.addi"),
    "sub": ("arith.subf", "arith.subi", "arith.subi"),
    "mul": ("arith.mulf", "arith.muli", "arith.muli"),
    "div": ("arith.divf", "arith.divsi", "arith.divui"),
    "rem": ("arith.remf", "arith.remsi", "arith.remui"),
    "max": ("arith.maxnumf", "arith.maxsi", "arith.maxui"),
    "min": ("arith.minnumf", "arith.minsi", "arith.minui"),
    "and": (None, "arith.andi", "arith.andi"),
    "or": (None, "arith.ori", "arith.ori"),
    "xor": (None, "arith.xori", "arith.xori"),
    "shift_left": (None, "arith.shli", "arith.shli"),
    "shift_right_logical": (None, "arith.shrui", "arith.shrui"),
    "shift_right_arithmetic": (None, "arith.shrsi", "arith.shrsi"),
}

# Comparisons of floats, integers with a sign, and integers without. Nothing equals NaN.
_COMPARISONS = {
    "eq": ("oeq", "eq", "eq"),
    "ne": ("une", "ne", "ne"),
    "lt": ("olt", "slt", "ult"),
    "le": ("ole", "sle", "ule"),
    "gt": ("ogt", "sgt", "ugt"),
    "ge": ("oge", "sge", "uge"),
}

# Functions of float32 in CUDA's and AMD's libraries of device code.
_FUNCTIONS = {
    "abs": ("__nv_fabsf", "__ocml_fabs_f32"),
    "ceil": ("__nv_ceilf", "__ocml_ceil_f32"),
    "exp": ("__nv_expf", "__ocml_exp_f32"),
    "exp2": ("__nv_exp2f", "__ocml_exp2_f32"),
    "floor": ("__nv_floorf", "__ocml_floor_f32"),
    "log": ("__nv_logf", "__ocml_log_f32"),
    "log2": ("__nv_log2f", "__ocml_log2_f32"),
    "sqrt": ("__nv_sqrtf", "__ocml_sqrt_f32"),
}


def operation(name: str, aval: Any) -> str:
    """Return the operation that a primitive is on two numbers.

    Raises:
        NotImplementedError: it is none on such numbers.
    """
    of_floats, signed, unsigned = _BINARY[name]
    found = of_floats if is_float(aval) else signed if is_signed(aval) else unsigned
    if found is None:
        raise NotImplementedError(f"own Triton lowering: {name} of {aval.dtype}")
    return found


def _binary(name: str) -> Any:
    def lower(at: Translator, equation: Equation) -> Value:
        x, y = broadcast_inputs(at, equation)
        return at.writer.binary(operation(name, equation.avals[0]), x, y)

    return lower


def _comparison(name: str) -> Any:
    def lower(at: Translator, equation: Equation) -> Value:
        x, y = broadcast_inputs(at, equation)
        aval = equation.avals[0]
        of_floats, signed, unsigned = _COMPARISONS[name]
        if is_float(aval):
            return at.writer.binary(f"arith.cmpf {of_floats},", x, y, "i1")
        predicate = signed if is_signed(aval) else unsigned
        return at.writer.binary(f"arith.cmpi {predicate},", x, y, "i1")

    return lower


def _function(name: str) -> Any:
    def lower(at: Translator, equation: Equation) -> Value:
        [aval], [x] = equation.avals, equation.inputs
        if aval.dtype != jnp.float32:
            raise NotImplementedError(f"own Triton lowering: {name} of {aval.dtype}")
        of_cuda, of_rocm = _FUNCTIONS[name]
        symbol = of_rocm if at.writer.platform == "rocm" else of_cuda
        return at.writer.make(
            f'tt.extern_elementwise {x.name} {{libname = "", libpath = "", pure = true, '
            f'symbol = "{symbol}"}} : ({x.type}) -> {x.type}',
            x.element,
            x.shape,
        )

    return lower


for _name in _BINARY:
    rule(_name)(_binary(_name))
for _name in _COMPARISONS:
    rule(_name)(_comparison(_name))
for _name in _FUNCTIONS:
    rule(_name)(_function(_name))


@rule("neg")
def _negate(at: Translator, equation: Equation) -> Value:
    [aval], [x] = equation.avals, equation.inputs
    # As in JAX's backend the negative of 0.0 is 0.0, so that both routes have the same bits.
    zero = at.writer.constant(0, aval.dtype, x.shape)
    return at.writer.binary(operation("sub", aval), zero, x)


@rule("not")
def _invert(at: Translator, equation: Equation) -> Value:
    [aval], [x] = equation.avals, equation.inputs
    ones = at.writer.constant(1 if aval.dtype == jnp.bool_ else -1, aval.dtype, x.shape)
    return at.writer.binary("arith.xori", x, ones)


@rule("sign")
def _sign(at: Translator, equation: Equation) -> Value:
    [aval], [x] = equation.avals, equation.inputs
    if not is_signed(aval):
        raise NotImplementedError(f"own Triton lowering: sign of {aval.dtype}")
    zero = at.writer.constant(0, aval.dtype, x.shape)
    above, below = (
        at.writer.unary(
            "arith.extui", at.writer.binary(f"arith.cmpi {p},", x, zero, "i1"), zero.element
        )
        for p in ("sgt", "slt")
    )
    return at.writer.binary("arith.subi", above, below)


@rule("integer_pow")
def _power(at: Translator, equation: Equation) -> Value:
    [aval], [x] = equation.avals, equation.inputs
    power = equation.params["y"]
    if power < 1:
        raise NotImplementedError(f"own Triton lowering: power {power}")
    found = x
    for _ in range(power - 1):
        found = at.writer.binary(operation("mul", aval), found, x)
    return found


@rule("square")
def _square(at: Translator, equation: Equation) -> Value:
    [aval], [x] = equation.avals, equation.inputs
    return at.writer.binary(operation("mul", aval), x, x)


@rule("select_n")
def _select(at: Translator, equation: Equation) -> Value:
    if len(equation.inputs) != 3 or equation.avals[0].dtype != jnp.bool_:
        raise NotImplementedError("own Triton lowering: select_n by other than a bool")
    which, if_false, if_true = broadcast_inputs(at, equation)
    return at.writer.make(
        f"arith.select {which.name}, {if_true.name}, {if_false.name} : {which.type}, "
        f"{if_true.type}",
        if_true.element,
        if_true.shape,
    )


@rule("convert_element_type")
def _convert(at: Translator, equation: Equation) -> Value:
    [x] = equation.inputs
    return cast(at, x, equation.avals[0].dtype, equation.params["new_dtype"])


@rule("bitcast_convert_type")
def _bitcast(at: Translator, equation: Equation) -> Value:
    [x] = equation.inputs
    element = element_of(equation.params["new_dtype"])
    if element == x.element:
        return x
    if equation.avals[0].dtype.itemsize != equation.out_avals[0].dtype.itemsize:
        raise NotImplementedError("own Triton lowering: a bit cast to another width")
    result = Value("", element, x.shape)
    return at.writer.make(f"tt.bitcast {x.name} : {x.type} -> {result.type}", element, x.shape)


@rule("own_inline_assembly")
def _assembly(at: Translator, equation: Equation) -> Value:
    text = "".join(
        c if c.isprintable() and c.isascii() and c not in '"\\' else f"\\{ord(c):02X}"
        for c in equation.params["text"]
    )
    [out] = equation.out_avals
    result = Value("", element_of(out.dtype), out.shape)
    names = ", ".join(value.name for value in equation.inputs)
    types = ", ".join(value.type for value in equation.inputs)
    return at.writer.make(
        f'tt.elementwise_inline_asm "{text}" {{constraints = '
        f'"{equation.params["constraints"]}", packed_element = {equation.params["pack"]} : i32, '
        f"pure = true}} "
        f"{names} : {types} -> {result.type}",
        result.element,
        result.shape,
    )


def cast(at: Translator, x: Value, old: Any, new: Any) -> Value:
    """Convert numbers as JAX does on GPUs: a float past what an integer holds becomes the end.

    Args:
        at: what writes.
        x: the numbers.
        old, new: their dtype, before and after.
    """
    old, new = jnp.dtype(old), jnp.dtype(new)
    if old == new:
        return x
    floats = [bool(jnp.issubdtype(dtype, jnp.floating)) for dtype in (old, new)]
    signed = [bool(jnp.issubdtype(dtype, jnp.signedinteger)) for dtype in (old, new)]
    element = element_of(new)
    if floats[0] and old.itemsize == 2 and new != jnp.float32:
        return cast(at, at.writer.unary("arith.extf", x, "f32"), jnp.float32, new)
    if floats == [True, True]:
        return at.writer.unary(
            "arith.truncf" if old.itemsize > new.itemsize else "arith.extf", x, element
        )
    if new == jnp.bool_:
        zero = at.writer.constant(0, old, x.shape)
        compare = "arith.cmpf une," if floats[0] else "arith.cmpi ne,"
        return at.writer.binary(compare, x, zero, "i1")
    if floats[0]:
        ends = jnp.iinfo(new)
        for bound, end in (("arith.minimumf", ends.max), ("arith.maximumf", ends.min)):
            x = at.writer.binary(bound, x, at.writer.constant(end, old, x.shape))
        return at.writer.unary("arith.fptosi" if signed[1] else "arith.fptoui", x, element)
    if floats[1]:
        return at.writer.unary("arith.sitofp" if signed[0] else "arith.uitofp", x, element)
    if element == x.element:
        return x
    if old != jnp.bool_ and old.itemsize > new.itemsize:
        return at.writer.unary("arith.trunci", x, element)
    return at.writer.unary("arith.extsi" if signed[0] else "arith.extui", x, element)
