"""A step of one sequence, compiled for an H200 that is described: as one row and as two.

    python -m tests.support.described_rows

prints for each format of weights how many kernels XLA launches a layer, in both. See
`described_gpu`, and `wavejax.engine.two_rows`.
"""

import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.joined import GATES, QUERIES, JoinedMatrices, key_of
from models.parameters import nest, parameter_shapes
from models.quantised import QuantisedMatrix
from tests.support.described_gpu import compiled
from wavejax import DenseAttention, Generator
from wavejax.engine import two_rows
from wavejax.engine.compiled import feed
from wavejax.engine.slots import allocate

FORMATS = ("bfloat16", "int8")
SIZES = 4096, 14336  # hidden, mlp: of Llama-3-8B


def _of(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _matrix(out: int, inputs: int, name: str) -> Any:
    if name == "bfloat16":
        return _of(out, inputs)
    levels, scales = _of(out, inputs, dtype=jnp.int8), _of(out, 1, dtype=jnp.float32)
    return QuantisedMatrix(levels, scales, columns=inputs, dtype=jnp.bfloat16)


def _params(model: ModelConfig, name: str) -> Any:
    """Shapes of the parameters as a GPU has them: layers of their own, matrices joined."""
    shapes = nest({path: _of(*shape) for path, shape in parameter_shapes(model).items()})
    layer = {key: _of(*x.shape[1:]) for key, x in shapes["layers"].items()}
    for names in (QUERIES, GATES):
        rows = tuple(layer.pop(one).shape[0] for one in names)
        layer[key_of(names)] = JoinedMatrices(_matrix(sum(rows), SIZES[0], name), names, rows)
    for one in ("output", "down"):
        layer[one] = _matrix(*layer[one].shape, name)
    return {"params": shapes | {"layers": (layer,) * model.num_layers}}


def _launches(layers: int, name: str) -> int:
    """Count the kernels that XLA launches in a step of so many layers."""
    hidden, mlp = SIZES
    model = ModelConfig("llama", 512, layers, hidden, mlp, 32, 8, 128, 10**4)
    engine = Generator(model, DenseAttention(), unroll=True).engine
    state = allocate(engine, 1, 64, 64, jnp.bfloat16, [])
    state = jax.tree.map(lambda x: _of(*x.shape, dtype=x.dtype), state)
    given = _params(model, name), state, _of(1, dtype=jnp.int32)
    program = compiled(lambda params, state, tokens: feed(engine, params, state, tokens), *given)
    text = program.hlo_modules()[0].to_string()
    entry = text[text.index("\nENTRY") :]
    return len(re.findall(r" (?:fusion|custom-call|reduce|copy|dot)\(", entry))


def main() -> None:
    """Compile two and four layers of each, as one row and as two."""
    for name in FORMATS:
        counts = []
        for both in (False, True):
            with mock.patch.object(two_rows, "takes_two", return_value=both):
                counts.append((_launches(4, name) - _launches(2, name)) / 2)
        print(name, *counts, flush=True)


if __name__ == "__main__":
    main()
