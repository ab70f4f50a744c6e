"""How the kernels of `select_clusters` cut their work into programs."""

import dataclasses

from pallas_kernels.toolbox import launch


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        share: clusters that a program of the first kernel ranks.
        chunk: clusters that a program of the last one lists.
        in_registers: every program of the last kernel finds the end of the selection for itself,
            with the whole row in registers. If not, kernels before it do, see `_split`.
        tile: clusters that are held in registers: all, or those that contend.
        sample: clusters whose masses tell which contend.
        share_warps, end_warps, num_warps: `num_warps` of the first kernel, of the one that finds a
            row's end, and of the others, see Triton.
    """

    share: int = 512
    chunk: int = 1024
    in_registers: bool = True
    tile: int = 8192
    sample: int = 2048
    share_warps: int = 4
    end_warps: int = 16
    num_warps: int = 8


# The most clusters whose keys and sizes fit in the registers of 8 warps.
MOST_IN_REGISTERS = 8192


def heuristic(rows: int, clusters: int) -> Config:
    """Choose a config for shapes that were not tuned."""
    whole = launch.tile(clusters, 32)
    if whole > MOST_IN_REGISTERS:
        # A larger sample costs less than the contenders that it leaves out.
        return Config(
            share=256,
            chunk=1024,
            in_registers=False,
            tile=MOST_IN_REGISTERS,
            sample=4096,
            num_warps=16,
        )
    # No more programs than processors of a large GPU: they would all do the same in turns.
    chunk = max(whole // min(16, launch.tile(max(128 // rows, 1))), 32)
    return Config(
        # Of few rows, programs enough for a large GPU's processors.
        share=min(256 if rows * whole <= 128 * 512 else 512, whole),
        chunk=chunk,
        tile=whole,
        share_warps=max(1, min(4, whole // 256)),
        num_warps=max(1, min(16 if chunk > 8 * 256 else 8, whole // 512)),
    )
