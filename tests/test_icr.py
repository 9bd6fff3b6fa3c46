"""Closed forms on Gaussian features, whose ratio is known."""

import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mclr_jax.representation import icr


def gaussian(seed, count, invariant, residual, number_of_views=2):
    """Features (V, N, d) with these covariances, given by their diagonals (d,)."""
    rng, size = np.random.default_rng(seed), len(invariant)
    s = rng.normal(size=(count, size)) * np.sqrt(invariant)
    noise = rng.normal(size=(number_of_views, count, size)) * np.sqrt(residual)
    return 3.0 + s + noise


def of_views(h, bias_corrected=False):
    """The ratio of features (V, N, d)."""
    return icr.ratio(icr.views(h), bias_corrected)


def true_ratio(invariant, residual):
    return len(invariant) / (len(invariant) + np.sum(np.asarray(invariant) / residual))


@pytest.mark.parametrize("count", [512, 1024])
def test_the_corrected_ratio_of_gaussian_features_is_the_populations(count):
    """d = 256 and a true ratio of 1/3; within 1%, and the plain one's bias is as computed."""
    size = 256
    h = [gaussian(seed, count, np.full(size, 2.0), np.ones(size)) for seed in range(2)]
    corrected = np.mean([of_views(x, bias_corrected=True) for x in h])
    assert corrected == pytest.approx(1 / 3, rel=0.01)
    factor = (count - 1) / (count - 1 - size - 1)  # of Cov(t), whose mean is 2.5 Sigma_xi
    expected = 1 / (1 + 2.5 * factor - 0.5)
    assert of_views(h[0]) == pytest.approx(expected, rel=0.015)


def test_the_correction_is_exact_for_few_images():
    """12 images and d = 4, where n - d in place of n - d - 1 would be 17% too much."""
    invariant, residual = np.array([3.0, 1.0, 2.0, 0.5]), np.array([1.0, 0.5, 2.0, 1.5])
    ratios = [
        of_views(gaussian(seed, 12, invariant, residual), bias_corrected=True)
        for seed in range(3000)
    ]
    traces = 4 / np.array(ratios) - 4  # the estimates of Tr(Sigma_xi^-1 Sigma_s)
    error = traces.std() / np.sqrt(len(traces))
    assert error < 0.03 * traces.mean()
    assert abs(traces.mean() - np.sum(invariant / residual)) < 4 * error


@pytest.mark.parametrize("number_of_views", [2, 8])
def test_any_number_of_views_estimates_the_same_ratio(number_of_views):
    """For two views the explicit form is that of the paper."""
    invariant, residual = np.linspace(1, 3, 16), np.linspace(2, 0.5, 16)
    h = gaussian(1, 4000, invariant, residual, number_of_views)
    expected = true_ratio(invariant, residual)
    assert of_views(h, bias_corrected=True) == pytest.approx(expected, rel=0.02)
    # The explicit form: the mean over views, and what each view has beside it.
    within = np.concatenate(h - h.mean(0) - h.mean(1, keepdims=True) + h.mean((0, 1)))
    sigma_xi = within.T @ within / ((len(h) - 1) * (h.shape[1] - 1))
    sigma_s = np.cov(h.mean(0).T) - sigma_xi / len(h)
    explicit = 16 / (16 + np.trace(np.linalg.solve(sigma_xi, sigma_s)))
    assert of_views(h) == pytest.approx(explicit, rel=1e-10)


@hypothesis.given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 6),
    number_of_views=st.integers(2, 4),
    log_scale=st.floats(-6, 6),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_invertible_affine_maps_change_nothing(seed, size, number_of_views, log_scale):
    rng = np.random.default_rng(seed)
    h = gaussian(seed, 40, rng.uniform(0.1, 3, size), rng.uniform(0.1, 3, size), number_of_views)
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = 10**log_scale * q @ np.diag(rng.uniform(0.2, 5, size)) @ np.linalg.qr(r)[0]
    mapped = h @ matrix + 10**log_scale * rng.normal(size=size)
    for corrected in (False, True):
        expected = of_views(h, corrected)
        assert of_views(mapped, corrected) == pytest.approx(expected, rel=1e-7)


