"""Every value that ops hand to each other, and the constants of their contract.

Shapes name their axes: `layers`, `batch` (sequences), `kv_heads`, `group` (query heads that share
a kv head), `head_dim`, `clusters`, `tokens`, `slots` (of the row cache). Values of KV rows are in
`rows.py`; import them from here.
"""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt16

from pallas_kernels.levels import Levels as Levels
from pallas_kernels.moments import Correction as Correction
from pallas_kernels.moments import Moments as Moments
from pallas_kernels.moments import Pooled as Pooled
from pallas_kernels.moments import Spread as Spread
from pallas_kernels.moments import ZoneBounds as ZoneBounds
from pallas_kernels.rows import EMPTY as EMPTY
from pallas_kernels.rows import KeptRows as KeptRows
from pallas_kernels.rows import Rows as Rows
from pallas_kernels.rows import RowTable as RowTable
from pallas_kernels.rows import SteadyRows as SteadyRows
from pallas_kernels.rows import StoredRows as StoredRows

# Masks are finite: -inf minus -inf is NaN, and rows with nothing in them do occur. Half of it is
# still far below any logit, so `numerics.is_masked` tells a mask from a real value. Empty and NaN
# are different things: NaN is a real value, and shows in all that is made of it.
MASKED = -1e30

# Stands for no token, no cluster, no slot in an int32 list: past the end of every array, so that a
# scatter in "drop" mode leaves it out and none has to be masked apart. In a row table `EMPTY` does.
NO_ID = 2**31 - 1

# Places of the list that one entry of `Candidates.granules` stands for.
GRANULE = 32

# Bits of a word of the tokens' codes: one for each dimension.
WORD_BITS = 32


class PackedQuery(NamedTuple):
    """The rotated query in int8, as the right operands of the matrix units' products with codes.

    Bit k + 8 i of a code's word w belongs to dimension 32 w + k + 8 i: shifted by k and masked to
    the lowest bit of each byte, the word is four bits that are multiplied with four int8. A
    product takes those of a phase p: k = p and k = p + 4, of four words, each from a lane of its
    own. A lane gets columns 2 c and 2 c + 1 of it: head c of the round is column 2 c, head 4 + c
    is 2 c + 1.

    Attributes:
        fragments: `[batch, kv_heads, ceil(group / 8), ceil(words / 4), 4, 2, 32]` int32: for every
            eight heads, four words, phase and k what each lane of a warp holds of the operand, four
            int8: lane 4 n + t has column n's for word t. Zero past the group and the head dim.
        factors, shifts: `[batch, kv_heads, group]` float32: the binary logarithm of a token's mass
            grows by its code's scale times (factor * product - shift), `product` being the
            sum of the int8 query over the code's set bits.
    """

    fragments: Array
    factors: Array
    shifts: Array


class ClusterScores(NamedTuple):
    """What a query makes of every cluster.

    Attributes:
        logits: `[batch, kv_heads, group, clusters]` float32, scale * q.c; about -1e30 for a
            cluster without members.
        logsumexp: `[batch, kv_heads, group]` float32, log of the sum over clusters of
            size * exp(logit): what normalises one query head's masses. About -1e30 where there
            are no clusters.
        rotated: the query as `score_tokens` takes it: R q, with the codes' rotation R, or what
            the kernel packs it to. None if it was not asked for.
        products: `[batch, kv_heads, group, clusters, rank]` float32, scale * q.u of `Moments`;
            anything for a cluster without members.
        pooled: `[batch, kv_heads, group, 2, head_dim]` float32, scale times the query multiplied by
            both matrices of the covariance. None if they were not given.
    """

    logits: Array
    logsumexp: Array
    rotated: Array | PackedQuery | None = None
    products: Array | None = None
    pooled: Array | None = None


