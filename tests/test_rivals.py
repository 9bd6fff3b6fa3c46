"""MCLR's rivals against the optimum that theory gives each, on distributions known exactly."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import base
from mclr_jax import guidance, run
from mclr_jax.experiment import objective_options
from mclr_jax.mixture import toy
from mclr_jax.objectives.cca import cca
from mclr_jax.objectives.contrastive_flow import contrastive_flow
from mclr_jax.objectives.ddo import ddo
from mclr_jax.objectives.dpo import dpo
from mclr_jax.objectives.gft import gft
from mclr_jax.objectives.model_guidance import model_guidance
from mclr_jax.training import loop

DRAWS = 200_000
RIVALS = ("cca", "contrastive_flow", "ddo", "dpo", "gft", "model_guidance")


class Level:
    """One noise level."""

    def __init__(self, sigma):
        self.sigma = sigma

    def sample(self, key):
        del key
        return jnp.float32(self.sigma)


# ---- objectives on the log ratio r = log p_theta / p_ref ---------------------------------------
# Data take the values 0, 10, 20, 30 under noise of level 1e-6, and a model whose answer is
# x + sqrt(1 - r / WEIGHT), beside a reference whose answer is x + 1, has r(x, c) as its ratio.

WEIGHT = 100.0
PRIOR = np.array([0.5, 0.2, 0.3])
DATA = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.15, 0.35, 0.25]])  # p(x|c)
MODEL = np.array([[0.3, 0.3, 0.2, 0.2], [0.2, 0.2, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25]])


def draw(key, table):
    k_label, k_value = jax.random.split(key)
    label = jax.random.categorical(k_label, jnp.log(jnp.asarray(PRIOR)), shape=(DRAWS,))
    value = jax.random.categorical(k_value, jnp.log(jnp.asarray(table))[label])
    return 10.0 * value[:, None], label


def gradient_in_standard_errors(objective, ratio):
    """Gradient of the mean loss by each r(x, c), (4, 3), over its standard error."""
    x0, label = draw(jax.random.key(0), DATA)
    parts = 20

    @jax.jit
    def gradient(x0, label, keys, generated):
        def mean_loss(table):
            def denoise(x, sigma, c):
                value = jnp.round(x[:, 0] / 10).astype(int)
                return x + jnp.sqrt(1 - table[value, c] / WEIGHT)[:, None]

            more = {"generated": generated} if objective.func is ddo else {}
            return objective(denoise, x0, label, keys, **more)[0].mean()

        return jax.grad(mean_loss)(jnp.asarray(ratio, jnp.float32))

    keys = jax.random.split(jax.random.key(1), DRAWS)
    everything = (x0, label, keys, draw(jax.random.key(2), MODEL))
    pieces = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), everything)
    gradients = np.asarray(jax.lax.map(lambda piece: gradient(*piece), pieces), np.float64)
    return gradients.mean(0) / (gradients.std(0, ddof=1) / np.sqrt(parts))


def on_ratios(function, **options):
    return functools.partial(
        function,
        noise=Level(1e-6),
        weight=lambda sigma: jnp.full_like(sigma, WEIGHT),
        null_label=3,
        reference=lambda x, sigma, label: x + 1,
        label_dropout=0.0,
        **options,
    )


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("name", ["cca", "ddo", "dpo"])
def test_the_optimal_log_ratio_is_the_papers(name, beta):
    likelihood, marginal = DATA.T, DATA.T @ PRIOR  # (4, 3), (4,)
    if name == "cca":
        objective = on_ratios(cca, beta=beta, negative_weight=2.0, class_prior=PRIOR)
        optimum = np.log(likelihood / (2.0 * marginal[:, None])) / beta
    elif name == "ddo":
        objective = on_ratios(ddo, beta=beta, negative_weight=1.5)
        optimum = np.log(likelihood / (1.5 * MODEL.T)) / beta
    else:
        objective = on_ratios(dpo, beta=beta, class_prior=PRIOR)
        optimum = 2 / beta * np.log(likelihood / (1 - PRIOR))
    assert np.abs(gradient_in_standard_errors(objective, optimum)).max() < 5
    for wrong in (0 * optimum, 1.3 * optimum):
        assert np.abs(gradient_in_standard_errors(objective, wrong)).max() > 15


# ---- objectives on the denoiser ----------------------------------------------------------------


def slope_in_standard_errors(objective, denoise, mixture):
    """Slope of the mean loss along D_c - D_0 + 0.3 tanh(x + c) at `denoise`, over its error."""
    k_data, k_other, k_loss = jax.random.split(jax.random.key(3), 3)
    x0, label = mixture.sample(k_data, DRAWS)
    more = {}
    if objective.func is contrastive_flow:
        more["other"] = mixture.sample(k_other, DRAWS)[0]

    def loss(epsilon):
        def moved(x, sigma, c):
            null = jnp.full_like(c, 3)
            direction = mixture.denoise(x, sigma, c) - mixture.denoise(x, sigma, null)
            return denoise(x, sigma, c) + epsilon * (direction + 0.3 * jnp.tanh(x + c[:, None]))

        return objective(moved, x0, label, jax.random.split(k_loss, DRAWS), **more)[0]

    slopes = np.asarray(jax.jit(lambda: jax.jvp(loss, (0.0,), (1.0,))[1])(), np.float64)
    return abs(slopes.mean()) / (slopes.std() / np.sqrt(DRAWS))


def on_mixture(function, sigma=0.8, **options):
    return functools.partial(
        function,
        noise=Level(sigma),
        weight=jnp.ones_like,
        null_label=3,
        label_dropout=0.0,
        **options,
    )


def test_the_optimum_of_gft_is_cfg_of_one_over_b():
    exact = toy()
    beta = 1.5
    objective = on_mixture(gft, beta=beta, teacher=exact.denoise)
    guided = guidance.classifier_free(exact.denoise, 3, 1 + beta)  # b = 1 / (1 + beta)
    assert slope_in_standard_errors(objective, guided, exact) < 4
    assert slope_in_standard_errors(objective, exact.denoise, exact) > 20


def test_the_fixed_point_of_model_guidance_is_cfg_of_one_over_one_minus_w():
    exact = toy()
    guided = guidance.classifier_free(exact.denoise, 3, 1 / (1 - 0.45))
    objective = on_mixture(model_guidance, teacher=guided)
    assert slope_in_standard_errors(objective, guided, exact) < 4
    weaker = guidance.classifier_free(exact.denoise, 3, 1.45)
    assert slope_in_standard_errors(objective, weaker, exact) > 20
    outside = on_mixture(model_guidance, sigma=3.5, teacher=guided)  # there it is plain DSM
    assert slope_in_standard_errors(outside, exact.denoise, exact) < 4


def test_the_optimum_of_contrastive_flow_matching():
    exact, share = toy(), 0.2
    mean = jnp.einsum("k,kc,kcd->d", exact.class_prior, exact.weights, exact.means)

    def optimum(x, sigma, label):
        """(v_c - lambda E v~) / (1 - lambda) as a denoiser; E v~ is minus the data's mean."""
        s = sigma[:, None]
        velocity = x / s - (1 + 1 / s) * exact.denoise(x, sigma, label)
        velocity = (velocity + share * mean) / (1 - share)
        return (x / s - velocity) / (1 + 1 / s)

    objective = on_mixture(contrastive_flow, contrast=share)
    assert slope_in_standard_errors(objective, optimum, exact) < 4
    assert slope_in_standard_errors(objective, exact.denoise, exact) > 20


