"""Sample quality and class separation, as functions of the features of any extractor.

All arrays are float64 on the CPU, with a sample in each row: (n, d). Distances and kernels are
computed in blocks of rows: 10,000 x 10,000 pairs take 80 MB and three copies of the features.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from scipy.special import rel_entr

COPY = 1 / 3  # largest ratio of the distances to the two nearest real samples of a copy
BLOCK_BYTES = 16 * 2**20  # of one block of pairwise values; memory holds up to five at a time


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of features; batch by batch: `functools.reduce(Moments.merge, map(moments, ...))`."""

    count: int  # of feature vectors; 0: not known
    mean: np.ndarray  # (d,)
    cov: np.ndarray  # (d, d), with ddof = 1 as in FID

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the union, without cancellation (Chan, Golub and LeVeque 1979)."""
        _check_same_dim(len(self.mean), len(other.mean))
        total, shift = self.count + other.count, other.mean - self.mean
        scatter = self.cov * (self.count - 1) + other.cov * (other.count - 1)
        scatter += np.outer(shift, shift) * (self.count * other.count / total)
        return Moments(total, self.mean + shift * (other.count / total), scatter / (total - 1))

    @functools.cached_property
    def root(self) -> np.ndarray:
        """F (d, r) with cov = F F^T and r the numerical rank, by an eigen-decomposition."""
        if self.count == 1:
            raise ValueError("Got 1 feature vector; a covariance needs at least 2. Add samples.")
        values, vectors = np.linalg.eigh(self.cov)
        keep = values > values.max() * len(values) * np.finfo(np.float64).eps
        return vectors[:, keep] * np.sqrt(values[keep])


def moments(features: np.ndarray) -> Moments:
    """Moments of features (n, d); one sample, such as a last batch, has zero covariance."""
    features = _as_features(features, "features")
    mean = features.mean(0)
    deviations = features - mean
    return Moments(len(features), mean, deviations.T @ deviations / max(len(features) - 1, 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians, >= 0.

    On Inception pool3 features: the FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6). Covariances
    may have a low rank (fewer samples than dimensions).
    """
    _check_same_dim(len(a.mean), len(b.mean))
    # With C = F F^T, the eigenvalues of C1^(1/2) C2 C1^(1/2) are the squared singular values of
    # F1^T F2, which lose no digits to a square root and are few when the rank is low.
    cross = np.linalg.svdvals(a.root.T @ b.root).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
    return max(float(distance), 0.0)


def per_class_frechet(
    features: np.ndarray, labels: np.ndarray, ref_features: np.ndarray, ref_labels: np.ndarray
) -> np.ndarray:
    """Frechet distance of each class to the same class of the real data, (K,), by rising label.

    Both sets have features (n, d), labels (n,), and 2 samples or more of each of K classes.
    """
    ours, real = _by_class(features, labels), _by_class(ref_features, ref_labels)
    if ours.keys() != real.keys():
        raise ValueError(f"Got classes {[*ours]}, in the real data {[*real]}; expected equal.")
    return np.array([frechet_distance(ours[c], real[c]) for c in real])


def inter_class_frechet(features: np.ndarray, labels: np.ndarray) -> float:
    """Class separation: mean Frechet distance over all pairs of classes (arXiv 2505.19210).

    features (n, d), labels (n,) of 2 classes or more.
    """
    classes = _by_class(features, labels)
    if len(classes) < 2:
        raise ValueError("Got samples of one class; expected 2 classes or more. Add a class.")
    pairs = itertools.combinations(classes.values(), 2)
    return float(np.mean([frechet_distance(*pair) for pair in pairs]))


def inception_score(probs: np.ndarray) -> float:
    """exp(E_x KL(p(y|x) || p(y))) of probs (n, K), in [1, K], over one split (arXiv 1606.03498)."""
    probs = _as_features(probs, "probs")
    off = np.abs(probs.sum(1) - 1).max()
    if probs.min() < 0 or off > 1e-3:
        got = f"minimum {probs.min():.3g} and row sums up to {off:.3g} off one"
        raise ValueError(f"Got probs with {got}; expected probabilities. Apply a softmax first.")
    return float(np.exp(rel_entr(probs, probs.mean(0)).sum(1).mean()))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1-2).

    Each real sample has a closed ball that reaches its k-th nearest real neighbour; precision is
    the share of fake samples in such balls. Recall exchanges real and fake.
    real (n, d), fake (m, d), k < n, k < m.
    """
    real, fake = _pair(real, fake)
    real_radius, fake_radius = _squared_radii(real, k, "real"), _squared_radii(fake, k, "fake")
    inside_real, inside_fake = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    for rows, squared in _squared_distances(fake, real):
        inside_real[rows] = (squared <= real_radius).any(1)
        inside_fake |= (squared <= fake_radius[rows, None]).any(0)
    return float(inside_real.mean()), float(inside_fake.mean())


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, sec. 3).

    Density is the mean number of real balls around a fake sample, divided by k; coverage is the
    share of real balls with a fake sample. The balls are open, as in the authors' code.
    real (n, d), fake (m, d), k < n.
    """
    real, fake = _pair(real, fake)
    radius = _squared_radii(real, k, "real")
    balls, nearest = 0, np.full(len(real), np.inf)
    for _, squared in _squared_distances(fake, real):
        balls += int(np.count_nonzero(squared < radius))
        nearest = np.minimum(nearest, squared.min(0))
    return balls / (k * len(fake)), float((nearest < radius).mean())


