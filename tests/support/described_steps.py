"""Steps and prefills by settings, compiled for an H200 that is described; see `described_gpu`.

    python -m tests.support.described_steps NAME ...

prints each name when its programs are compiled.
"""

import sys
from unittest import mock

from pallas_kernels import dispatch
from tests.support.described_gpu import compiled
from tests.support.layer_programs import by_kernels, layer_programs
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.attention.protocol import AnyAttention


def _wave(store: str = "device", **settings: object) -> AnyAttention:
    return WaveAttention(WaveConfig(**settings), store)


# Each setting once, together with others: a step and a prefill take 40 s of a processor.
ATTENTIONS = {
    "wave": _wave(),
    "host": _wave(
        "host",
        row_dtype="int8",
        admission_ratio=16.0,
        audit=0.01,
        moment_rank=2,
        moment_dtype="int8",
    ),
    "device": _wave(tolerance=0.1, exact_fallback=True, reach=2.0, moment_rank=1, bounds=True),
    "pooled": _wave(pooled_covariance=True),
    "full-int8": DenseAttention(row_dtype="int8"),
}
ON_THE_HOST = {"host"}


def kernels_or_plain(op, implementation, implementations, *operands, on_hopper=None, **settings):
    """What `dispatch.call` does on a GPU: a kernel, or plain JAX for what it does not know."""
    try:
        return by_kernels(op, implementation, implementations, *operands, **settings)
    except NotImplementedError:
        return implementations["xla"](*operands, **settings)


def main(names: list[str]) -> None:
    """Compile the programs of these names, or of all."""
    with mock.patch.object(dispatch, "call", kernels_or_plain):
        for name in names or ATTENTIONS:
            for function, operands in layer_programs(ATTENTIONS[name], 9000).values():
                [program] = compiled(function, *operands).hlo_modules()
                # XLA's number of host memory.
                assert ("S(5)" in program.to_string()) == (name in ON_THE_HOST), name
            print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