class Reach(NamedTuple):
    """What the members of a cluster might have more than its mean, as a part of their logits.

    To a logit is added length * deviation.

    Attributes:
        lengths: `[batch, kv_heads, group]` float32, of the query, times the scale of its products
            and the number of deviations that are added.
        deviations: `[layers, batch, kv_heads, clusters]`, the standard deviation of the members'
            keys along a direction, in the mean of all directions.
    """

    lengths: Float[Array, "batch kv_heads group"]
    deviations: Float[Array, "layers batch kv_heads clusters"]


class Candidates(NamedTuple):
    """The best clusters of each row of (sequence, kv head), and the list of their tokens.

    The list itself is not written down: its n-th token is member n - starts[i] of clusters[i],
    with i the last one whose start is at most n. So it is in the order of index positions.

    Attributes:
        selected: `[batch, kv_heads, clusters]` bool.
        clusters: `[batch, kv_heads, clusters]` int32, the selected ones, rising; NO_ID after.
        starts: `[batch, kv_heads, clusters + 1]` int32, each one's first place in the list; past
            the last one, the list's length.
        granules: `[batch, kv_heads, ceil(max_candidates / GRANULE)]` int32: where in `clusters` to
            begin looking for place n: entry n // GRANULE is the i of place n // GRANULE * GRANULE;
            past the list's end, its last cluster's.
    """

    selected: Array
    clusters: Array
    starts: Array
    granules: Array


class RankedTokens(NamedTuple):
    """The candidates by mass, and how many of them are wanted.

    Attributes:
        log_mass: `[batch, kv_heads, candidates]` float32, from `score_tokens`.
        candidates: from `select_clusters`.
        budget: `[batch]` or `[batch, kv_heads]` int32: tokens wanted, for each sequence or each
            of its kv heads; no more than `SelectionSettings.max_tokens` are taken.
    """

    log_mass: Float[Array, "batch kv_heads candidates"]
    candidates: Candidates
    budget: Int[Array, " batch"] | Int[Array, "batch kv_heads"]


@dataclasses.dataclass(frozen=True)
class SelectionSettings:
    """What `select_tokens` is compiled for: no array, so it is hashable and static.

    Attributes:
        max_tokens: the length of `Retrieved`'s lists.
        segment_tokens: the length of a prompt's segments, in tokens.
        growth_tokens: the length of a growth's segments, in tokens.
        admission_ratio: how many times the mass of the least row selected a row must have to be
            read from the store; 1 or more. 1 reads all that is selected. Of no effect without
            slots.
        with_clusters: list the cluster of each selected token too, as `attend_zones` wants them
            with moments.
    """

    max_tokens: int
    segment_tokens: int
    growth_tokens: int
    admission_ratio: float = 1.0
    with_clusters: bool = False


class IndexedTokens(NamedTuple):
    """Which token stands at each index position.

    Attributes:
        offsets: `[layers, batch, kv_heads, clusters + 1]` int32: cluster j holds the index
            positions offsets[j] to offsets[j + 1].
        token_ids: `[layers, batch, kv_heads, tokens]` uint16, the token at each index position,
            counted from its segment's start.
        prompt_tokens: `[batch]` int32, how many of a sequence's indexed tokens came with the
            prompt: where its prompt's segments end and those of growth begin.
    """

    offsets: Int[Array, "layers batch kv_heads clusters+1"]
    token_ids: UInt16[Array, "layers batch kv_heads tokens"]
    prompt_tokens: Int[Array, " batch"]


class Retrieved(NamedTuple):
    """The rows to attend to exactly, in rising order of their index positions.

    Attributes:
        tokens: `[batch, kv_heads, budget]` int32, rows of the store; NO_ID past the last one, and
            where a row is not worth reading from there.
        slots: `[batch, kv_heads, budget]` int32, the slot to read (a hit) or to admit the row to
            (a miss); NO_ID for a miss that finds no slot and for no row.
        hit: `[batch, kv_heads, budget]` bool.
        remaining: `[batch, kv_heads, clusters]` int32, what each cluster keeps of its members.
        table: the row table after the step.
        hits, misses: `[batch, kv_heads]` int32, rows found and not found in the cache in this step.
        clusters: `[batch, kv_heads, budget]` int32, each one's; None if they were not asked for.
    """

    tokens: Array
    slots: Array
    hit: Array
    remaining: Array
    table: RowTable
    hits: Array
    misses: Array
    clusters: Array | None = None