@hypothesis.given(cuts=st.lists(st.integers(1, 63), unique=True, max_size=5))
@hypothesis.settings(max_examples=25, deadline=None)
def test_batches_merge_to_the_whole(cuts):
    h = gaussian(2, 64, np.linspace(1, 2, 5), np.ones(5), 3)
    labels, cuts = np.arange(64) % 7, sorted(cuts)
    parts = zip(np.split(h, cuts, axis=1), np.split(labels, cuts), strict=True)
    merged = functools.reduce(icr.Views.merge, [icr.views(*part, 9) for part in parts])
    whole = icr.views(h, labels, 9)
    np.testing.assert_allclose(merged.residual, whole.residual, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(merged.invariant, whole.invariant, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(merged.direction, whole.direction, rtol=1e-10)
    assert icr.ratio(merged) == pytest.approx(icr.ratio(whole), rel=1e-10)
    inside = [icr.ratio(views.within_classes) for views in (merged, whole)]
    assert inside[0] == pytest.approx(inside[1], rel=1e-10)


def test_offsets_between_classes_leave_the_ratio_within_as_it_is():
    """24 images in 8 classes, d = 4: without the lost degrees of freedom Tr would be 40% too small;
    and once as deviations of each image from the mean of its class."""
    invariant, residual = np.array([3.0, 1.0, 2.0, 0.5]), np.array([1.0, 0.5, 2.0, 1.5])
    labels, rng = np.arange(24) % 8, np.random.default_rng(0)
    offsets = 10 * rng.normal(size=(8, 4))[labels]
    found = [icr.views(gaussian(seed, 24, invariant, residual) + offsets, labels, 10).within_classes
             for seed in range(800)]  # fmt: skip
    traces = 4 / np.array([icr.ratio(views, True) for views in found]) - 4
    error = traces.std() / np.sqrt(len(traces))
    assert error < 0.05 * traces.mean()
    assert abs(traces.mean() - np.sum(invariant / residual)) < 4 * error
    h = gaussian(799, 24, invariant, residual)
    means = (h + offsets).mean(0)
    off = means - np.stack([means[labels == label].mean(0) for label in labels])
    np.testing.assert_allclose(found[-1].mean.cov, off.T @ off / (24 - 8), rtol=1e-9)
    np.testing.assert_allclose(found[-1].residual, icr.views(h).residual, rtol=1e-9)


def test_traces_and_effective_rank_have_closed_forms():
    invariant, residual = np.array([4.0, 1.0, 1.0]), np.array([1.0, 2.0, 0.5])
    found = icr.traces(icr.views(gaussian(3, 100_000, invariant, residual)))
    assert found["invariance"] == pytest.approx(6, rel=0.02)
    assert found["residual"] == pytest.approx(3.5, rel=0.02)
    opposite = np.tile([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, -5.0]], (2, 1, 1))
    assert icr.traces(icr.views(opposite))["expansion"] == pytest.approx(1)
    assert icr.traces(icr.views(np.ones((2, 9, 4))))["expansion"] == pytest.approx(0, abs=1e-12)
    assert icr.effective_rank(np.eye(7)) == pytest.approx(7)
    assert icr.effective_rank(np.diag([1.0, 0, 0])) == pytest.approx(1)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert icr.effective_rank(np.diag([3.0, 1.0, 0])) == pytest.approx(np.exp(entropy))


def test_bad_input_is_explained():
    h = gaussian(0, 40, np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match=r"40 images for features of length 21.*least 42.*narrow"):
        of_views(gaussian(0, 40, np.ones(21), np.ones(21)))
    with pytest.raises(ValueError, match=r"\(40, 4\).*expected \(V, N, d\)"):
        of_views(h[0])
    flat = h * np.array([1, 1, 1, 0])
    with pytest.raises(ValueError, match=r"unmoved.*another layer"):
        of_views(flat)
    doubled = np.concatenate([h, h @ np.ones((4, 1))], axis=-1)
    with pytest.raises(ValueError, match="unmoved"):
        of_views(doubled)
    with pytest.raises(ValueError, match="features that vary"):
        icr.effective_rank(np.zeros((3, 3)))
    for labelled in (icr.views(h), icr.views(h, np.arange(40), 40)):
        with pytest.raises(ValueError, match="more images than classes"):
            _ = labelled.within_classes
    with pytest.raises(ValueError, match="not finite"):
        of_views(h * np.nan)
