import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mclr_jax import guidance
from mclr_jax.types import Condition, label_of


@pytest.mark.parametrize("case", range(3))
def test_cfg_matches_reference(case):
    ref = reference.load("mixture_samplers")
    with jax.enable_x64(True):
        x, sigma = jnp.asarray(ref[f"exact/{case}/x"]), ref[f"exact/{case}/sigma"]
        labels = jnp.asarray(ref["labels"], jnp.int32)
        denoise = guidance.classifier_free(reference.mixture().denoise, 3, 2.5)
        got = denoise(x, jnp.full(16, sigma), labels)
        np.testing.assert_allclose(got, ref[f"exact/{case}/denoised_cfg_gamma1.5"], rtol=1e-9)


def test_an_interval_includes_its_upper_end_and_not_its_lower_one():
    """Of autoguidance: weak + scale (strong - weak) inside, and strong outside."""
    sigma, label = jnp.array([0.25, 0.5, 0.75, 1.5, 1.75]), jnp.arange(5)
    guided = guidance.autoguidance(
        lambda x, s, c: 2 * x + c[:, None], lambda x, s, c: x + (s + c)[:, None], 3.0, (0.5, 1.5)
    )
    found = guided(jnp.ones((5, 1)), sigma, label)
    # 2 outside, 1 + s + 3 (2 - 1 - s) inside
    beyond_label = [2, 2, 4 - 2 * 0.75, 4 - 2 * 1.5, 2]
    np.testing.assert_allclose(found[:, 0] - label, beyond_label, rtol=1e-6)


def test_frames_are_guided_where_their_own_level_is_inside():
    """sigma (B, F), and a scale for each example, against the formula frame by frame."""
    mix = reference.mixture()

    def denoise(x, sigma, condition):  # of every frame alone
        label = jnp.repeat(label_of(condition), 4)
        return mix.denoise(x.reshape(-1, 2), sigma.reshape(-1), label).reshape(x.shape)

    x = jnp.linspace(-2, 2, 24).reshape(3, 4, 2)
    sigma = jnp.array([[0.05, 0.5, 1.0, 2.0], [2.0, 0.5, 4.0, 1.0], [3.0, 3.0, 0.1, 0.1]])
    label, scale = jnp.array([0, 1, 2]), jnp.array([1.0, 2.5, 4.0])
    guided = guidance.classifier_free(denoise, 3, scale, (0.4, 1.0))(x, sigma, label)
    cond, uncond = denoise(x, sigma, label), denoise(x, sigma, jnp.full(3, 3))
    inside = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    expected = jnp.where(inside[..., None], uncond + scale[:, None, None] * (cond - uncond), cond)
    chex.assert_trees_all_close(guided, expected, rtol=1e-4, atol=1e-5)
    everywhere = guidance.classifier_free(denoise, 3, scale)(x, sigma, label)
    expected = uncond + scale[:, None, None] * (cond - uncond)
    chex.assert_trees_all_close(everywhere, expected, rtol=1e-4, atol=1e-5)


def test_only_the_label_of_the_condition_differs_between_the_calls():
    seen = []

    def denoise(x, sigma, condition):
        jax.debug.callback(lambda *c: seen.append([np.asarray(a) for a in c]), *(
            condition.label, condition.strength, condition.augment))  # fmt: skip
        return x

    condition = Condition(jnp.array([0, 1]), jnp.array([0.5, 2.0]), jnp.ones((2, 9)))
    guidance.classifier_free(denoise, 3, 2.0)(jnp.ones((2, 2)), jnp.ones(2), condition)
    jax.effects_barrier()
    (label, *rest), (null, *same) = sorted(seen, key=lambda shown: shown[0].sum())
    np.testing.assert_array_equal(label, [0, 1])
    np.testing.assert_array_equal(null, [3, 3])
    chex.assert_trees_all_equal(rest, same, [condition.strength, condition.augment])
