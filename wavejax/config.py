"""The settings of wave attention."""

import dataclasses
import math
from typing import Any

from models.errors import InputError


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


# Clusters of short contexts are not made smaller than this: centroid and sum of values then take an
# eighth of the memory that the rows take.
LEAST_CLUSTER_SIZE = 8

MOMENT_RANKS = (0, 1, 2, 4)
MOMENT_DTYPES = ("model", "bfloat16", "int8")
ROW_DTYPES = ("model", "int8")

# Settings that only steer how a decode step reads what is kept: no index depends on them. A new
# setting is not among them until somebody says that it is.
DECODE_SETTINGS = (
    "candidate_fraction",
    "min_candidate_tokens",
    "retrieval_fraction",
    "min_retrieved_tokens",
    "min_token_mass",
    "estimation_fraction",
    "admission_ratio",
    "delta",
    "tolerance_draws",
    "tolerance_cap",
    "exact_fallback",
)

# The row cache is as large as that of a context of so many times the least tokens retrieved.
LIKE_RETRIEVED = 80


@dataclasses.dataclass(frozen=True)
class WaveConfig:
    """Settings of the wave index, the wave buffer and tripartite attention.

    Tokens are counted in each sequence and kv head. Every field's `metadata["help"]` says what it
    does; the command line makes its flags of them.

    Raises:
        InputError: a field is outside its range.
    """

    sink_tokens: int = _setting(4, "first tokens, always attended to exactly")
    local_tokens: int = _setting(64, "last tokens, always attended to exactly")
    growth_tokens: int = _setting(1024, "generated tokens that make a new segment of the index")
    segment_tokens: int = _setting(8192, "prompt tokens clustered together; at most 65536")
    cluster_size: int = _setting(32, "mean tokens a cluster; of short contexts fewer")
    max_cluster_size: int = _setting(64, "most tokens a cluster; larger ones are cut")
    min_clusters: int = _setting(
        3072,
        "least clusters of a sequence: sizes are halved, to no less than 8 tokens, until there are "
        "as many",
    )
    kmeans_iterations: int = _setting(10, "iterations of k-means")
    token_codes: bool = _setting(True, "rank single tokens by one-bit codes, not whole clusters")
    candidate_fraction: float = _setting(0.25, "share of tokens whose codes are read")
    min_candidate_tokens: int = _setting(16384, "least tokens whose codes are read")
    reach: float = _setting(
        0.0,
        "rank clusters, whose tokens' codes are read, by what a token of theirs might reach: their "
        "mean and this number of standard deviations; 0: by their mean",
    )
    retrieval_fraction: float = _setting(0.009, "share of tokens retrieved and attended exactly")
    min_retrieved_tokens: int = _setting(4096, "least tokens retrieved: short contexts near exact")
    min_token_mass: float = _setting(
        0.0,
        "retrieve no tokens but those of at least this share of attention, summed over the query "
        "heads of a kv head, where these are fewer than would be retrieved; 0: all of them",
    )
    estimation_fraction: float = _setting(
        1.0, "share of tokens estimated from their clusters; below 1, the rest is dropped"
    )
    pooled_covariance: bool = _setting(
        False,
        "estimate clusters to second order, by one covariance of keys and values in each head",
    )
    moment_rank: int = _setting(
        0,
        "directions along which each cluster's values vary with its keys: 1, 2 or 4 for a better "
        "estimate, 0 for none",
    )
    moment_dtype: str = _setting(
        "model", "of these directions: model, the model's own; bfloat16; int8, a scale a vector"
    )
    row_dtype: str = _setting(
        "model",
        "of the keys and values kept of indexed tokens, or of all tokens by full attention: model, "
        "the model's own; int8, a scale a key and a value",
    )
    bounds: bool = _setting(
        False, "keep what bounds of the estimate are made of, as attend_zones takes it"
    )
    audit: float = _setting(
        0.0, "share of heads of each step that are also computed exactly, to tell the true error"
    )
    tolerance: float = _setting(
        0.0,
        "of each head's output, the relative error to keep within: tokens drawn at random bound "
        "it, and heads past it retrieve more; 0: no tolerance",
    )
    delta: float = _setting(
        0.05, "with what probability a bound of the relative error may be too small"
    )
    tolerance_draws: int = _setting(256, "tokens drawn in each kv head to bound its error")
    tolerance_cap: int = _setting(
        8, "a head past the tolerance retrieves up to so many times as many tokens"
    )
    exact_fallback: bool = _setting(
        False, "compute heads exactly that are past the tolerance at the cap"
    )
    cache_fraction: float = _setting(
        0.05,
        "slots of the row cache, if rows are in host memory, as a share of the tokens; where the "
        "least tokens are retrieved, of 80 times as many: four slots for each by default",
    )

    admission_ratio: float = _setting(
        1.0,
        "rows in host memory that are not in the row cache are retrieved only if their mass is at "
        "least so many times that of the least token retrieved, once the cache is full; 1: all",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_kind(field.name, getattr(self, field.name), type(field.default))
        for name in ("local_tokens", "growth_tokens", "segment_tokens", "cluster_size"):
            _check_range(name, getattr(self, name), 1, 65536)
        for name in (
            "sink_tokens",
            "min_clusters",
            "kmeans_iterations",
            "min_candidate_tokens",
            "min_retrieved_tokens",
        ):
            _check_range(name, getattr(self, name), 0, 2**31 - 1)
        for name in (
            "candidate_fraction",
            "retrieval_fraction",
            "min_token_mass",
            "estimation_fraction",
            "audit",
            "tolerance",
            "cache_fraction",
        ):
            _check_range(name, getattr(self, name), 0, 1)
        check_known("moment_rank", self.moment_rank, MOMENT_RANKS)
        if self.pooled_covariance and self.moment_rank:
            raise InputError(
                "`pooled_covariance` and `moment_rank` are two corrections: give one of them"
            )
        if self.pooled_covariance and not self.token_codes:
            raise InputError(
                "`pooled_covariance` goes by the scales of codes: give `token_codes=True`"
            )
        if self.bounds and not self.moment_rank:
            raise InputError("`bounds` want moments: give `moment_rank` of 1, 2 or 4")
        _check_range("reach", self.reach, 0, 100)
        if self.reach and not self.token_codes:
            raise InputError("`reach` finds tokens for their codes: give `token_codes=True`")
        _check_range("delta", self.delta, 1e-6, 0.5)
        _check_range("tolerance_draws", self.tolerance_draws, 2, 65536)
        _check_range("tolerance_cap", self.tolerance_cap, 1, 65536)
        if self.tolerance and self.estimation_fraction < 1:
            raise InputError(
                "a `tolerance` wants all tokens estimated that are not retrieved: give "
                "`estimation_fraction=1`, or `tolerance=0`"
            )
        check_known("moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        check_known("row_dtype", self.row_dtype, ROW_DTYPES)
        _check_range("admission_ratio", self.admission_ratio, 1, 10**9)
        _check_range("max_cluster_size", self.max_cluster_size, self.cluster_size, 65536)
        # k-means begins in the middle of as many equal parts; the last part's middle is at
        # (2 clusters - 1) tokens / (2 clusters), all in int32.
        for name in ("segment_tokens", "growth_tokens"):
            tokens = getattr(self, name)
            most_clusters = ((2**31 - 1) // tokens + 1) // 2
            least = -(-tokens // most_clusters)
            if self.cluster_size < least:
                raise InputError(
                    f"`cluster_size` is {self.cluster_size}; with `{name}` of {tokens} it must be "
                    f"{least} or more"
                )

    @classmethod
    def paper(cls, **changes: int | float | bool) -> "WaveConfig":
        """Return the settings of RetroInfer (arXiv 2505.02922, section 5.1): the baseline to beat.

        16 tokens a cluster and no limit to a cluster's size, whole clusters retrieved, 23.2 % of
        the tokens estimated, the rest dropped.
        """
        settings: dict[str, Any] = {
            "token_codes": False,
            "pooled_covariance": False,
            "cluster_size": 16,
            "max_cluster_size": 8192,
            "min_clusters": 0,
            "retrieval_fraction": 0.018,
            "min_retrieved_tokens": 0,
            "estimation_fraction": 0.232,
        }
        return cls(**(settings | changes))

    @property
    def window_tokens(self) -> int:
        """Room for tokens that are not in the index: the local ones and those to come."""
        return self.local_tokens + self.growth_tokens

    def indexed_tokens(self, prompt_tokens: int) -> int:
        """How many of a prompt's tokens are clustered: none where the window has room for all."""
        rest = prompt_tokens - self.sink_tokens
        return 0 if rest < self.window_tokens else rest - self.local_tokens

    @property
    def size_steps(self) -> list[tuple[int, int, int]]:
        """Mean and most tokens of a cluster, and from how many tokens on; the largest first."""
        mean, most, steps = self.cluster_size, self.max_cluster_size, []
        while mean >= 2 * LEAST_CLUSTER_SIZE and self.min_clusters:
            steps.append((mean, most, mean * self.min_clusters))
            mean, most = mean // 2, most // 2
        return [*steps, (mean, most, 0)]

    def cluster_sizes(self, tokens: int) -> tuple[int, int]:
        """Mean and most tokens of a cluster, where a sequence has so many tokens in its index."""
        return next((mean, most) for mean, most, least in self.size_steps if tokens >= least)

    def most_retrieved(self, tokens: int) -> int:
        """Return the most tokens retrieved of so many indexed ones."""
        # One more than the exact share: the device computes it in float32.
        share = math.ceil(self.retrieval_fraction * tokens) + 1
        return max(1, min(max(self.min_retrieved_tokens, share), tokens))

    def most_candidates(self, tokens: int) -> int:
        """Return the most tokens of the clusters that `select_clusters` can take."""
        share = math.ceil(self.candidate_fraction * tokens) + 1
        wanted = max(share, self.min_candidate_tokens) if self.token_codes else 0
        wanted = max(wanted, self.most_retrieved(tokens))
        return max(1, min(wanted + self.max_cluster_size, tokens))

    def reads_all(self, tokens: int) -> bool:
        """Say whether every token of a sequence of so many is attended to exactly.

        Args:
            tokens: that it holds, however many of them came with its prompt.
        """
        rest = tokens - self.sink_tokens
        indexed = 0 if rest < self.window_tokens else rest - self.local_tokens
        if self.min_token_mass > 0 or self.admission_ratio > 1:
            return not indexed
        retrieved = max(self.min_retrieved_tokens, int(self.retrieval_fraction * indexed))
        candidates = max(self.min_candidate_tokens, int(self.candidate_fraction * indexed))
        return indexed <= (min(retrieved, candidates) if self.token_codes else retrieved)

    def cache_slots(self, tokens: int) -> int:
        """Slots of the row cache for so many indexed tokens."""
        like = max(tokens, LIKE_RETRIEVED * self.min_retrieved_tokens)
        return max(1, math.ceil(min(self.cache_fraction * like, tokens)))

    def with_part_of_cache(self, slots: int, part: float) -> "WaveConfig":
        """Return these settings with a part of the row cache that they make `slots` of.

        The part is from 0 to 1.
        """
        # What slots are a share of: not the tokens, of which there are fewer if all have one.
        like = max(slots / self.cache_fraction, LIKE_RETRIEVED * self.min_retrieved_tokens)
        # Rounded down, since slots are whole ones, rounded up.
        return dataclasses.replace(self, cache_fraction=int(slots / like * part * 1e4) / 1e4)


def _check_kind(name: str, value: Any, kind: type) -> None:
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"`{name}` is {value!r}; it must be of type {kind.__name__}")


def check_known(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise InputError where a setting's value is none of those that there are."""
    if value not in known:
        listed = ", ".join(map(str, known))
        raise InputError(f"`{name}` is {value}; it must be one of {listed}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"`{name}` is {value}; it must be from {low} to {high}")
