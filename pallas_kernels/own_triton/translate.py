"""A kernel, as Pallas traces it, to Triton's intermediate language."""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

# Imported for the rules that they register.
from pallas_kernels.own_triton import arithmetic, control, memory, tiles
from pallas_kernels.own_triton._jax_internals import core
from pallas_kernels.own_triton._rules import RULES, Equation
from pallas_kernels.own_triton.writer import Ref, Value, Writer, memory_element_of

assert all((arithmetic, control, memory, tiles))

# The most programs along the second and the third axis of a grid of CUDA's.
_MOST_PROGRAMS = 2**16 - 1
# XLA's arrays begin at multiples of more bytes than a GPU loads at once.
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel that is traced.

    Attributes:
        name: for profiles.
        jaxpr: of refs: of the operands, then of the results.
        grid: programs; the first axis runs fastest.
        num_warps, num_stages: see Triton.
        aliases: operands that are written in place, and which result each of them is.
    """

    name: str
    jaxpr: Any
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    aliases: tuple[tuple[int, int], ...] = ()

    @property
    def symbol(self) -> str:
        """The kernel's name, as a symbol of machine code may be."""
        symbol = re.sub(r"[^A-Za-z0-9_]", "_", self.name)
        return symbol if symbol[:1].isalpha() else f"kernel_{symbol}"

    @functools.cached_property
    def launch_grid(self) -> tuple[int, int, int]:
        """Programs along the GPU's three axes."""
        grid = (*self.grid, 1, 1, 1)
        fits = len(self.grid) <= 3 and max(grid[1:]) <= _MOST_PROGRAMS
        return (grid[0], grid[1], grid[2]) if fits else (math.prod(self.grid), 1, 1)

    def text(self, platform: str) -> str:
        """Translate it to Triton's intermediate language.

        Args:
            platform: "cuda" or "rocm".

        Raises:
            NotImplementedError: it holds what no kernel of ours held when this was written.
        """
        writer = Writer(platform)
        refs = [
            Ref(
                Value(f"%arg{number}", f"!tt.ptr<{memory_element_of(var.aval.dtype)}>"),
                var.aval.shape,
                var.aval.dtype,
            )
            for number, var in enumerate(self.jaxpr.invars)
        ]
        arguments = ", ".join(
            f"{ref.pointer.name}: {ref.pointer.type} {{tt.divisibility = {_ALIGNMENT} : i32}}"
            for ref in refs
        )
        writer.line("module {")
        with writer.block():
            writer.line(
                f"tt.func public @{self.symbol}({arguments}) attributes {{noinline = false}} {{"
            )
            with writer.block():
                _Translator(writer, self).translate(self.jaxpr, refs)
                writer.line("tt.return")
            writer.line("}")
        writer.line("}")
        return writer.text()


class _Translator:
    """Walks a kernel, and writes what the rules of its equations say."""

    def __init__(self, writer: Writer, kernel: Kernel):
        self.writer = writer
        self._kernel = kernel
        self._program_ids = self._find_programs()

    def program_id(self, axis: int) -> Value:
        """Return the program's number along an axis of the kernel's grid."""
        return self._program_ids[axis]

    def translate(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        """Write a jaxpr's equations; returns what its results are."""
        if getattr(jaxpr, "constvars", None):
            raise NotImplementedError("own Triton lowering: a kernel that closes over arrays")
        made = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            if not isinstance(atom, core.Literal):
                return made[atom]
            aval: Any = atom.aval
            return self.writer.constant(atom.val, aval.dtype, aval.shape)

        read_later = {
            var
            for equation in jaxpr.eqns
            for var in equation.invars
            if not isinstance(var, core.Literal)
        }
        read_later |= {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name not in RULES:
                raise NotImplementedError(
                    f"own Triton lowering: no rule for {name}, which {self._kernel.name} holds; "
                    "add one to pallas_kernels/own_triton"
                )
            found = RULES[name](
                self,
                Equation(
                    equation.params,
                    [read(atom) for atom in equation.invars],
                    [atom.aval for atom in equation.invars],
                    [var.aval for var in equation.outvars],
                    [var in read_later for var in equation.outvars],
                ),
            )
            results = found if equation.primitive.multiple_results else [found]
            made.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _find_programs(self) -> list[Value]:
        """Find the program's number along each axis of the kernel's grid."""
        writer, grid = self.writer, self._kernel.grid
        flat = self._kernel.launch_grid[: len(grid)] != grid
        found = []
        rest = writer.make("tt.get_program_id x : i32", "i32") if flat else None
        for axis, programs in enumerate(grid):
            if programs == 1:
                found.append(writer.constant(0, jnp.int32))
            elif rest is None:
                found.append(writer.make(f"tt.get_program_id {'xyz'[axis]} : i32", "i32"))
            else:
                size = writer.constant(programs, jnp.int32)
                found.append(writer.binary("arith.remui", rest, size))
                rest = writer.binary("arith.divui", rest, size)
        return found
