"""A piece of appended tokens by `attend_appended`, compiled for an H200 that is described.

    python -m tests.support.described_piece

prints "piece" when it is compiled; `XLA_FLAGS=--xla_dump_to=FOLDER --xla_dump_hlo_as_text` has XLA
write its list of launches. See `described_gpu`.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.parameters import nest, parameter_shapes
from pallas_kernels import dispatch
from tests.support.described_gpu import compiled
from tests.support.described_steps import kernels_or_plain
from wavejax import WaveAttention, WaveConfig
from wavejax.attention import appended
from wavejax.engine import appending
from wavejax.store.shape import CacheShape

# SmolLM2's shape, but for its layers and its vocabulary.
LAYERS = 4
MODEL = ModelConfig("llama", 4900, LAYERS, 576, 1536, 9, 3, 64, 10**6)
TOKENS, ROOM = 128, 32_768


def main() -> None:
    """Compile the piece."""

    def of(*shape: int, dtype: object = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    params = nest({path: of(*shape) for path, shape in parameter_shapes(MODEL).items()})
    one = jax.tree.map(lambda x: of(*x.shape[1:]), params["layers"])
    params = {"params": params | {"layers": (one,) * LAYERS}}
    attention = WaveAttention(WaveConfig(), "device")
    shape = CacheShape.of(MODEL)
    state = jax.eval_shape(lambda: attention.init_state(shape, 1, ROOM, 1024, jnp.bfloat16))
    number, tokens = of(dtype=jnp.int32), of(1, TOKENS, dtype=jnp.int32)
    logits = of(1, MODEL.vocab_size, dtype=jnp.float32)
    piece = functools.partial(appending._append_short.__wrapped__, MODEL, attention)
    with (
        mock.patch.object(dispatch, "call", kernels_or_plain),
        mock.patch.object(appended, "_reads_where_they_lie", return_value=True),
    ):
        compiled(piece, params, tokens, number, number, state, logits)
    print("piece")


if __name__ == "__main__":
    main()
