"""How the kernel of `score_clusters` cuts its work into programs."""

import dataclasses

from pallas_kernels.toolbox import launch


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block: clusters scored at once.
        blocks: how many times one program does so.
        num_warps, num_stages: see Triton.
    """

    block: int = 128
    blocks: int = 1
    num_warps: int = 4
    num_stages: int = 3


def of_covariance(config: Config) -> Config:
    """Cut the rows of a covariance: few at once, so that as many programs fit as of clusters."""
    return Config(min(32, config.block))


def heuristic(rows: int, clusters: int, head_dim: int, dtype: str) -> Config:
    """Choose a config for shapes that were not tuned."""
    block = 128 if head_dim <= 128 else 64
    if dtype == "float32":
        # Its products are made one by one, in registers.
        block //= 4
    block = min(block, launch.tile(clusters, launch.DOT_TILE))
    # Where there are programs enough, each loads its next block while it works on one.
    return Config(block, blocks=2 if rows * clusters >= 1024 * block else 1)
