"""How the kernels of `select_tokens` cut their work into programs."""

import dataclasses

from pallas_kernels.select_tokens._contenders import most_expected
from pallas_kernels.toolbox import launch


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        sample: candidates whose masses set the threshold.
        chunk: candidates that a program of `list_contenders` looks through; more than eight a
            thread take longer.
        tile: contenders that `pick_rows`, one program a row, holds in registers.
        block: picked rows that a program of `look_up_rows` looks up.
        sample_warps, chunk_warps, pick_warps, block_warps, slot_warps: `num_warps` of
            `estimate_threshold`, of these three, and of `admit_rows`; see Triton.
        spread: in rows that are long, many programs draw the sample and join the lists of
            contenders, each by a kernel more, which one program a row would take longer for.
    """

    sample: int = 4096
    chunk: int = 2048
    tile: int = 2048
    block: int = 128
    sample_warps: int = 16
    chunk_warps: int = 8
    pick_warps: int = 16
    block_warps: int = 4
    slot_warps: int = 16
    spread: bool = False


# The most contenders whose keys fit in the registers of 16 warps, most of them at least.
MOST_IN_REGISTERS = 16384


def heuristic(candidates: int, max_tokens: int) -> Config:
    """Choose a config for shapes that were not tuned.

    Args:
        candidates, max_tokens: room for candidates and for retrieved ones, a row.
    """
    long = candidates > 128 * 1024
    chunk = min(1024 if long else 2048, launch.tile(candidates, 32))
    sample = min(launch.tile(candidates // 16, 32), 8192)
    tile = launch.tile(most_expected(max_tokens, candidates, sample), 32)
    tile = min(tile, MOST_IN_REGISTERS)
    # At most 128 programs a row: what they found is put together by one.
    block = min(max(128, launch.tile(max_tokens) // 128), launch.tile(max_tokens, 32))
    return Config(
        sample,
        chunk,
        tile=tile,
        block=block,
        sample_warps=max(1, min(16, sample // 256)),
        chunk_warps=max(1, min(8, chunk // 256)),
        pick_warps=max(1, min(16, tile // 128)),
        block_warps=min(block // 32, 16),
        spread=long,
    )
