"""Rules of memory: where an element of an array lies, loads, stores, atomic additions, barriers."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.own_triton._jax_internals import NDIndexer, Slice
from pallas_kernels.own_triton._rules import Equation, Translator, rule
from pallas_kernels.own_triton.arithmetic import cast
from pallas_kernels.own_triton.tiles import count
from pallas_kernels.own_triton.writer import Ref, Value, memory_element_of, type_of


@rule("masked_load")
def _masked_load(at: Translator, equation: Equation) -> Value:
    for name in ("eviction_policy", "cache_modifier", "is_volatile"):
        if equation.params[name]:
            raise NotImplementedError(f"own Triton lowering: {name} of a load")
    tree = equation.params["args_tree"]
    ref, transforms, mask, other = jax.tree.unflatten(tree, equation.inputs)
    if other is not None:
        other = _in_memory(at, other, jax.tree.unflatten(tree, equation.avals)[3], ref)
    return load(at, ref, _indices(ref, transforms), mask, other, equation.out_avals[0])


@rule("get")
def _get(at: Translator, equation: Equation) -> Value:
    ref, *flat = equation.inputs
    transforms = jax.tree.unflatten(equation.params["tree"], flat)
    return load(at, ref, _indices(ref, transforms), None, None, equation.out_avals[0])


@rule("masked_swap")
def _masked_swap(at: Translator, equation: Equation) -> Value | None:
    if equation.params["eviction_policy"]:
        raise NotImplementedError("own Triton lowering: eviction_policy of a store")
    tree = equation.params["args_tree"]
    ref, transforms, value, mask = jax.tree.unflatten(tree, equation.inputs)
    value = _in_memory(at, value, jax.tree.unflatten(tree, equation.avals)[2], ref)
    return _swap(at, equation, ref, transforms, value, mask)


@rule("swap")
def _plain_swap(at: Translator, equation: Equation) -> Value | None:
    ref, value, *flat = equation.inputs
    transforms = jax.tree.unflatten(equation.params["tree"], flat)
    value = _in_memory(at, value, equation.avals[1], ref)
    return _swap(at, equation, ref, transforms, value, None)


def _swap(
    at: Translator, equation: Equation, ref: Ref, transforms: Any, value: Value, mask: Any
) -> Value | None:
    """Store; and load what was there before, if anything reads it."""
    [aval] = equation.out_avals
    indices = _indices(ref, transforms)
    before = load(at, ref, indices, mask, value, aval) if equation.used[0] else None
    address = pointer(at, ref, indices, aval.shape)
    operands = [address.name, at.writer.broadcast(value, aval.shape).name]
    if mask is not None:
        operands.append(at.writer.broadcast(mask, aval.shape).name)
    at.writer.line(f"tt.store {', '.join(operands)} : {address.type}")
    return before


@rule("own_atomic_add")
def _atomic_add(at: Translator, equation: Equation) -> Value:
    ref, *indices, value = equation.inputs
    address = pointer(at, ref, indices, ())
    return at.writer.make(
        f"tt.atomic_rmw add, acq_rel, gpu, {address.name}, {value.name} : "
        f"({address.type}, {value.type}) -> {value.type}",
        value.element,
    )


@rule("own_barrier")
def _barrier(at: Translator, equation: Equation) -> list[Value]:
    del equation
    at.writer.line("gpu.barrier")
    return []


@rule("program_id")
def _program_id(at: Translator, equation: Equation) -> Value:
    return at.program_id(equation.params["axis"])


def load(
    at: Translator,
    ref: Ref,
    indices: Sequence[Any],
    mask: Value | None,
    other: Value | None,
    aval: Any,
) -> Value:
    """Load a part of an array.

    Args:
        at: what writes.
        ref: the array.
        indices: see `pointer`.
        mask: of what is loaded; None for all.
        other: what the rest is, as it lies in memory; None if that does not matter.
        aval: shape and dtype of what is loaded.
    """
    address = pointer(at, ref, indices, aval.shape)
    operands = [address.name]
    if mask is not None:
        operands.append(at.writer.broadcast(mask, aval.shape).name)
        if other is not None:
            operands.append(at.writer.broadcast(other, aval.shape).name)
    loaded = at.writer.make(
        f"tt.load {', '.join(operands)} : {address.type}", memory_element_of(ref.dtype), aval.shape
    )
    if ref.dtype != jnp.bool_:
        return loaded
    return cast(at, loaded, jnp.int8, jnp.bool_)


def pointer(at: Translator, ref: Ref, indices: Sequence[Any], shape: tuple[int, ...]) -> Value:
    """Point at elements of an array.

    Args:
        at: what writes.
        ref: the array.
        indices: of each axis a `Slice`, a scalar, or a tensor; all tensors have one rank.
        shape: of what is pointed at: first the tensors' axes, then one for each slice.
    """
    # An offset counts elements: 64 bits where 32 cannot hold the last one's.
    wide = math.prod(ref.shape) > 2**31 - 1
    slices = sum(isinstance(index, Slice) for index in indices)
    axis = len(shape) - slices
    scalars: list[Value] = []
    tensors: list[Value] = []
    for number, index in enumerate(indices):
        stride = math.prod(ref.shape[number + 1 :])
        if isinstance(index, Slice):
            parts = _of_slice(at, index, axis, len(shape))
            axis += 1
        else:
            value = index if isinstance(index, Value) else at.writer.constant(index, jnp.int32)
            for _ in range(slices if value.shape else 0):
                value = at.writer.expand(value, len(value.shape))
            parts = [(value, 1)]
        for value, step in parts:
            scaled = _scaled(at, value, stride * step, wide)
            (tensors if scaled.shape else scalars).append(scaled)
    address = ref.pointer
    if scalars:
        address = _moved(at, address, _sum(at, scalars))
    address = at.writer.broadcast(address, shape)
    if tensors:
        tensors = [at.writer.broadcast(tensor, shape) for tensor in tensors]
        address = _moved(at, address, _sum(at, tensors))
    return address


def _indices(ref: Ref, transforms: Sequence[Any]) -> Sequence[Any]:
    """Find the index of each axis, from Pallas' way to name a part of a ref."""
    if not transforms:
        return [Slice(0, size, 1) for size in ref.shape]
    if len(transforms) > 1 or not isinstance(transforms[0], NDIndexer):
        raise NotImplementedError(f"own Triton lowering: a ref under {transforms}")
    return list(transforms[0].indices)


