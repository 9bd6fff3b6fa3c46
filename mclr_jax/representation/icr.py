"""Invariant Contamination Ratio: how much of a feature is not about the image, from views of it.

Source: "Evaluating the Representation Space of Diffusion Models via Self-Supervised Principles"
(arXiv 2606.09718). A feature h of an image under random perturbations splits into s, its mean over
them, and the residual xi = h - s; d is its length:

    ICR = d / (d + Tr(Sigma_xi^-1 Sigma_s)),  in (0, 1], lower is cleaner.

Everything is float64 on the CPU, and unchanged by invertible affine maps of the features.
"""

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg
import scipy.special

from mclr_jax.evaluation.metrics import Moments, moments

MIN_EIGENVALUE = 1e-10  # of the residual's correlations; below it float32 features are rounding


@dataclasses.dataclass(frozen=True)
class Views:
    """Moments of V views of each of N images: all that the ratio needs. They merge over batches."""

    mean: Moments  # of an image's mean over its views
    contrasts: tuple[Moments, ...]  # V - 1 orthonormal ones of views; of two, (h1 - h2) / sqrt(2)
    direction: np.ndarray  # (d,) mean of all features, each scaled to unit length

    def merge(self, other: "Views") -> "Views":
        """Of both sets of images together."""
        mean = self.mean.merge(other.mean)
        contrasts = tuple(a.merge(b) for a, b in zip(self.contrasts, other.contrasts, strict=True))
        share = other.mean.count / mean.count
        return Views(mean, contrasts, self.direction + share * (other.direction - self.direction))

    @property
    def residual(self) -> np.ndarray:
        """Sigma_xi (d, d), unbiased; of two views Cov(h1 - h2) / 2 (App. B.6)."""
        return np.mean([contrast.cov for contrast in self.contrasts], axis=0)

    @property
    def invariant(self) -> np.ndarray:
        """Sigma_s (d, d), unbiased; of two views Cov((h1 + h2) / 2) - Cov(h1 - h2) / 4."""
        return self.mean.cov - self.residual / (len(self.contrasts) + 1)


def views(h: np.ndarray) -> Views:
    """Moments of finite features (V, N, d): V >= 2 views of each of N images; else ValueError."""
    h = np.asarray(h, np.float64)
    if h.ndim != 3 or len(h) < 2:
        raise ValueError(f"Got features of shape {h.shape}; expected (V, N, d), V at least 2.")
    contrasts = np.einsum("kv,vnd->knd", scipy.linalg.helmert(len(h)), h)
    length = np.maximum(np.linalg.norm(h, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return Views(moments(h.mean(0)), tuple(map(moments, contrasts)), (h / length).mean((0, 1)))


def check_size(count: int, size: int) -> None:
    """Raises ValueError where `count` images are too few for features of length `size`."""
    least = max(2 * size, size + 3)  # the second: E[Sigma_xi^-1] is finite
    if count < least:
        raise ValueError(
            f"Got {count} images for features of length {size}; expected at least {least} (twice "
            "that: fewer make covariances indefinite). Take more images or a narrower layer."
        )


def ratio(views: Views, bias_corrected: bool = False, ridge: float = 0.0) -> float:
    """ICR of accumulated views; by sampling noise it may come out a little above 1.

    The correction removes what the plain trace has too much with finite N. Exact for Gaussian
    features: with n = (N-1)(V-1), E[Sigma_xi^-1] of the estimate is n / (n-d-1) of the true. The
    ridge is tau of (Sigma_xi + tau I)^-1, in the unit of the features squared. ValueError: too few
    images, both options, or no residual in some direction.
    """
    count, size = views.mean.count, len(views.mean.mean)
    check_size(count, size)
    if ridge and bias_corrected:
        raise ValueError(f"Got ridge={ridge} with bias_corrected; the correction needs ridge=0.")
    residual = views.residual + ridge * np.eye(size)
    variances = np.where(np.diag(residual) > 0, np.diag(residual), 1)
    scale = np.sqrt(np.outer(variances, variances))
    correlations = residual / scale
    values, vectors = np.linalg.eigh(correlations)
    if values[0] < MIN_EIGENVALUE:
        raise ValueError(
            "The perturbations leave a direction of the features unmoved (least eigenvalue "
            f"{values[0]:.2g} of their correlations). Take another layer, or a ridge above 0."
        )
    inverse = vectors / values @ vectors.T / scale  # symmetric: Tr A^-1 B is a sum of products
    degrees = (count - 1) * len(views.contrasts)
    factor = (degrees - size - 1) / degrees if bias_corrected else 1.0
    own = np.sum(inverse * views.residual) if ridge else size
    signal = factor * np.sum(inverse * views.mean.cov) - own / (len(views.contrasts) + 1)
    return float(size / (size + signal))


def two_view_icr(h1: np.ndarray, h2: np.ndarray, **options: Any) -> float:
    """ICR from two views h1, h2 (N, d) of each of N images (App. B.6); options of `ratio`.

    The plain estimate falls with N (at d = 256 and a true value of .333 it is .18 at N = 512 and
    .32 at 4096), so N must be the same along a curve; the corrected one is .33 for all of them.
    """
    if np.shape(h1) != np.shape(h2):
        raise ValueError(f"Got views of shapes {np.shape(h1)} and {np.shape(h2)}; expected equal.")
    return many_view_icr(np.stack([h1, h2]), **options)


def many_view_icr(h: np.ndarray, bias_corrected: bool = False, ridge: float = 0.0) -> float:
    """ICR from V views of each of N images, h (V, N, d); of two it is `two_view_icr`."""
    return ratio(views(h), bias_corrected, ridge)


def traces(views: Views) -> dict[str, float]:
    """Tr Sigma_s, Tr Sigma_xi, and Tr Sigma_h of features scaled to unit length, in [0, 1]."""
    return {
        "invariance": float(np.trace(views.invariant)),
        "residual": float(np.trace(views.residual)),
        "expansion": float(1 - views.direction @ views.direction),
    }


def effective_rank(cov: np.ndarray) -> float:
    """exp of the entropy of a covariance's normalised eigenvalues, 1 to d (Roy, Vetterli 2007)."""
    values = np.maximum(np.linalg.eigvalsh(cov), 0)
    if values.sum() == 0:
        raise ValueError("Got a covariance of zero; expected features that vary.")
    return float(np.exp(scipy.special.entr(values / values.sum()).sum()))
