"""Measures of an analysis or a forecast against the truth, in NumPy.

Members have shape (N, E, T, *state), the truth (N, T, *state). All results are means over
trajectories, frames and coordinates, unless said otherwise.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats


def rmse(mean: np.ndarray, truth: np.ndarray, scale: np.ndarray | float = 1.0) -> float:
    """Root mean square error in units of `scale` (per last-axis coordinate; 1: physical units)."""
    return float(np.sqrt((((mean - truth) / scale) ** 2).mean()))


def crps(members: np.ndarray, truth: np.ndarray) -> float:
    """Continuous ranked probability score, mean |x - y| - mean |x - x'| / 2 over distinct members.

    The fair estimator (Ferro 2014, doi 10.1002/qj.2270): its expectation does not depend on E. It
    needs 2 members.
    """
    size = members.shape[1]
    if size < 2:
        raise ValueError(f"The fair CRPS needs 2 members or more; got {size}.")
    ordered = np.sort(members, axis=1)
    # sum over pairs i < j of x_j - x_i, by ranks
    weights = (2 * np.arange(size) - size + 1).reshape(size, *(1,) * (members.ndim - 2))
    pairs = (weights * ordered).sum(1) / (size * (size - 1))
    return float((np.abs(members - truth[:, None]).mean(1) - pairs).mean())


def spread_skill(members: np.ndarray, truth: np.ndarray) -> float:
    """Spread of the members over the error of their mean: 1 if the truth is like a member.

    sqrt((E + 1) / E mean variance / mean square error) (Fortin et al. 2014, doi
    10.1175/JHM-D-14-0008.1), with the unbiased variance.
    """
    size = members.shape[1]
    variance = (1 + 1 / size) * members.var(1, ddof=1).mean()
    return float(np.sqrt(variance / ((members.mean(1) - truth) ** 2).mean()))


def rank_histogram(members: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How often the truth has 0, 1, ... E members below it: shares (E + 1,), flat if calibrated.

    A truth that equals members counts for each rank that it could have among them.
    """
    below, equal = (f(members, truth[:, None]).sum(1).ravel() for f in (np.less, np.equal))
    size = members.shape[1] + 1
    counts = [np.bincount(np.minimum(below + i, size - 1), (i <= equal) / (equal + 1), size)
              for i in range(size)]  # fmt: skip
    return np.sum(counts, 0) / below.size


def wasserstein1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """W1 of samples a (n, d) and b (m, d), for each coordinate (d,): integral of |F_a - F_b|."""
    return np.array([stats.wasserstein_distance(*pair) for pair in zip(a.T, b.T, strict=True)])


def log_prior(path: np.ndarray, step: Callable, std: Any) -> np.ndarray:
    """log p(x_2 .. x_T | x_1) of paths (..., T, d) under x_k+1 = step(x_k) + std * noise: (...)."""
    return stats.norm.logpdf(path[..., 1:, :], step(path[..., :-1, :]), std).sum((-2, -1))


def log_likelihood(values: np.ndarray, predicted: np.ndarray, std: Any) -> np.ndarray:
    """log p(y | x) of values (..., T, m), given A(x) in `predicted`: (...); NaN is left out."""
    return np.nansum(stats.norm.logpdf(values, predicted, std), (-2, -1))


def energy_spectrum(field: np.ndarray) -> np.ndarray:
    """Variance of square fields (..., n, n) by wave number 0 .. n / 2, in shells of width 1.

    Over the whole plane of wave numbers the sum is the mean square; the corners are left out.
    """
    n = field.shape[-1]
    power = np.abs(np.fft.fft2(field)) ** 2 / n**4
    k = np.fft.fftfreq(n, 1 / n)
    shell = np.rint(np.hypot(k[:, None], k[None])).astype(int)
    return np.stack([power[..., shell == i].sum(-1) for i in range(n // 2 + 1)], axis=-1)


def summary(members: np.ndarray, truth: np.ndarray, scale: np.ndarray | tuple) -> dict[str, float]:
    """Errors of members (N, E, T, *state); `standardised`: in units of `scale`, if it has any."""
    found = {"rmse": rmse(members.mean(1), truth)}
    if len(scale):
        found["standardised"] = rmse(members.mean(1), truth, np.asarray(scale))
    if members.shape[1] > 1:
        found |= {"crps": crps(members, truth), "spread_skill": spread_skill(members, truth)}
    return found
