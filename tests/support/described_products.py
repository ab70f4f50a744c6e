"""Products with quantised matrices, compiled for an H200 that is described; see `described_gpu`.

    python -m tests.support.described_products

prints each product that keeps no floats of the matrix in memory.
"""

import jax
import jax.numpy as jnp

from models.quantised import QuantisedMatrix, multiply
from pallas_kernels import use_implementation
from tests.support.described_gpu import compiled

OUT, IN = 4096, 2048
BLOCKS, GROUPS = IN // 256, IN // 32


def _of(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def matrices():
    """Shapes of a matrix in each format."""
    halves = _of(OUT, IN // 2, dtype=jnp.uint8)
    small, factors = _of(OUT, GROUPS, dtype=jnp.int8), _of(OUT, BLOCKS, dtype=jnp.float16)
    levels, scales = _of(OUT, IN, dtype=jnp.int8), _of(OUT, 1, dtype=jnp.float32)
    keywords = {"columns": IN, "dtype": jnp.bfloat16}
    return {
        "int8": QuantisedMatrix(levels, scales, **keywords),
        "int4": QuantisedMatrix(halves, _of(OUT, GROUPS, dtype=jnp.bfloat16), **keywords),
        "Q4_K": QuantisedMatrix(halves, small, factors, small, factors, **keywords),
    }


# By implementation and format, tokens that are multiplied at once. In groups, without the kernel
# more are known to write the floats.
TOKENS = {
    "xla": {"int8": (1, 4, 32), "int4": (1, 2, 3, 4), "Q4_K": (1, 2, 3, 4)},
    "triton": {"int4": (1, 4, 8, 16, 32), "Q4_K": (1, 4, 8, 16, 32)},
}
PRODUCTS = {
    f"{name}-{n}-{implementation}": (name, n, implementation)
    for implementation, formats in TOKENS.items()
    for name, of in formats.items()
    for n in of
}


def main() -> None:
    """Compile all, and print those that keep no floats."""
    of_format = matrices()
    for product, (name, tokens, implementation) in PRODUCTS.items():
        inputs = _of(tokens, 1, IN, dtype=jnp.bfloat16)
        with use_implementation(implementation):
            program = compiled(lambda x, m: multiply(x, m), inputs, of_format[name])
        if program.get_compiled_memory_stats().temp_size_in_bytes < OUT * IN / 2:
            print(product, flush=True)


if __name__ == "__main__":
    main()
