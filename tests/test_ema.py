import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from mclr_jax.schema import read
from mclr_jax.training import ema

REF = reference.load("edm2_heun_trajectory_and_phema")


def test_power_function_matches_the_reference():
    np.testing.assert_allclose(ema.power_exponent(REF["phema/std"]), REF["phema/exp"], rtol=1e-9)
    # The reference steps 10 images at a time: from 990 to 1000 is step 100 of that size.
    beta = ema.power(0.05)(99)
    np.testing.assert_allclose(
        beta, REF["phema/power_function_beta_std0.05_next1000_delta10"], rtol=1e-5
    )


def test_posthoc_coefficients_match_the_reference():
    got = ema.posthoc_coefficients(
        REF["phema/in_ofs"], REF["phema/in_std"], REF["phema/out_ofs"][0], REF["phema/out_std"][0]
    )
    np.testing.assert_allclose(got, REF["phema/coefs"][:, 0], rtol=1e-6, atol=1e-9)


@given(std=st.floats(0.01, 0.28))
def test_exponent_solves_its_equation(std):
    gamma = float(ema.power_exponent(std))
    np.testing.assert_allclose((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)), std**2, rtol=1e-8)


def run(decay, values):
    average = 0.0
    for step, value in enumerate(values):
        beta = float(decay(step))
        average = beta * average + (1 - beta) * value
    return average


def test_power_ema_weighs_by_a_power_of_time():
    """The average of f(t) = t under the profile t^gamma on [0, T] is T (gamma+1)/(gamma+2)."""
    gamma = float(ema.power_exponent(0.1))
    got = run(ema.power(0.1), np.arange(1, 2001))
    np.testing.assert_allclose(got, 2000 * (gamma + 1) / (gamma + 2), rtol=2e-3)


def test_posthoc_average_is_close_to_the_average_kept_all_along():
    """Of a noisy, drifting signal: snapshots of two tracks give a third track's value."""
    rng = np.random.default_rng(0)
    values = np.log(np.arange(1, 1025)) + 0.1 * rng.normal(size=1024)
    steps = np.arange(128, 1025, 128)
    stored = [(t, std, run(ema.power(std), values[:t])) for std in (0.05, 0.1) for t in steps]
    in_steps, in_stds, averages = map(np.array, zip(*stored, strict=True))
    weights = ema.posthoc_coefficients(in_steps, in_stds, 1024, 0.075)
    kept = run(ema.power(0.075), values)
    # A plain mix of the two final averages stands beside it as what the fit has to beat.
    assert abs(weights @ averages - kept) < abs(averages[[7, 15]].mean() - kept) / 5


def test_halflife_halves_and_ramps_up():
    decay = ema.halflife(100.0, ramp_up=0)
    np.testing.assert_allclose(jnp.prod(jnp.array([decay(s) for s in range(100)])), 0.5, rtol=1e-4)
    ramped = ema.halflife(100.0, ramp_up=0.05)
    assert float(ramped(0)) == 0.0  # the first update forgets the initialisation
    np.testing.assert_allclose(ramped(200), 0.5 ** (1 / 10), rtol=1e-6)
    np.testing.assert_allclose(ramped(10_000), 0.5 ** (1 / 100), rtol=1e-6)


def test_tracks_are_named_and_widths_checked():
    kept = ema.EMA(halflife_steps=10.0, power_stds=(0.05, 0.1))
    assert list(kept.tracks) == ["halflife", "power_0.05", "power_0.1"]
    with pytest.raises(ValueError, match="expected 0 < std"):
        ema.power(0.3)
    for key, value, message in (
        ("halflife", 3.0, "config.ema has no key 'halflife'. Did you mean 'halflife_steps'"),
        ("power_stds", (0.5,), r"config.ema.power_stds\[0\] is 0.5; .*above 0 and below 0.2"),
        ("power_stds", 0.1, "config.ema.power_stds is 0.1; expected any number of values"),
        (
            "ramp_up",
            2.0,
            "config.ema.ramp_up is 2.0; expected .* at least 0 and at most 1",
        ),
        (
            "snapshot_every",
            -1,
            "config.ema.snapshot_every is -1; expected an integer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read(ema.EMA, {key: value}, "config.ema")
