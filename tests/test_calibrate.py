"""Strengths by class: crossings in closed form, and a network whose right strengths are known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax.calibrate import calibrate, crossings, recognition
from mclr_jax.data.protocol import Arrays
from mclr_jax.denoiser import EDM
from mclr_jax.evaluation.features import Extractor
from mclr_jax.mixture import toy
from mclr_jax.model import DataInfo, Model
from mclr_jax.samplers import Sampler
from mclr_jax.types import expand, with_label

GRID = np.linspace(0.0, 2.0, 5)
EXACT, SIGMA = toy(), 0.3
SHARES = (1.0, 0.8, 0.5, 1.0)  # of D_c - D_null, that the network below gives


@pytest.mark.parametrize(("means", "real", "expected"), [
    (0.5 + 0.2 * GRID, 0.66, 0.8),  # linear
    (1 / (1 + np.exp(-GRID)), 1 / (1 + np.exp(-1.5)), 1.5),  # logistic, at a strength of the grid
    (0.5 + 0.2 * GRID, 0.3, 0.0),  # already above
    (0.5 + 0.2 * GRID, 0.5, 0.0),  # just there
    (0.5 + 0.2 * GRID, 0.95, 2.0),  # never there
    ([0.5, 0.7, 0.6, 0.9, 0.8], 0.6, 0.25),  # the smallest of several
    ([0.5, 0.7, 0.6, 0.9, 0.8], 0.8, 1.25),  # from the maximum before, 0.7
    ([0.5, 0.7, 0.7, 0.7, 0.8], 0.7, 0.5),  # the beginning of a plateau
])  # fmt: skip
def test_a_strength_is_where_the_means_first_reach_the_real_one(means, real, expected):
    others = np.array([np.full(5, 0.2), means, np.full(5, 0.9)]).T  # never there, and always
    np.testing.assert_allclose(
        crossings(GRID, others, np.array([0.5, real, 0.5])), [2.0, expected, 0.0], atol=1e-12
    )


class Weakened(nn.Module):
    """The mixture's denoiser with only a share of the class's own effect, at sigma_data 1.

    The shares are its parameter.
    """

    @nn.compact
    def __call__(self, x, c_noise, condition):
        sigma = jnp.exp(4 * c_noise)
        scales = EDM(sigma_data=1.0).scales(sigma)
        x = x / expand(scales.c_in, x)
        null = EXACT.denoise(x, sigma, with_label(condition, 3))
        shares = self.param("shares", lambda key: jnp.asarray(SHARES))
        share = expand(shares[condition.label], x)
        denoised = null + share * (EXACT.denoise(x, sigma, condition) - null)
        return (denoised - expand(scales.c_skip, x) * x) / expand(scales.c_out, x)


def exact_classifier(sigma):
    def apply(weights, x):
        logits = EXACT.log_prob_given_label(x, sigma) + jnp.log(EXACT.class_prior)
        return jnp.zeros((len(x), 1)), logits

    return Extractor("exact", {}, apply)


def test_the_recognition_of_data_is_their_exact_posterior():
    """Against the posterior of data with other noise; the standard error is that of the mean."""
    x, label = map(np.asarray, EXACT.sample(jax.random.key(0), 6000))
    mean, error = recognition(exact_classifier(SIGMA), x, label, SIGMA, seed=0)
    noisy = x + SIGMA * np.random.default_rng(7).normal(size=x.shape)
    found = np.asarray(EXACT.posterior(noisy, SIGMA))[np.arange(len(x)), label]
    for c in range(3):
        own = found[label == c]
        assert abs(mean[c] - own.mean()) < 4 * error[c]
        np.testing.assert_allclose(error[c], own.std() / np.sqrt(len(own)), rtol=0.1)
    with pytest.raises(ValueError, match=r"Class 2 has 0 of .* examples; expected at least 2"):
        recognition(exact_classifier(SIGMA), x[label < 2], label[label < 2], SIGMA, seed=0)


def weakened(**options):
    """What is found for `Weakened`."""
    model = Model(Weakened(), EDM(sigma_data=1.0), DataInfo((2,), 3, 1.0))
    x, label = map(np.asarray, EXACT.sample(jax.random.key(0), 10_000))
    return calibrate(
        model, {"shares": jnp.array(SHARES)}, Sampler("dpmpp_2m", 20, 0.02, 20.0),
        exact_classifier(SIGMA), Arrays(x, label, 3), grid=7, samples_per_class=3000, sigma=SIGMA,
        batch_size=9000, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def calibrated():
    """Strengths 0 to 1.5."""
    return weakened(max_strength=1.5)


def test_a_class_whose_label_acts_with_a_share_of_its_effect_gets_the_rest_as_guidance(calibrated):
    """CFG of strength s multiplies the share by 1 + s: 1 / share - 1 makes the network exact."""
    expected = 1 / np.array(SHARES[:3]) - 1  # 0, 1 / 4 and 1
    strengths = 1.5 * np.array(calibrated["class_strengths"])
    np.testing.assert_allclose(strengths, expected, atol=0.1)
    low, high = (1.5 * np.array(calibrated[f"at_one_error_{x}"]) for x in ("less", "more"))
    assert ((low <= strengths) & (strengths <= high)).all()
    assert (low < high).all()


def test_a_fine_tuning_that_goes_too_far_gets_the_place_where_its_network_is_exact():
    """The shares are linear in the weights: they are 1 at (1 - share) / (1.5 - share)."""
    start, tuned = jnp.array(SHARES), jnp.full(4, 1.5)
    found = weakened(weights=lambda place: {"shares": start + place * (tuned - start)})
    expected = ((1 - start) / (tuned - start))[:3]  # 0, 2 / 7 and 1 / 2
    np.testing.assert_allclose(found["class_strengths"], expected, atol=0.07)
    assert found["network_calls"] == 9000 * 7 * 20  # no guidance


def test_the_result_says_what_it_was_found_from(calibrated):
    rows = calibrated["by_strength"]
    np.testing.assert_allclose([row["strength"] for row in rows], np.linspace(0, 1.5, 7))
    assert calibrated["unreached"] == []
    # an exact network is as recognisable as data: class 0 without guidance, class 2 at strength 1
    real, errors = calibrated["real"]["mean"], calibrated["real"]["standard_error"]
    assert abs(rows[0]["mean"][0] - real[0]) < 4 * np.hypot(errors[0], rows[0]["standard_error"][0])
    assert abs(rows[4]["mean"][2] - real[2]) < 4 * np.hypot(errors[2], rows[4]["standard_error"][2])
    assert calibrated["network_calls"] == 9000 * (20 + 6 * 40)
    assert calibrated["classifier_calls"] == 10_000 + 7 * 9000


@pytest.mark.parametrize(("options", "message"), [
    ({"max_strength": 0.0}, "max_strength is 0.0; expected a number above 0"),
    ({"grid": 1}, "grid is 1; expected an integer of at least 2"),
    ({"samples_per_class": 1}, "samples_per_class is 1"),
    ({"sigma": float("nan")}, "sigma is nan"),
])  # fmt: skip
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(None, {}, None, None, None, **options)