def _of_slice(at: Translator, index: Any, axis: int, rank: int) -> list[tuple[Value, int]]:
    """Find a slice's places along its axis: terms with a factor each."""
    whole = isinstance(index.start, int) and index.stride == 1
    places = count(at, index.start if whole else 0, int(index.size))
    for other in range(rank):
        if other != axis:
            places = at.writer.expand(places, min(other, len(places.shape)))
    if whole:
        return [(places, 1)]
    start = index.start
    if not isinstance(start, Value):
        start = at.writer.constant(start, jnp.int32)
    return [(places, index.stride), (start, 1)]


def _scaled(at: Translator, value: Value, factor: int, wide: bool) -> Value:
    if wide and value.element != "i64":
        value = at.writer.unary("arith.extsi", value, "i64")
    if factor == 1:
        return value
    return at.writer.binary(
        "arith.muli", value, at.writer.constant(factor, value.element, value.shape)
    )


def _sum(at: Translator, values: Sequence[Value]) -> Value:
    total = values[0]
    for value in values[1:]:
        total = at.writer.binary("arith.addi", total, value)
    return total


def _moved(at: Translator, address: Value, offset: Value) -> Value:
    return at.writer.make(
        f"tt.addptr {address.name}, {offset.name} : {address.type}, "
        f"{type_of(offset.element, offset.shape)}",
        address.element,
        address.shape,
    )


def _in_memory(at: Translator, value: Value, aval: Any, ref: Ref) -> Value:
    """Convert a value to what lies in an array's memory."""
    value = cast(at, value, aval.dtype, ref.dtype)
    return cast(at, value, jnp.bool_, jnp.int8) if ref.dtype == jnp.bool_ else value
