"""Named shapes of a decode step, shared by the ops' tests, benchmarks and tuning."""

import math
from dataclasses import dataclass

from pallas_kernels.types import SelectionSettings


@dataclass(frozen=True)
class StepShape:
    """The shape of one decode step over a clustered KV cache; every op's shape follows from it.

    Attributes:
        name: as in `SHAPES`.
        batch, kv_heads, group, head_dim: `group` query heads share a kv head.
        tokens: indexed tokens of each sequence, and the index's room for them.
        clusters: clusters in use, for sequences of full length.
        dtype: of rows, centroids, mean values and scales.
        candidate_fraction: share of the tokens whose codes are read.
        retrieved_fraction, least_retrieved: share of the tokens attended to exactly, and its floor.
        slot_fraction: slots of the row cache, as a share of the tokens.
        room_factor: room for clusters, as a multiple of those in use.
        max_cluster_size: most tokens a cluster.
        sinks, window: room for the steady zone's rows.
        segment_tokens, growth_tokens: how the index was cut when it was built.
    """

    name: str
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    tokens: int
    clusters: int
    dtype: str = "bfloat16"
    candidate_fraction: float = 0.25
    retrieved_fraction: float = 0.009
    least_retrieved: int = 256
    slot_fraction: float = 0.05
    room_factor: float = 1.5
    max_cluster_size: int = 64
    sinks: int = 4
    window: int = 1088
    segment_tokens: int = 8192
    growth_tokens: int = 1024

    @property
    def rows(self) -> int:
        """Pairs of a sequence and a kv head."""
        return self.batch * self.kv_heads

    @property
    def scale(self) -> float:
        """What multiplies every product of a query and a key."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def selection(self) -> SelectionSettings:
        """What `select_tokens` is compiled for."""
        return SelectionSettings(self.max_retrieved, self.segment_tokens, self.growth_tokens)

    @property
    def cluster_room(self) -> int:
        """The index's room for clusters."""
        return math.ceil(self.room_factor * self.clusters)

    @property
    def slots(self) -> int:
        """Slots of the row cache, a row."""
        return max(1, math.ceil(self.slot_fraction * self.tokens))

    @property
    def retrieved(self) -> int:
        """Tokens that a sequence of full length retrieves."""
        share = math.ceil(self.retrieved_fraction * self.tokens)
        return min(max(self.least_retrieved, share), self.tokens)

    @property
    def max_retrieved(self) -> int:
        """Length of the retrieved tokens' lists: one more than needed, as the engine has it."""
        return min(self.retrieved + 1, self.tokens)

    @property
    def candidates(self) -> int:
        """Tokens whose codes a sequence of full length reads."""
        share = math.ceil(self.candidate_fraction * self.tokens)
        return min(max(share, 4 * self.least_retrieved, self.retrieved), self.tokens)

    @property
    def max_candidates(self) -> int:
        """Length of the candidates' lists: the last cluster taken may pass the budget."""
        return min(self.candidates + 1 + self.max_cluster_size, self.tokens)


_SHAPES = (
    # Llama-3-8B's heads at 131,072 and 1,048,576 tokens: the project's targets name these.
    StepShape("batch8-128k", 8, 8, 4, 128, 131_072, 4096),
    StepShape("batch1-128k", 1, 8, 4, 128, 131_072, 4096),
    StepShape("batch1-1m", 1, 8, 4, 128, 1_048_576, 32_768),
    # A million tokens a row in less memory, for tests.
    StepShape("batch1-1m-2heads", 1, 2, 4, 128, 1_048_576, 32_768),
    # The heads of models that the project runs.
    StepShape("llama", 2, 2, 4, 128, 16_384, 512),
    StepShape("qwen", 4, 2, 7, 64, 32_768, 1024),
    StepShape("smollm2", 4, 3, 3, 64, 8192, 256),
    StepShape("gemma", 2, 4, 2, 256, 16_384, 512),
    StepShape("phi", 2, 8, 1, 96, 16_384, 512),
    # The most query heads that the kernels take for one kv head.
    StepShape("wide", 2, 2, 16, 128, 8192, 256),
    # In plain JAX on a CPU, interpreted kernels included, within seconds.
    StepShape(
        "tiny", 2, 2, 3, 64, 512, 32, "float32", least_retrieved=16, window=24, segment_tokens=256,
        growth_tokens=64,
    ),
    StepShape(
        "tiny96", 1, 2, 1, 96, 256, 16, "bfloat16", least_retrieved=16, window=16,
        segment_tokens=128, growth_tokens=32,
    ),
)  # fmt: skip

SHAPES = {shape.name: shape for shape in _SHAPES}
# What benchmarks and tuning run by default.
BENCHMARKED = ("batch8-128k", "batch1-128k", "batch1-1m")