def two_nearest(
    real: np.ndarray | Iterable[np.ndarray], fake: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (m, 2) of each fake sample to its two nearest real samples, and their rows (m, 2).

    Distances are Euclidean; real (n, d), n >= 2, or batches of it, fake (m, d).
    """
    fake = _as_features(fake, "fake features")
    nearest = np.full((len(fake), 2), np.inf)
    places, start = np.zeros((len(fake), 2), np.int64), 0
    for batch in [real] if isinstance(real, np.ndarray) else real:
        batch, _ = _pair(batch, fake)
        for rows, squared in _squared_distances(fake, batch):
            known = np.hstack([nearest[rows], squared])
            found = np.argpartition(known, (0, 1), axis=1)[:, :2]
            nearest[rows] = np.take_along_axis(known, found, 1)
            earlier = np.take_along_axis(places[rows], np.minimum(found, 1), 1)
            places[rows] = np.where(found < 2, earlier, start + found - 2)
        start += len(batch)
    if np.isinf(nearest).any():
        raise ValueError("Got fewer than 2 real samples; the ratio needs 2 neighbours.")
    return np.sqrt(nearest), places


def copy_ratios(distances: np.ndarray) -> np.ndarray:
    """d1 / d2 (m,) of the distances of `two_nearest`; samples below COPY are copies.

    A sample between two equal real samples, at distance 0 from both, has the ratio 1. Source: Yoon
    et al. 2023; Gu et al. 2023 (arXiv 2310.02664).
    """
    first, second = distances.T
    return np.divide(first, second, out=np.ones_like(first), where=second > 0)


def memorized_fraction(real: np.ndarray | Iterable[np.ndarray], fake: np.ndarray) -> float:
    """Share of copies, see `copy_ratios`, of real samples (n, d) among fake ones (m, d)."""
    return copy_measures(copy_ratios(two_nearest(real, fake)[0]))["memorized"]


def copy_measures(ratios: np.ndarray) -> dict[str, float]:
    """The share of copies, and the ratio that a hundredth of the samples is below."""
    share = float((ratios < COPY).mean())
    return {"memorized": share, "copy_ratio": float(np.quantile(ratios, 0.01))}


def kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Unbiased MMD^2 under the kernel (x.y / d + 1)^3, over all samples; may be below zero.

    On Inception pool3 features: the KID (Binkowski et al. 2018, arXiv 1801.01401).
    real (n, d), fake (m, d); n and m are at least 2 and may differ.
    """
    real, fake = _pair(real, fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"Got {len(real)} real and {len(fake)} fake samples; expected 2 or more.")
    within = 0.0
    for x in (real, fake):
        diagonal = np.sum((np.sum(x * x, 1) / x.shape[1] + 1) ** 3)
        within += (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))
    return float(within - 2 * _kernel_sum(real, fake) / (len(real) * len(fake)))


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    blocks = (products / x.shape[1] + 1 for _, products in _products(x, y))
    return sum(float(np.sum(block * block * block)) for block in blocks)


def _products(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of x_i . y_j, as (rows, products (len(rows), len(y)))."""
    size = max(1, BLOCK_BYTES // (8 * len(y)))
    for rows in (slice(start, start + size) for start in range(0, len(x), size)):
        yield rows, x[rows] @ y.T


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of |x_i - y_j|^2, as (rows, squared distances (len(rows), len(y)))."""
    center = y.mean(0)  # centered, |x|^2 + |y|^2 - 2 x.y loses fewer digits
    x, y = x - center, y - center
    x_norms, y_norms = (np.einsum("ij,ij->i", rows, rows) for rows in (x, y))
    for rows, products in _products(x, y):
        norms = x_norms[rows, None] + y_norms
        squared = norms - 2 * products
        squared[squared < 1e-13 * norms] = 0.0  # rounding: duplicates are at distance 0
        yield rows, squared


def _squared_radii(x: np.ndarray, k: int, name: str) -> np.ndarray:
    """Squared distance of each x_i to its k-th nearest neighbour other than itself, (n,)."""
    if not 1 <= k < len(x):
        raise ValueError(
            f"Got k={k}, {len(x)} {name} samples; expected 1 <= k < n. Take more samples, or leave "
            "precision, recall, density and coverage out of --metrics."
        )
    radii = np.empty(len(x))
    for rows, squared in _squared_distances(x, x):
        radii[rows] = np.partition(squared, k)[:, k]  # not k - 1: the nearest is x_i itself
    return radii


def _as_features(features: np.ndarray, name: str) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.size == 0:
        raise ValueError(f"Got {name} of shape {features.shape}; expected (n, d), not empty.")
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        rows = f"{len(bad)} of {len(features)} rows, first {bad[0]}"
        raise ValueError(f"Got {name} not finite in {rows}; expected finite. Check the samples.")
    return features


def _check_same_dim(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"Got features of {a} and of {b} dimensions; use one extractor for both.")


def _pair(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real, fake = _as_features(real, "real features"), _as_features(fake, "fake features")
    _check_same_dim(real.shape[1], fake.shape[1])
    return real, fake


def _by_class(features: np.ndarray, labels: np.ndarray) -> dict[int, Moments]:
    """Moments of each class, by rising label."""
    features, labels = _as_features(features, "features"), np.asarray(labels)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"Got labels of shape {labels.shape} for {len(features)} features.")
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(f"Got 1 sample of class {classes[counts.argmin()]}; expected at least 2.")
    return {int(c): moments(features[labels == c]) for c in classes}
