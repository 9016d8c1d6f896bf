"""Folding as clustering: one dendrogram per channel group, a cut per size, refined under the same metric.

All functions work on the Gram matrix G = W Wᵀ (C, C) of the channels' feature rows W (C, F), so that the cost after G
depends on C and not on F. Large groups come in single precision (weights.GroupWeights.dtype). The parameter error
‖W - P W‖² = tr G - Σ_j 1ⱼᵀ G 1ⱼ / nⱼ is minimised, which is the k-means objective ("Cut Less, Fold More", eq. 4). The
sum that is subtracted is called the kept energy; 1ⱼ is 1 for the nⱼ channels of cluster j, else 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import linkage

Array = np.ndarray


def dendrogram(gram: Array, method: str = "ward") -> Array:
    """The merges of a linkage, (C - 1, 2) int: the two nodes that become node C + i (0 ... C - 1 are the channels)."""
    if len(gram) == 1:
        return np.empty((0, 2), np.int64)
    return linkage(condensed(gram), method)[:, :2].astype(np.int64)


def condensed(gram: Array) -> Array:
    """Distances between the channels, (C (C - 1) / 2,) float64 as scipy keeps them: row by row, above the diagonal.

    Made by blocks of rows, because the whole matrix of 3,072 channels takes 38 MB, and twice the time.
    """
    squares = np.diag(gram)
    found, at = np.empty(len(gram) * (len(gram) - 1) // 2), 0
    for rows in blocks(len(gram), 128):
        distances = -2 * gram[rows, rows.start :]
        distances += squares[rows, None]
        distances += squares[rows.start :]
        np.sqrt(np.maximum(distances, 0, out=distances), out=distances)
        for i, row in enumerate(distances, start=1):
            found[at : at + len(row) - i] = row[i:]
            at += len(row) - i
    return found


def cuts(merges: Array, sizes: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """(k, labels (C,)) for every k in `sizes`, largest first."""
    channels = len(merges) + 1
    for k in sorted(sizes, reverse=True):
        done = channels - k
        above = np.arange(channels + done)  # for each node: a node that holds it
        above[merges[:done]] = channels + np.arange(done)[:, None]
        while (above != (higher := above[above])).any():
            above = higher
        yield k, np.unique(above[:channels], return_inverse=True)[1]


def special_folding(gram: Array, k: int) -> Array:
    """The folding of the theorem: the k - 1 channels of largest norm by themselves, all others in one cluster.

    Its error is at most that of every pruning that keeps k - 1 channels (theorem 1 of "Cut Less, Fold More"): the
    dropped rows are replaced by their mean instead of by zero, and no choice of rows drops less than the smallest.
    """
    labels = np.full(len(gram), k - 1)
    labels[by_norm(gram)[: k - 1]] = np.arange(k - 1)
    return labels


def by_norm(gram: Array) -> Array:
    """The channels, those of largest norm first."""
    return np.argsort(-np.diag(gram), kind="stable")


def special_energies(gram: Array, sizes: Sequence[int]) -> dict[int, float]:
    """{k: kept energy of special_folding(gram, k)}; the clusters are nested, so every pair is looked at once."""
    order = by_norm(gram)
    energies, within, end = {}, 0.0, len(gram)
    for k in sorted(sizes, reverse=True):
        new, merged = order[k - 1 : end], order[end:]
        sums = gram[new].sum(0)  # of whole rows: single entries of a large matrix take several times as long
        within += float(sums[new].sum() + 2 * sums[merged].sum())
        energies[k] = float(np.diag(gram)[order[: k - 1]].sum()) + within / (len(gram) - k + 1)
        end = k - 1
    return energies


def kept_energy(gram: Array, labels: Array) -> float:
    """Σ_j 1ⱼᵀ G 1ⱼ / nⱼ: the part of tr G that the projection keeps; a channel of label -1 is dropped."""
    kept = np.flatnonzero(labels >= 0)
    order = kept[np.argsort(labels[kept], kind="stable")]
    counts = np.bincount(labels[kept])
    ends = counts.cumsum()
    energies = np.empty(len(counts))
    for n in np.unique(counts[counts > 1]):  # clusters of one size at once, as there are many of two and three
        of_size = np.flatnonzero(counts == n)
        members = order[(ends[of_size] - n)[:, None] + np.arange(n)]
        within = gram[members[:, :, None], members[:, None, :]].reshape(len(of_size), -1)
        energies[of_size] = within.sum(1, dtype=np.float64) / n
    single = np.diag(gram)[order[ends[counts == 1] - 1]].sum(dtype=np.float64)
    return float(np.cumsum([single, *energies[counts > 1]])[-1])


def cluster_sums(gram: Array, labels: Array) -> tuple[Array, Array, Array]:
    """For every cluster j: nⱼ (k,), the sums 1ⱼᵀ G as rows (k, C), and 1ⱼᵀ G 1ⱼ (k,)."""
    counts = np.bincount(labels)
    first = np.empty(len(counts), np.int64)
    first[labels[::-1]] = np.arange(len(labels))[::-1]
    sums = gram[first]  # most clusters are single channels; whole rows are added to the others
    others = np.ones(len(labels), bool)
    others[first] = False
    for i in np.flatnonzero(others):
        sums[labels[i]] += gram[i]
    return counts.astype(gram.dtype), sums, np.bincount(labels, sums[labels, np.arange(len(labels))]).astype(gram.dtype)


def blocks(count: int, size: int) -> list[slice]:
    """0 ... count - 1 in slices of `size`: 3,072 channels by half as many clusters do not fit in the cache."""
    return [slice(i, i + size) for i in range(0, count, size)]


def refine(
    gram: Array, labels: Array, sweeps: int = 20, enough: float = 0.0, zero: bool = False
) -> tuple[float, Array]:
    """(kept energy, labels) after moving single channels between clusters while that lowers the error; none is emptied.

    Hartigan's rule: moving channel i from cluster a to b changes the error by
    n_b / (n_b + 1) d²(i, b) - n_a / (n_a - 1) d²(i, a). One sweep finds all channels with an improving move from one
    pass over (C, k) and then makes the moves, the best first, each checked against the clusters as they are by then. A
    local optimum of this rule is one of k-means as well, not the other way round (Telgarsky and Vattani 2010).

    enough: a sweep that lowers the error by less than this fraction of it is the last
    zero: the last cluster is dropped: its center is 0 and not its mean, and its channels add no energy
    """
    labels = labels.copy()
    squares = np.diag(gram)
    k = labels.max() + 1
    if not zero and k in (1, len(labels)):
        return kept_energy(gram, labels), labels
    counts, sums, within = cluster_sums(gram, labels)
    if zero:
        counts[-1] += 1e12  # channels that are 0 hold the center at 0
    tolerance = np.finfo(gram.dtype).eps ** 0.75 * squares.mean()

    def terms(j: Any) -> tuple[Array, Array, Array]:
        """(a, b, c) of the cost a Gᵢᵢ + b - c 1ⱼᵀ Gᵢ at which channel i joins cluster j."""
        n = counts[j]
        return n / (n + 1), within[j] / (n * (n + 1)), 2 / (n + 1)

    joins = np.stack(terms(slice(None)))
    constant = np.stack([squares, np.ones_like(squares)])

    def gains(i: Any) -> Array:
        """By how much the best move of each channel in i (indices or a slice), not alone in its cluster, lowers the
        error."""
        d = sums[:, i] * -joins[2][:, None]
        d += joins[:2].T @ constant[:, i]  # as one product, as memory takes the time
        own = labels[i], np.arange(d.shape[1])
        n = counts[labels[i]]
        leave = d[own] * (n + 1) / np.maximum(n - 1, tiny)
        d[own] = np.inf
        return leave - d.min(0)

    tiny = np.finfo(gram.dtype).tiny
    for _ in range(sweeps):
        shared = np.flatnonzero(counts[labels] > 1)
        # Gathering columns costs as much as all else, so all are taken where most channels are in shared clusters.
        every = 2 * len(shared) > len(labels)
        parts = blocks(len(labels if every else shared), 256)
        gain = np.concatenate([gains(part if every else shared[part]) for part in parts] or [np.empty(0)])
        gain = gain[shared] if every else gain
        order = np.argsort(-gain, kind="stable")
        movers = shared[order[gain[order] > tolerance]]
        if not len(movers):
            break
        won = 0.0
        for i in movers:
            a, n = labels[i], counts[labels[i]]
            if n == 1:
                continue
            # `gains` for one channel, without the cost of its many small arrays
            d = joins[1] - joins[2] * sums[:, i]
            d += joins[0] * squares[i]
            leave = d[a] * (n + 1) / (n - 1)
            d[a] = np.inf
            b = d.argmin()
            if leave - d[b] <= tolerance:
                continue
            won += leave - d[b]
            within[a] += squares[i] - 2 * sums[a, i]
            within[b] += squares[i] + 2 * sums[b, i]
            sums[a] -= gram[i]
            sums[b] += gram[i]
            counts[a] -= 1
            counts[b] += 1
            labels[i] = b
            for j in (a, b):
                joins[:, j] = terms(j)
        if won < enough * (squares.sum() - (within / counts).sum()):
            break
    return float((within / counts).sum(dtype=np.float64)), labels


# Groups with more channels, such as those of a ViT's MLP, are refined until a sweep wins less than a thousandth: nine
# cuts would cost seconds each. On 1,024 random, low-rank and clustered rows this is 3 to 4 times as fast as two trees
# refined to the end, and the squared error is larger by 0.1% on average and 0.6% at most.
LARGE = 1000  # so that a SimpleViT's 1,024 are among them
# Up to so many channels average linkage is a second candidate. For 27 cuts each of groups of 64, 128, 256 and 512
# channels it lowers the error by 0.02, 0.01, 0.01 and 0.001% on average, and at 512 takes longer than Ward's.
TWO_TREES = 256


def mixed_labels(gram: Array, sizes: Sequence[int]) -> dict[int, Array]:
    """The best mix of folding and pruning found at every size: {k: labels (C,)}, -1 = dropped.

    A mix has k clusters, and one more around zero that costs no channel. Its error is never larger than that of folding
    to k or of keeping any k channels. Candidates are folding to k + 1 without the cluster of least energy, folding to
    k, and pruning.
    """
    folded = fold_labels(gram, sorted({min(n, len(gram)) for k in sizes for n in (k, k + 1)}))
    chosen = {}
    for k in sizes:
        if k == len(gram):
            chosen[k] = folded[k]
            continue
        start = folded[k + 1]
        counts, _, within = cluster_sums(gram, start)
        last = (within / counts).argmin()
        dropped = np.where(start == last, k, start - (start > last))
        pruned = np.full(len(gram), k)
        pruned[by_norm(gram)[:k]] = np.arange(k)
        candidates = [refine(gram, one, zero=True) for one in (dropped, pruned)]
        candidates.append((kept_energy(gram, folded[k]), folded[k]))
        labels = max(candidates, key=lambda candidate: candidate[0])[1]
        chosen[k] = np.where(labels == k, -1, labels)
    return chosen


def fold_labels(gram: Array, sizes: Sequence[int], refined: bool = True) -> dict[int, Array]:
    """The best folding found at every size: {k: labels (C,)}.

    Candidates are the cut of Ward's dendrogram and the special folding, so that folding at k + 1 never has a larger
    error than pruning at k in the same features. Small refined groups have the cut of average linkage as a third: where
    few channels merge, no single move may mend Ward's first pairs. The special folding itself is not refined: that took
    longer than all else and lowered the mean error by under 0.1%.
    """
    large = len(gram) > LARGE
    linkages = ["ward"] + ["average"] * (refined and len(gram) <= TWO_TREES)
    trees = [dendrogram(gram, method) for method in linkages]
    levels = [dict(cuts(tree, sizes)) for tree in trees]
    special = special_energies(gram, sizes)
    chosen = {}
    for k in sizes:
        candidates = [
            refine(gram, level[k], enough=1e-3 if large else 0.0)
            if refined
            else (kept_energy(gram, level[k]), level[k])
            for level in levels
        ]
        energy, labels = max(candidates, key=lambda candidate: candidate[0])
        chosen[k] = labels if energy >= special[k] else special_folding(gram, k)
    return chosen


def greedy_order(shown: Array) -> Array:
    """(C,): channels in the order in which each adds most to Σ_i max_r shown_ir, r among those chosen so far.

    shown: (C, C), how much of channel i is kept where r stands for it. Gains only fall as channels are chosen
    (facility location is submodular), so a channel whose fresh gain beats all stale ones is next (Minoux 1978). The
    sum is at least 1 - 1/e of that of the best choice of as many (Nemhauser et al. 1978).
    """
    of = np.ascontiguousarray(shown.T)
    best, gains = np.zeros(len(of)), of.sum(1)
    order = np.empty(len(of), np.int64)
    for i in range(len(of)):
        while True:
            r = gains.argmax()
            gains[r] = np.maximum(of[r] - best, 0).sum()
            if gains[r] >= gains.max():
                break
        order[i], gains[r] = r, -np.inf
        np.maximum(best, of[r], out=best)
    return order


FLUSH = 64  # drops after which the matrices of surgeon_order are brought up to date, in one product
RIDGE = 1e-3  # ridge on second moments of activations, relative to the mean of their diagonal


def surgeon_order(moments: Array, contributions: Array) -> Array:
    """(C,): the channels in the order in which optimal brain surgeon drops them, the most expendable first.

    moments: E[a aᵀ] (C, C) of activations a; contributions: G = VᵀV (C, C) of the readers V, which are solved anew
    after every drop. Dropping q costs G_qq / (H⁻¹)_qq, and changes H⁻¹ by -u uᵀ and G by -(p vᵀ + v pᵀ), with
    u = H⁻¹ e_q / √(H⁻¹)_qq, v = H⁻¹ e_q / (H⁻¹)_qq and p = G e_q - G_qq v / 2. Single columns follow from the last
    FLUSH changes, so that the work on whole matrices is a few large products.
    """
    count = len(moments)
    inverse = np.linalg.inv(moments.astype(np.float64) + RIDGE * np.diag(moments).mean() * np.eye(count))
    gains = contributions.astype(np.float64)
    spread, loss = np.diag(inverse).copy(), np.diag(gains).copy()
    order = np.empty(count, np.int64)
    left = np.ones(count, bool)
    changes = np.zeros((3, FLUSH, count))  # u, v and p of the drops since the matrices were brought up to date
    u, v, p = changes
    for i in range(count):
        at = i % FLUSH
        if i and not at:
            inverse -= u.T @ u
            gains -= (crossed := p.T @ v) + crossed.T
            changes[:] = 0
        q = order[i] = np.where(left, loss / spread, np.inf).argmin()
        column = inverse[q] - u[:at, q] @ u[:at]
        v[at] = column / column[q]
        u[at] = column / np.sqrt(column[q])
        p[at] = gains[q] - p[:at, q] @ v[:at] - v[:at, q] @ p[:at] - loss[q] / 2 * v[at]
        spread -= u[at] ** 2
        loss -= 2 * p[at] * v[at]
        left[q] = False
        # What is left of a dropped channel is rounding, which must not come back with a later drop.
        spread[q], loss[q] = 1.0, 0.0
        np.maximum(spread, np.finfo(float).tiny, out=spread)
    return order
