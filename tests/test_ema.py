import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mclr_jax.training import ema

REF = reference.load("edm2_heun_trajectory_and_phema")


def test_power_function_matches_the_reference():
    np.testing.assert_allclose(ema.power_exponent(REF["phema/std"]), REF["phema/exp"], rtol=1e-9)
    # The reference steps 10 images at a time: from 990 to 1000 is step 100 of that size.
    beta = REF["phema/power_function_beta_std0.05_next1000_delta10"]
    np.testing.assert_allclose(ema.power(0.05)(99), beta, rtol=1e-5)


def test_posthoc_coefficients_match_the_reference():
    out = (REF[f"phema/out_{name}"][0] for name in ("ofs", "std"))
    got = ema.posthoc_coefficients(REF["phema/in_ofs"], REF["phema/in_std"], *out)
    np.testing.assert_allclose(got, REF["phema/coefs"][:, 0], rtol=1e-6, atol=1e-9)


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
