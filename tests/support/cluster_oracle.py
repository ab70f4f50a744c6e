"""What `build_clusters` is to give, in float64 and numpy alone: no code of the project's.

The main direction of a cluster is the first eigenvector of its members' scatter, not what some
iterations came to; its sign is nobody's, so both orders of its pieces are right.
"""

import itertools
from typing import NamedTuple

import numpy as np


class Expected(NamedTuple):
    """The clusters of one segment.

    Attributes:
        pieces: for each k-means cluster that is not empty its pieces, lists of tokens: one, or, of
            a cluster that is cut, those along its main direction, and those against it.
        margin: the least difference by which a token went to its centroid and not to the next one,
            in any assignment, ties aside; infinite with one centroid.
        edge: the least gap, along the main direction, at which a cluster was cut, ties aside, as a
            share of its extent; infinite without a cut.
        cut: the clusters that were cut.
    """

    pieces: list[tuple[list[list[int]], ...]]
    margin: float
    edge: float
    cut: int


def unit(x):
    norm = np.linalg.norm(x)
    return x / norm if norm > 0 else x


def clusters_of(keys, cluster_size, max_cluster_size, iterations):
    """Clusters keys `[tokens, head_dim]` as `build_clusters` says; see `Expected`."""
    x = np.asarray(keys, np.float64)
    x = x - x.mean(axis=0)
    count = len(x)
    wanted = -(-count // cluster_size)
    # Each begins with the token in the middle of its equal part.
    centroids = [unit(x[int(np.floor((j + 0.5) * count / wanted))]) for j in range(wanted)]
    margin = np.inf
    for last in (*[False] * iterations, True):
        # Not a product of matrices, which may add for equal centroids in another order.
        scores = (x[:, None, :] * np.array(centroids)).sum(axis=-1)
        owner = scores.argmax(axis=1)  # the first of equals
        below = np.where(np.isclose(scores, scores.max(axis=1, keepdims=True), 1e-12), -np.inf, 0)
        margin = min(margin, (scores.max(axis=1) - (scores + below).max(axis=1)).min())
        if not last:
            for j in range(wanted):
                total = x[owner == j].sum(axis=0)
                if np.linalg.norm(total) > 1e-9:
                    centroids[j] = unit(total)
    pieces, edge, cut = [], np.inf, 0
    for j in range(wanted):
        members = np.flatnonzero(owner == j)
        number = -(-len(members) // max_cluster_size)
        if number == 1:
            pieces.append(([members.tolist()],))
        elif number > 1:
            cut += 1
            deviation = x[members] - x[members].mean(axis=0)
            along = deviation @ np.linalg.eigh(deviation.T @ deviation)[1][:, -1]
            extent = np.ptp(along)
            both = []
            for sign in (1, -1):
                order = sorted(range(len(members)), key=lambda i: (sign * along[i], i))
                cuts: list[list[int]] = [[] for _ in range(number)]
                for rank, i in enumerate(order):
                    cuts[rank * number // len(members)].append(i)
                for one, other in itertools.pairwise(cuts):
                    gap = abs(along[other[0]] - along[one[-1]])
                    edge = min(edge, gap / extent if gap > 1e-9 * extent else np.inf)
                both.append([sorted(members[piece].tolist()) for piece in cuts])
            pieces.append(tuple(both))
    return Expected(pieces, float(margin), float(edge), cut)


def agrees(expected, found):
    """Whether pieces, lists of tokens in the order of the clusters, are the expected ones."""
    at = 0
    for choices in expected.pieces:
        own = found[at : at + len(choices[0])]
        if own not in choices:
            return False
        at += len(own)
    return at == len(found)
