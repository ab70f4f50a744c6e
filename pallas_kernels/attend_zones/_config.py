"""How the kernels of `attend_zones` cut their work into programs."""

import dataclasses
import math

from pallas_kernels.toolbox import launch

# So many programs that read the store fill the bus. More would only read from more pages at a time,
# and what translates their addresses remembers few.
MISSED_PROGRAMS = 64
# A large GPU's 132 processors hold four programs each. What the programs take differs: half as many
# again as there are places even it out.
PROGRAMS = 6 * 132
# Of the estimate by moments a processor holds four programs, by their registers.
REST_PROGRAMS = 4 * 132
# A program of fewer tiles would spend its time on starting.
LEAST_TILES = 3
# A program holds its share of the list of retrieved rows in registers: 4 a thread for 16 tiles of
# hits, and for a moment 32 for 64 tiles of missed rows.
MOST_HIT_TILES, MOST_MISSED_TILES = 16, 64
# What a program reads at once: more takes more than 128 registers a thread, and fewer fit.
TILE_BYTES = 16384


@dataclasses.dataclass(frozen=True)
class RestConfig:
    """How the work of the estimate by moments is cut: of its last two launches.

    Attributes:
        remains_tile: clusters of a program of `find_remains`.
        remains_warps: its warps.
        splits: programs a row, and share of its heads, of `attend_corrected`, which sums values.
            Each takes tiles of `remains_tile` clusters that follow on each other.
        heads: query heads of one program at most; more are another's.
        cluster_tile, ahead: clusters, or retrieved rows, whose vectors lie side by side in a
            program's threads, and how many of these tiles it asks for at once. Their product
            divides `remains_tile`.
        num_warps: of `attend_corrected`.

    Raises:
        ValueError: tiles of `cluster_tile` times `ahead` do not fill `remains_tile`.
    """

    splits: int
    remains_tile: int = 32
    remains_warps: int = 1
    heads: int = 4
    cluster_tile: int = 8
    ahead: int = 2
    num_warps: int = 4

    def __post_init__(self) -> None:
        if self.remains_tile % (self.cluster_tile * self.ahead):
            raise ValueError(
                f"remains_tile is {self.remains_tile}; it must be a multiple of cluster_tile "
                f"{self.cluster_tile} times ahead {self.ahead}"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut. Programs of a kind take its tiles in turn, so each has as many.

    Attributes:
        missed_splits, hit_splits, estimated_splits, steady_splits: programs a row (a sequence's kv
            head). Those of the missed and of the hit rows walk the same list, each for its kind.
        missed_tile, hit_tile, cluster_tile, steady_tile: rows of keys and values, or clusters, that
            a program reads at once.
        num_warps, num_stages: see Triton. The loops over tiles are pipelined, but for missed rows.
        rest: of an estimate by moments, which has no `estimated_splits`; None chooses.
    """

    missed_splits: int
    hit_splits: int
    estimated_splits: int
    steady_splits: int
    missed_tile: int = 32
    hit_tile: int = 32
    cluster_tile: int = 64
    steady_tile: int = 32
    num_warps: int = 4
    num_stages: int = 3
    rest: RestConfig | None = None

    @property
    def splits(self) -> tuple[int, int, int, int]:
        """In the order of the parts."""
        return self.missed_splits, self.hit_splits, self.estimated_splits, self.steady_splits


def heuristic(
    rows: int, head_dim: int, itemsize: int, retrieved: int, clusters: int, window: int
) -> Config:
    """Choose a config: each program gets about as many tiles, each processor a few programs.

    Args:
        rows: sequences times kv heads.
        head_dim, itemsize: of the stored rows and mean values.
        retrieved, clusters, window: the capacities of a row's lists.
    """
    row_bytes = launch.tile(head_dim) * itemsize
    row_tile = max(min(TILE_BYTES // (2 * row_bytes), 32), launch.DOT_TILE)
    cluster_tile = max(min(TILE_BYTES // row_bytes, 64), launch.DOT_TILE)
    tiles = (retrieved / row_tile, clusters / cluster_tile, window / row_tile)
    # Hits come from all over the cache, and take longer.
    work = (1.5 * tiles[0], tiles[1], tiles[2])

    def fit(splits: float, tiles: float) -> int:
        return max(1, min(round(splits), math.ceil(tiles / LEAST_TILES)))

    hit, estimated, steady = (
        fit(PROGRAMS / rows * own / sum(work), most) for own, most in zip(work, tiles, strict=True)
    )
    return Config(
        max(fit(MISSED_PROGRAMS / rows, tiles[0]), math.ceil(tiles[0] / MOST_MISSED_TILES)),
        max(hit, math.ceil(tiles[0] / MOST_HIT_TILES)),
        estimated,
        steady,
        missed_tile=max(row_tile // 2, launch.DOT_TILE),
        hit_tile=row_tile,
        cluster_tile=cluster_tile,
        steady_tile=row_tile,
        num_warps=4 if row_bytes <= 256 else 8,
        # Where a program has few tiles, to load two ahead takes longer than it gains.
        num_stages=2 if tiles[1] <= LEAST_TILES * estimated else 3,
    )


def rest_heuristic(rows: int, group: int, head_dim: int, clusters: int) -> RestConfig:
    """Choose a config for the estimate by moments: on an H200 the fastest tried at `batch8-128k`.

    Args:
        rows: sequences times kv heads.
        group: query heads of one.
        head_dim: of the vectors.
        clusters: the capacity of a row's list.
    """
    # A thread has eight numbers of a vector, in whatever dtype it comes: so no thread hands any on.
    tile = max(1024 // launch.tile(head_dim), 1)
    remains = max(RestConfig.remains_tile, RestConfig.ahead * tile)
    shares = rows * math.ceil(group / RestConfig.heads)
    splits = max(1, min(REST_PROGRAMS // shares, math.ceil(clusters / remains)))
    return RestConfig(splits, remains_tile=remains, cluster_tile=tile)
