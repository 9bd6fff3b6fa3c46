import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mclr_jax.mixture import GaussianMixture, toy


@pytest.mark.parametrize("case", range(3))
def test_densities_posteriors_and_denoisers_match_reference(case):
    ref = {k.split("/")[-1]: v for k, v in reference.load("mixture_samplers").items()
           if k.startswith(f"exact/{case}/")}  # fmt: skip
    with jax.enable_x64(True):
        mix, x, sigma = reference.mixture(), jnp.asarray(ref["x"]), ref["sigma"]
        labels = jnp.asarray(reference.load("mixture_samplers")["labels"], jnp.int32)
        got = {
            "log_p_x_given_class": mix.log_prob_given_label(x, sigma),
            "log_p_x": mix.log_prob(x, sigma),
            "posterior": mix.posterior(x, sigma),
            "denoised_class": mix.denoise(x, sigma, labels),
            "denoised_null": mix.denoise(x, sigma, jnp.full_like(labels, 3)),
        }
        chex.assert_trees_all_close(got, {k: ref[k] for k in got}, rtol=1e-7, atol=1e-7)


def random_mixture(seed, num_classes=3, components=2, dim=2):
    rng = np.random.default_rng(seed)
    return GaussianMixture(
        means=jnp.asarray(2 * rng.normal(size=(num_classes, components, dim))),
        stds=jnp.asarray(rng.uniform(0.2, 1.0, (num_classes, components))),
        weights=jnp.asarray(rng.dirichlet(np.ones(components), num_classes)),
        class_prior=jnp.asarray(rng.dirichlet(np.full(num_classes, 3.0))),
    )


def test_tweedie_and_bayes():
    """D = x + sigma^2 grad log p (Tweedie), and p(x) = sum_c p(c) p(x|c), on a random mixture."""
    with jax.enable_x64(True):
        mix, sigma = random_mixture(1), jnp.geomspace(0.1, 10, 20)
        x = jnp.asarray(np.random.default_rng(2).normal(size=(20, 2)) * (1 + sigma)[:, None])
        label = jnp.arange(20) % 4  # 3 is the null label

        def log_density(point, sigma, label):
            per_class = mix.log_prob_given_label(point[None], sigma)[0]
            everything = mix.log_prob(point[None], sigma)[0]
            return jnp.append(per_class, everything)[label]

        slope = jax.jit(jax.vmap(jax.grad(log_density)))(x, sigma, label)
        tweedie = x + sigma[:, None] ** 2 * slope
        np.testing.assert_allclose(mix.denoise(x, sigma, label), tweedie, rtol=1e-8, atol=1e-8)
        joint = jnp.exp(mix.log_prob_given_label(x, sigma)) * mix.class_prior
        posterior = joint / jnp.exp(mix.log_prob(x, sigma))[:, None]
        np.testing.assert_allclose(mix.posterior(x, sigma), posterior, rtol=1e-8)


def test_the_toy_has_the_symmetry_that_it_should():
    """Turned by a third, each class is the next but one; each meets the others on both sides."""
    mix = toy()
    turn = 2 * np.pi / 3 * np.arange(3)
    points = np.asarray(mix.means, np.float64) @ [1, 1j]  # (3, 2) on a ring
    np.testing.assert_allclose(np.abs(points), 1.55, rtol=1e-6)
    np.testing.assert_allclose(points[:, 1], -points[:, 0], atol=1e-6)
    around = np.argsort(np.angle(points).ravel())
    assert all(
        set(np.take(around // 2, range(i, i + 3), mode="wrap")) == {0, 1, 2} for i in range(6)
    )
    x = jnp.stack([2 * jnp.cos(turn), 2 * jnp.sin(turn)], axis=1)
    posterior = np.sort(mix.posterior(x, 0.5), axis=1)
    np.testing.assert_allclose(posterior, posterior[[1, 2, 0]], rtol=1e-4)


def test_samples_have_the_moments_of_each_class():
    mix = random_mixture(3)
    x, label = mix.sample(jax.random.key(0), 200_000)
    for c in range(3):
        w = np.asarray(mix.weights[c])
        mean = w @ np.asarray(mix.means[c])
        second = w @ np.asarray(mix.means[c] ** 2 + mix.stds[c][:, None] ** 2)
        members = np.asarray(x)[np.asarray(label) == c]
        assert abs(len(members) / 200_000 - mix.class_prior[c]) < 0.005
        np.testing.assert_allclose(members.mean(0), mean, atol=0.05)
        np.testing.assert_allclose((members**2).mean(0), second, rtol=0.03)


def test_mismatched_shapes_are_refused():
    shapes = {"stds": (3, 2), "weights": (3, 2), "class_prior": (3,)}
    GaussianMixture(jnp.zeros((3, 2, 2)), **{name: jnp.ones(s) for name, s in shapes.items()})
    for name, shape in shapes.items():
        wrong = shapes | {name: (1, *shape[1:])}
        with pytest.raises(ValueError, match=rf"{name} has shape \(1,.*expected \(3,"):
            GaussianMixture(jnp.zeros((3, 2, 2)), **{n: jnp.ones(s) for n, s in wrong.items()})