# ---- in the one loop ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A base run on the mixture, and samples of it."""
    folder = tmp_path_factory.mktemp("rivals")
    loop.train(tiny.config(), folder / "base")
    images, labels = toy().sample(jax.random.key(0), 200)
    np.savez(folder / "samples.npz", images=np.asarray(images), labels=np.asarray(labels))
    return folder


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_trains_from_a_base_in_the_one_loop(started, name):
    config = tiny.config(init_from=str(started / "base"))
    config.objective = base.objective(name)
    if name == "ddo":
        config.objective.generated_from = f"npz:{started / 'samples.npz'}"
    loop.train(config, started / name)
    lines = (started / name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    before, after = (run.load_weights(started / n, "none")[0] for n in ("base", name))
    common = before.keys() & after.keys()  # a strength comes in by weights of its own
    shared = ({key: tree[key] for key in common} for tree in (before, after))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *shared)
    assert max(jax.tree.leaves(moved)) > 1e-5
    assert run.load_experiment(started / name).strength == ((0.0, 4.0) if name == "gft" else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ddo"}, "launch.sample and set objective.generated_from"),
        ({"name": "model_guidance", "scale": 1.0}, "scale is 1.0; expected at least 0 and below 1"),
        ({"name": "contrastive_flow", "contrast": 1.0}, "contrast is 1.0; expected at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(started, tmp_path, changes, message):
    config = tiny.config(init_from=str(started / "base"))
    config.objective = base.objective(changes["name"])
    config.objective.update(changes)
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path)


def test_options_are_the_defaults_of_the_function():
    options = objective_options("cca")
    assert options == {
        "name": "cca", "beta": 0.02, "negative_weight": 1000.0, "label_dropout": 0.1
    }  # fmt: skip
