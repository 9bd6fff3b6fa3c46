"""Invariant Contamination Ratio (ICR): how much perturbations of an image change its features.

Source: "Evaluating the Representation Space of Diffusion Models via Self-Supervised Principles"
(arXiv 2606.09718). A feature h of length d is the sum of its mean s over the perturbations of the
image and a residual xi:

    ICR = d / (d + Tr(Sigma_xi^-1 Sigma_s)),  in (0, 1]; lower is better.

All arrays are float64 on the CPU. Invertible affine maps of the features do not change the ICR.
"""

import dataclasses

import numpy as np
import scipy.linalg
import scipy.stats
from sklearn.preprocessing import normalize

from mclr_jax.evaluation.metrics import Moments, moments

MIN_EIGENVALUE = 1e-10  # of the residual's correlations; smaller ones are float32 rounding


@dataclasses.dataclass(frozen=True)
class Views:
    """Statistics of V views of each of N images, which merge over batches."""

    mean: Moments  # of an image's mean over its views
    contrasts: list[Moments]  # of V - 1 orthonormal contrasts; V = 2: (h1 - h2) / sqrt(2)
    direction: np.ndarray  # (d,) mean of all features, each scaled to unit length
    by_class: np.ndarray  # (K, d + 1) sums of the images' means, and numbers of images

    def merge(self, other: "Views") -> "Views":
        """Statistics of both sets of images together."""
        mean = self.mean.merge(other.mean)
        contrasts = list(map(Moments.merge, self.contrasts, other.contrasts))
        share = other.mean.count / mean.count
        direction = self.direction + share * (other.direction - self.direction)
        return Views(mean, contrasts, direction, self.by_class + other.by_class)

    @property
    def residual(self) -> np.ndarray:
        """Sigma_xi (d, d), unbiased; V = 2: Cov(h1 - h2) / 2 (App. B.6)."""
        return np.mean([contrast.cov for contrast in self.contrasts], axis=0)

    @property
    def invariant(self) -> np.ndarray:
        """Sigma_s (d, d), unbiased; V = 2: Cov((h1 + h2) / 2) - Cov(h1 - h2) / 4."""
        return self.mean.cov - self.residual / (len(self.contrasts) + 1)

    @property
    def within_classes(self) -> "Views":
        """Those of features less the mean of their class, whose estimate costs degrees of freedom.

        A network passes on the label that it is told: that offset is no property of the image.
        """
        sums, counts = np.split(self.by_class[self.by_class[:, -1] > 0], [-1], axis=1)
        if not 0 < len(counts) < self.mean.count:
            raise ValueError("Expected views with labels, of more images than classes.")
        offsets = sums / counts - self.mean.mean
        squares = (self.mean.count - 1) * self.mean.cov - (counts * offsets).T @ offsets
        cov = squares / (self.mean.count - len(counts))
        return dataclasses.replace(self, mean=dataclasses.replace(self.mean, cov=cov))


def views(h: np.ndarray, labels: np.ndarray | None = None, num_classes: int = 0) -> Views:
    """Statistics of features (V, N, d), with labels (N,) also by class; ValueError: not finite, or
    V < 2."""
    h = np.asarray(h, np.float64)
    if h.ndim != 3 or len(h) < 2:
        raise ValueError(f"Got features of shape {h.shape}; expected (V, N, d), V at least 2.")
    contrasts = np.einsum("kv,vnd->knd", scipy.linalg.helmert(len(h)), h)
    rows = h.reshape(-1, h.shape[-1])
    by_class = np.zeros((num_classes, h.shape[-1] + 1))
    if labels is not None:
        np.add.at(by_class, labels, np.insert(h.mean(0), h.shape[-1], 1.0, axis=1))
    means, contrasts = moments(h.mean(0)), list(map(moments, contrasts))
    return Views(means, contrasts, normalize(rows).mean(0), by_class)


def check_size(count: int, size: int) -> None:
    """ValueError if `count` images are too few for features of length `size`."""
    least = max(2 * size, size + 3)  # fewer: indefinite covariances, infinite E[Sigma_xi^-1]
    if count < least:
        got = f"{count} images for features of length {size}; expected at least {least}"
        raise ValueError(f"Got {got}. Use more images or a narrower layer.")


def ratio(views: Views, bias_corrected: bool = False) -> float:
    """ICR of accumulated views; sampling noise can raise it slightly above 1.

    The plain estimate depends on N (d = 256, true value .333: .18 at N = 512, .32 at N = 4096), so
    that a curve needs one N. The correction removes the bias, exactly for Gaussian features: with
    n = (N-1)(V-1), the mean of the estimated Sigma_xi^-1 is n / (n-d-1) times the true one.
    ValueError: too few images, or no residual in a direction.
    """
    count, size = views.mean.count, len(views.mean.mean)
    check_size(count, size)
    variances = np.where(np.diag(views.residual) > 0, np.diag(views.residual), 1)
    scale = np.sqrt(np.outer(variances, variances))
    values, vectors = np.linalg.eigh(views.residual / scale)  # of the correlations
    if values[0] < MIN_EIGENVALUE:
        raise ValueError(
            "The perturbations leave a direction of the features unmoved (least eigenvalue "
            f"{values[0]:.2g} of their correlations). Use another layer."
        )
    inverse = vectors / values @ vectors.T / scale  # symmetric: Tr A^-1 B is a sum of products
    degrees = (count - 1) * len(views.contrasts)
    factor = (degrees - size - 1) / degrees if bias_corrected else 1.0
    signal = factor * np.sum(inverse * views.mean.cov) - size / (len(views.contrasts) + 1)
    return float(size / (size + signal))


def traces(views: Views) -> dict[str, float]:
    """Tr Sigma_s, Tr Sigma_xi, and Tr Sigma_h of features scaled to unit length, in [0, 1]."""
    return {
        "invariance": float(np.trace(views.invariant)),
        "residual": float(np.trace(views.residual)),
        "expansion": float(1 - views.direction @ views.direction),
    }


def effective_rank(cov: np.ndarray) -> float:
    """exp(entropy) of a covariance's normalised eigenvalues, in [1, d] (Roy and Vetterli 2007)."""
    values = np.maximum(np.linalg.eigvalsh(cov), 0)
    if values.sum() == 0:
        raise ValueError("Got a covariance of zero; expected features that vary.")
    return float(np.exp(scipy.stats.entropy(values)))
