import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(deadline=None, max_examples=25)
@given(scale=st.floats(-1, 5), low=st.floats(0, 2), width=st.floats(0.1, 3))
def test_interval_guides_inside_and_only_inside(scale, low, width):
    mix = reference.mixture()
    sigma = jnp.array([0.05, 0.5, 1.0, 2.0, 4.0])
    x, label = jnp.linspace(-2, 2, 10).reshape(5, 2), jnp.array([0, 1, 2, 0, 1])
    guided = guidance.classifier_free(mix.denoise, 3, scale, (low, low + width))
    cond = mix.denoise(x, sigma, label)
    uncond = mix.denoise(x, sigma, jnp.full(5, 3))
    inside = (np.float32(low) < sigma) & (sigma <= np.float32(low + width))
    expected = jnp.where(inside[:, None], uncond + scale * (cond - uncond), cond)
    chex.assert_trees_all_close(guided(x, sigma, label), expected, rtol=1e-4, atol=1e-5)


def test_an_interval_includes_its_upper_end_and_not_its_lower_one():
    sigma, label = jnp.array([0.25, 0.5, 0.75, 1.5, 1.75]), jnp.zeros(5, jnp.int32)
    guided = guidance.autoguidance(
        lambda x, s, c: 2 * x, lambda x, s, c: x, 3.0, (0.5, 1.5)
    )  # 1 + 3 (2 - 1) inside, 2 outside
    found = guided(jnp.ones((5, 1)), sigma, label)
    np.testing.assert_array_equal(found[:, 0], [2, 2, 4, 4, 2])


def test_transforms_compose_and_scales_may_differ_by_example():
    """CFG of autoguidance, against the formula written out, with a scale for each example."""
    mix = reference.mixture()
    x, sigma, label = jnp.ones((3, 2)), jnp.array([0.5, 1.0, 2.0]), jnp.array([0, 1, 2])
    scales = jnp.array([1.0, 2.0, 4.0])

    def weak(x, sigma, condition):
        return mix.denoise(x, sigma * 1.5, condition)

    def auto(label):
        strong = mix.denoise(x, sigma, label)
        return weak(x, sigma, label) + 1.4 * (strong - weak(x, sigma, label))

    expected = auto(jnp.full(3, 3)) + scales[:, None] * (auto(label) - auto(jnp.full(3, 3)))
    inner = guidance.autoguidance(mix.denoise, weak, 1.4)
    got = guidance.classifier_free(inner, 3, scales)(x, sigma, label)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(
    ("scale", "interval", "calls"), [(1.0, None, 1), (2.0, None, 2), (2.0, (3.0, 4.0), 1)]
)
def test_no_second_call_where_nothing_is_guided(scale, interval, calls):
    count = []

    def denoise(x, sigma, condition):
        jax.debug.callback(lambda: count.append(1))
        return x

    guided = jax.jit(lambda *a: guidance.classifier_free(denoise, 3, scale, interval)(*a))
    x = jnp.ones((2, 2))
    out = guided(x, jnp.ones(2), jnp.array([0, 1]))
    jax.effects_barrier()
    assert len(count) == calls
    chex.assert_trees_all_equal(out, x)
