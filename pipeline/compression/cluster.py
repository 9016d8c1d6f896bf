"""Folding as clustering: one dendrogram per channel group, a cut per size, refined under the same metric.

Everything works on the Gram matrix G = W Wᵀ (C, C) of the channels' feature rows W (C, F), so that the cost after G is
that of C and not of F. The quantity that is minimised is the parameter error ‖W - P W‖² = tr G - Σ_j 1ⱼᵀ G 1ⱼ / nⱼ,
which is the k-means objective ("Cut Less, Fold More", eq. 4).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

Array = np.ndarray


def dendrogram(gram: Array) -> Array:
    """Ward's merges, (C - 1, 2) int: the two nodes that become node C + i (0 ... C - 1 are the channels)."""
    squares = np.diag(gram)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0))
    np.fill_diagonal(distances, 0)
    return linkage(squareform(distances, checks=False), "ward")[:, :2].astype(np.int64)


def cuts(merges: Array, sizes: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """(k, labels (C,)) for every k in `sizes`, largest first."""
    channels = len(merges) + 1
    node = np.arange(channels)  # of each channel: the node that holds it
    done = 0
    for k in sorted(sizes, reverse=True):
        for i in range(done, channels - k):
            node[np.isin(node, merges[i])] = channels + i
        done = channels - k
        yield k, np.unique(node, return_inverse=True)[1]


def special_folding(gram: Array, k: int) -> Array:
    """The folding of the theorem: the k - 1 channels of largest norm by themselves, all others in one cluster.

    Its error is at most that of every pruning that keeps k - 1 channels (theorem 1 of "Cut Less, Fold More"): the
    dropped rows are replaced by their mean instead of by zero, and no choice of rows drops less than the smallest.
    """
    labels = np.full(len(gram), k - 1)
    labels[np.argsort(-np.diag(gram), kind="stable")[: k - 1]] = np.arange(k - 1)
    return labels


def kept_energy(gram: Array, labels: Array) -> float:
    """Σ_j 1ⱼᵀ G 1ⱼ / nⱼ: what of tr G survives the projection."""
    m = np.eye(labels.max() + 1)[labels]
    return float((((gram @ m) * m).sum(0) / m.sum(0)).sum())


def refine(gram: Array, labels: Array, sweeps: int = 20) -> Array:
    """Move single channels between clusters while that lowers the error (Hartigan's rule); no cluster is emptied.

    Moving channel i from cluster a to b changes the error by n_b / (n_b + 1) d²(i, b) - n_a / (n_a - 1) d²(i, a). One
    sweep finds all channels with an improving move from one matrix product and then makes the moves, the best first,
    each checked against the clusters as they are by then. A local optimum of this rule is one of k-means as well, not
    the other way round (Telgarsky and Vattani 2010).
    """
    labels = labels.copy()
    squares = np.diag(gram)
    k = labels.max() + 1
    if k == 1 or k == len(labels):
        return labels
    m = np.eye(k)[labels]
    counts = m.sum(0)
    to_cluster = gram @ m  # (C, k): Σ of gram[i, members of j]
    within = (to_cluster * m).sum(0)  # (k,): 1ⱼᵀ G 1ⱼ
    tolerance = 1e-12 * squares.sum()

    def gain(i: Array) -> tuple[Array, Array]:
        """The best other cluster of channels i and by how much a move there lowers the error."""
        d = squares[i, None] - 2 * to_cluster[i] / counts + within / counts**2
        own = labels[i]
        rows = np.arange(len(i))
        n = counts[own]
        leave = np.where(n > 1, n / np.maximum(n - 1, 1) * d[rows, own], -np.inf)
        d *= counts / (counts + 1)
        d[rows, own] = np.inf
        best = d.argmin(1)
        return best, leave - d[rows, best]

    for _ in range(sweeps):
        _, gains = gain(np.arange(len(labels)))
        movers = np.flatnonzero(gains > tolerance)
        if not len(movers):
            break
        for i in movers[np.argsort(-gains[movers])]:
            (b,), (g,) = gain(np.array([i]))
            if g <= tolerance:
                continue
            a = labels[i]
            within[a] += squares[i] - 2 * to_cluster[i, a]
            within[b] += squares[i] + 2 * to_cluster[i, b]
            to_cluster[:, a] -= gram[:, i]
            to_cluster[:, b] += gram[:, i]
            counts[a] -= 1
            counts[b] += 1
            labels[i] = b
    return labels


def fold_labels(gram: Array, sizes: Sequence[int], refined: bool = True) -> dict[int, Array]:
    """The best folding found at every size: {k: labels (C,)}.

    Candidates are the cut of Ward's dendrogram and the special folding, so that folding at k + 1 never has a larger
    error than pruning at k in the same features.
    """
    chosen = {}
    for k, ward in cuts(dendrogram(gram), sizes):
        candidates = [ward, special_folding(gram, k)]
        if refined:
            candidates = [refine(gram, labels) for labels in candidates]
        chosen[k] = max(candidates, key=lambda labels: kept_energy(gram, labels))
    return chosen
