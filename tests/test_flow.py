"""Flow matching in time, against the exact flow of one Gaussian; other tests have the official one.

Covers mclr_jax/flow.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax import flow, guidance, samplers
from mclr_jax.denoiser import EDM, Velocity
from mclr_jax.noise import sample_keys

MEAN, STD = 1.5, 0.5
X = np.linspace(-2.0, 2.0, 9)[:, None]  # at u = 1, where x is the noise


def gaussian(model):
    """The exact network of N(MEAN, STD^2): E[its target | x_u]."""

    def network(x, clock, condition, level):
        u = (1 - clock if model.data_at else clock)[:, None]
        a, s, da, ds = flow_path(model.path, u)
        x0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
        noise = s / (a**2 * STD**2 + s**2) * (x - a * MEAN)
        if model.prediction != "velocity":
            return noise if model.prediction == "noise" else -noise / s
        return (-1 if model.data_at else 1) * (da * x0 + ds * noise)

    return network


def flow_path(name, u):
    """a, s and derivatives by jax.grad, from the paths as SiT's paper has them."""
    paths = {
        "linear": (lambda u: 1 - u, lambda u: u),
        "cosine": (lambda u: jnp.cos(jnp.pi / 2 * u), lambda u: jnp.sin(jnp.pi / 2 * u)),
        "vp": (
            lambda u: jnp.exp(-(u**2) * (20 - 0.1) / 4 - u * 0.1 / 2),
            lambda u: jnp.sqrt(1 - jnp.exp(-(u**2) * (20 - 0.1) / 2 - u * 0.1)),
        ),
    }
    flat = jnp.ravel(u)
    values = [f(u) for f in paths[name]]
    return *values, *(jax.vmap(jax.grad(f))(flat).reshape(u.shape) for f in paths[name])


def exact(model, u):
    """Where the flow from X at u = 1 is at time u."""
    (a1, s1, *_), (a, s, *_) = (flow_path(model.path, jnp.full((), float(t))) for t in (1, u))
    return a * MEAN + (X - a1 * MEAN) * np.sqrt((a * STD) ** 2 + s**2) / np.sqrt(
        (a1 * STD) ** 2 + s1**2
    )


def end(model, method, steps):
    calls = flow.tabulate(model, method, steps)
    return flow.sample(gaussian(model), jnp.asarray(X), jnp.zeros(len(X), int), calls)


MODELS = [Velocity(1), Velocity(0), Velocity(1, "cosine"), Velocity(0, "cosine"),
          Velocity(0, "vp"), Velocity(1, "linear", "noise"), Velocity(1, "cosine", "score"),
          Velocity(1, "vp", "noise")]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_many_steps_end_at_the_exact_flow(model):
    """1e-3 from the ends for predictions and paths that are singular there, as in SiT."""
    singular = model.prediction != "velocity" or model.path == "vp"
    got = np.asarray(end(model, "ode_rk4", 200))
    expected = exact(model, 1e-3 if singular else 0.0)
    np.testing.assert_allclose(got, expected, atol=1e-2 if singular else 1e-5)
    first = flow.tabulate(model, "ode_euler", 4)
    assert first.sigma[0] > (100 if model.path != "vp" else 10)
    assert first.clock[0] == pytest.approx(1 - model.data_at, abs=2e-3)


@pytest.mark.parametrize(
    ("method", "order", "steps"),
    [("ode_euler", 1, 64), ("ode_heun", 2, 64), ("ode_heun2", 2, 64), ("ode_rk4", 4, 64),
     ("ode_dopri5", 5, 16)],
)  # fmt: skip
def test_order_of_convergence(monkeypatch, method, order, steps):
    with jax.enable_x64(True):
        monkeypatch.setattr(np, "float32", np.float64)  # of the table
        errors = [
            float(np.abs(end(Velocity(0), method, steps << k) - exact(Velocity(0), 0.0)).max())
            for k in range(3)
        ]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(rates, order, atol=0.35)


@functools.cache
def noisy(path):
    """Samples (5000, 1) of a table of calls, compiled once for all diffusions."""
    keys = sample_keys(0, range(5_000))
    x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 999), (1,)))(keys)
    network = gaussian(Velocity(0, path))
    return jax.jit(lambda calls: flow.sample(network, x, jnp.zeros(len(x), int), calls, keys))


@pytest.mark.parametrize("method", ["sde_euler", "sde_heun"])
@pytest.mark.parametrize("diffusion", flow.DIFFUSIONS)
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_each_diffusion_has_the_marginals_of_the_data(method, diffusion, path):
    got = noisy(path)(flow.tabulate(Velocity(0, path), method, 100, diffusion))
    assert abs(got.mean() - MEAN) < 0.03
    # the last step takes the noise of a constant diffusion away, but not all of its effect
    assert got.std() == pytest.approx(STD, rel=0.2 if diffusion == "constant" else 0.06)


def test_calls_and_levels_of_a_method():
    sampler = samplers.Sampler("ode_heun", 4)
    levels = sampler.levels(Velocity(0))
    np.testing.assert_allclose(levels, [np.inf, np.inf, 3, 3, 1, 1, 1 / 3], rtol=1e-6)
    counts = {"ode_euler": 4, "ode_heun2": 8, "ode_rk4": 16, "ode_dopri5": 24, "sde_euler": 4,
              "sde_heun": 7}  # fmt: skip
    for method, count in counts.items():
        assert len(samplers.Sampler(method, 4).levels(Velocity(0))) == count


def test_one_step():
    """The SDE has one call in its last step, from LAST or, without others, from 1."""
    for method in flow.METHODS:
        calls = flow.tabulate(Velocity(0), method, 1)
        noisy = bool(flow.METHODS[method].noise)
        assert calls.fresh.sum() == 0
        assert calls.ends_step.sum() == 1
        np.testing.assert_allclose(calls.weights[-1].sum(), -1, rtol=1e-6)
        assert len(calls.clock) == (1 if noisy or method == "ode_heun" else len(calls.weights[0]))


def test_what_has_no_flow_is_refused():
    with pytest.raises(ValueError, match="needs a network of the preconditioning velocity; got ED"):
        samplers.Sampler("ode_euler").table(EDM())
    calls, x = samplers.Sampler("sde_euler", 3).table(Velocity()), jnp.ones((2, 1))
    with pytest.raises(ValueError, match=r"'sde_euler'\) needs per-sample keys"):
        samplers.draw(gaussian(Velocity()), x, jnp.zeros(2, int), calls, "sde_euler")
    with pytest.raises(ValueError, match="Churn needs"):
        samplers.draw(
            gaussian(Velocity()), x, jnp.zeros(2, int), calls, "ode_euler",
            churn=samplers.Churn(), keys=sample_keys(0, range(2)),
        )  # fmt: skip


def test_guidance_is_about_the_level_at_the_start_of_a_step():
    """Guided by 2 in the second of four steps alone, in both of its calls."""
    made = []

    def network(x, clock, condition, level=None):
        jax.debug.callback(lambda label, c: made.append((int(label[0]), float(c[0]))),
                           condition.label, clock, ordered=True)  # fmt: skip
        return x

    guided = guidance.classifier_free(network, 7, 2.0, (2.0, 3.5))
    calls = flow.tabulate(Velocity(0), "ode_heun2", 4)
    jax.block_until_ready(flow.sample(guided, jnp.ones((1, 2)), jnp.zeros(1, int), calls))
    jax.effects_barrier()
    assert [clock for label, clock in made if label == 7] == [0.75, 0.5]
    assert len(made) == 10