class Picks(NamedTuple):
    """Which rows to attend to exactly, and where they lie: the first fields of `Retrieved`.

    Attributes:
        tokens, slots, hit: `[batch, kv_heads, retrieved]`, as in `Retrieved`.
    """

    tokens: Int[Array, "batch kv_heads retrieved"]
    slots: Int[Array, "batch kv_heads retrieved"]
    hit: Bool[Array, "batch kv_heads retrieved"]


class Estimate(NamedTuple):
    """The clusters, and the members of each that are to be estimated.

    Attributes:
        logits: `[batch, kv_heads, group, clusters]` float32, as in `ClusterScores`.
        value_means: `[layers, batch, kv_heads, clusters, head_dim]`, means of the members' values.
            Anything for clusters past the last one of which something is to be estimated. Of those
            before it NaN may show, whatever is estimated.
        offsets: `[layers, batch, kv_heads, clusters + 1]` int32: they give the clusters' sizes.
        remaining: `[batch, kv_heads, clusters]` int32, how many members to estimate: as in
            `Retrieved`, or zero for a cluster to leave out. More than it has members are all.
        correction: by the clusters' moments, and by what is retrieved of them; None for none.
        pooled: a correction by how all clusters' members lie; None for none. Not both.
    """

    logits: Float[Array, "batch kv_heads group clusters"]
    value_means: Float[Array, "layers batch kv_heads clusters head_dim"]
    offsets: Int[Array, "layers batch kv_heads clusters+1"]
    remaining: Int[Array, "batch kv_heads clusters"]
    correction: Correction | None = None
    pooled: Pooled | None = None


class ZoneStates(NamedTuple):
    """Attention over parts of the zones, to be merged by `merge_states`, and the cache after it.

    The parts' tokens are disjoint, and together they are the zones. How many parts there are is up
    to the implementation; the reference has three: steady, retrieved, estimated.

    Attributes:
        outputs: `[parts, batch, kv_heads, group, head_dim]` float32.
        logsumexps: `[parts, batch, kv_heads, group]` float32; about -1e30 for an empty part.
        cache_rows: as given, with the admitted rows written into their slots.
        bounds: of the estimate, if its correction has a spread.
        estimated: `[parts]` bool, which parts are the estimate; None where it is by means alone.
    """

    outputs: Array
    logsumexps: Array
    cache_rows: Rows
    bounds: ZoneBounds | None = None
    estimated: Array | None = None


class Clusters(NamedTuple):
    """A segment's clusters.

    Attributes:
        centroids: `[..., clusters, head_dim]` float32, plain means of the members' keys.
        value_means: `[..., clusters, head_dim]` float32, plain means of the members' values. Both
            are zeros for an empty cluster, and NaN where a member's key, or value, is not finite.
        offsets: `[..., clusters + 1]` int32: cluster j holds order[offsets[j] : offsets[j + 1]].
            Clusters past the last one are empty; before it none is.
        order: `[..., tokens]` int32, the tokens in cluster order, rising within a cluster; the
            padding comes last.
    """

    centroids: Array
    value_means: Array
    offsets: Array
    order: Array


class TokenCodes(NamedTuple):
    """One sign bit per dimension of each token's rotated residual, and what scales them.

    Attributes:
        codes: `[..., tokens, ceil(head_dim / 32)]` uint32; bit i of word w is set where dimension
            32 w + i is positive or zero.
        scales: `[..., tokens]` float32, |r|^2 / |r|_1; zero for a residual of zero, NaN for one
            that is not finite. An index keeps them in its rows' dtype.
    """

    codes: Array
    scales: Array
