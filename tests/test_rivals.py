"""MCLR's rivals against the optimum that theory gives each, on distributions known exactly."""

import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import Level

from configs import base
from mclr_jax import guidance, main, noise, runs
from mclr_jax.mixture import toy
from mclr_jax.noise import normal_like
from mclr_jax.objectives.base import split
from mclr_jax.objectives.dsm import DSM
from mclr_jax.objectives.rivals import (
    CCA,
    DDO,
    DPO,
    GFT,
    ContrastiveFlow,
    ModelGuidance,
    uniform_share,
)
from mclr_jax.problem import Batch
from mclr_jax.types import Condition, label_of, with_label

DRAWS = 200_000
RIVALS = ("cca", "contrastive_flow", "ddo", "dpo", "gft", "model_guidance")


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
    problem = cases.problem(
        Level(1e-6), weight=lambda sigma: jnp.full_like(sigma, WEIGHT), class_prior=tuple(PRIOR)
    )

    @jax.jit
    def gradient(x0, label, keys, generated):
        def mean_loss(table):
            def denoise(x, sigma, condition):
                value = jnp.round(x[:, 0] / 10).astype(int)
                return x + jnp.sqrt(1 - table[value, label_of(condition)] / WEIGHT)[:, None]

            models = cases.models(denoise, reference=lambda x, sigma, condition: x + 1)
            batch = Batch(x0, Condition(label), generated=generated)
            return objective(models, problem, batch, keys)[0].mean()

        return jax.grad(mean_loss)(jnp.asarray(ratio, jnp.float32))

    keys = jax.random.split(jax.random.key(1), DRAWS)
    everything = (x0, label, keys, draw(jax.random.key(2), MODEL))
    pieces = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), everything)
    gradients = np.asarray(jax.lax.map(lambda piece: gradient(*piece), pieces), np.float64)
    return gradients.mean(0) / (gradients.std(0, ddof=1) / np.sqrt(parts))


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("name", ["cca", "ddo", "dpo"])
def test_the_optimal_log_ratio_is_the_papers(name, beta):
    likelihood, marginal = DATA.T, DATA.T @ PRIOR  # (4, 3), (4,)
    if name == "cca":
        objective = CCA(beta, 2.0, label_dropout=0.0)
        optimum = np.log(likelihood / (2.0 * marginal[:, None])) / beta
    elif name == "ddo":
        objective = DDO(beta, 1.5)
        optimum = np.log(likelihood / (1.5 * MODEL.T)) / beta
    else:
        objective = DPO(beta, label_dropout=0.0)
        optimum = 2 / beta * np.log(likelihood / (1 - PRIOR))
    assert np.abs(gradient_in_standard_errors(objective, optimum)).max() < 5
    for wrong in (0 * optimum, 1.3 * optimum):
        assert np.abs(gradient_in_standard_errors(objective, wrong)).max() > 15


# ---- objectives on the denoiser ----------------------------------------------------------------


def slope_in_standard_errors(objective, denoise, mixture, sigma=0.8, **frozen):
    """Slope of the mean loss along D_c - D_0 + 0.3 tanh(x + c) at `denoise`, over its error."""
    k_data, k_other, k_loss = jax.random.split(jax.random.key(3), 3)
    x0, label = mixture.sample(k_data, DRAWS)
    batch = Batch(x0, Condition(label), other=mixture.sample(k_other, DRAWS)[0])

    def loss(epsilon):
        def moved(x, sigma, condition):
            null = with_label(condition, 3)
            direction = mixture.denoise(x, sigma, condition) - mixture.denoise(x, sigma, null)
            direction += 0.3 * jnp.tanh(x + label_of(condition)[:, None])
            return denoise(x, sigma, condition) + epsilon * direction

        keys = jax.random.split(k_loss, DRAWS)
        models = cases.models(moved, **frozen)
        return objective(models, cases.problem(Level(sigma)), batch, keys)[0]

    slopes = np.asarray(jax.jit(lambda: jax.jvp(loss, (0.0,), (1.0,))[1])(), np.float64)
    return abs(slopes.mean()) / (slopes.std() / np.sqrt(DRAWS))


def test_the_optimum_of_gft_is_cfg_of_one_over_b():
    exact = toy()
    beta = 1.5
    objective, frozen = GFT(beta, label_dropout=0.0), {"self": exact.denoise}
    guided = guidance.classifier_free(exact.denoise, 3, 1 + beta)  # b = 1 / (1 + beta)
    assert slope_in_standard_errors(objective, guided, exact, **frozen) < 4
    assert slope_in_standard_errors(objective, exact.denoise, exact, **frozen) > 20


def test_the_fixed_point_of_model_guidance_is_cfg_of_one_over_one_minus_w():
    exact = toy()
    guided = guidance.classifier_free(exact.denoise, 3, 1 / (1 - 0.45))
    objective, frozen = ModelGuidance(label_dropout=0.0), {"average": guided}
    assert slope_in_standard_errors(objective, guided, exact, **frozen) < 4
    weaker = guidance.classifier_free(exact.denoise, 3, 1.45)
    assert slope_in_standard_errors(objective, weaker, exact, **frozen) > 20
    # outside the interval it is plain DSM
    assert slope_in_standard_errors(objective, exact.denoise, exact, 3.5, **frozen) < 4


def test_the_optimum_of_contrastive_flow_matching():
    exact, share = toy(), 0.2
    mean = jnp.einsum("k,kc,kcd->d", exact.class_prior, exact.weights, exact.means)

    def optimum(x, sigma, condition):
        """(v_c - lambda E v~) / (1 - lambda) as a denoiser; E v~ is minus the data's mean."""
        s = sigma[:, None]
        velocity = x / s - (1 + 1 / s) * exact.denoise(x, sigma, condition)
        velocity = (velocity + share * mean) / (1 - share)
        return (x / s - velocity) / (1 + 1 / s)

    objective = ContrastiveFlow(share, label_dropout=0.0)
    assert slope_in_standard_errors(objective, optimum, exact) < 4
    assert slope_in_standard_errors(objective, exact.denoise, exact) > 20


# ---- dropped labels, strengths, frames -----------------------------------------------------------


def small(mixture, n=600):
    """A batch with everything in it, and keys."""
    x0, label = mixture.sample(jax.random.key(0), n)
    other, other_label = mixture.sample(jax.random.key(1), n)
    batch = Batch(x0, Condition(label), other, (other, other_label))
    return batch, jax.random.split(jax.random.key(2), n)


@pytest.mark.parametrize("objective", [DPO, GFT, ModelGuidance])
def test_examples_whose_label_was_dropped_get_plain_dsm(objective):
    exact = toy()
    batch, keys = small(exact)
    problem = cases.problem(noise.LogNormal(), class_prior=(1 / 3,) * 3)
    off = {name: lambda x, sigma, condition: 0 * x + 1 for name in ("reference", "self", "average")}
    models = cases.models(exact.denoise, **off)

    def loss(objective):
        return jax.jit(lambda: objective(models, problem, batch, keys)[0])()

    expected = loss(DSM(1.0))
    all_dropped, part = (loss(objective(label_dropout=rate)) for rate in (1.0, 0.4))
    np.testing.assert_allclose(all_dropped, expected, rtol=1e-4, atol=1e-6)
    same = np.isclose(part, expected, rtol=1e-4)
    assert abs(same.mean() - 0.4) < 4 * np.sqrt(0.24 / len(same))


def test_cca_counts_a_dropped_label_as_a_positive_of_the_null_label():
    exact = toy()
    batch, keys = small(exact)
    problem = cases.problem(noise.LogNormal(), class_prior=(1 / 3,) * 3)
    models = cases.models(exact.denoise, reference=lambda x, sigma, condition: x)
    loss, found = CCA(2.0, 3.0, label_dropout=1.0)(models, problem, batch, keys)
    shown = DSM(1.0)(models, problem, batch, keys)[0]  # |D(x_s, null) - x|^2
    (ratio, _), (negative, _) = (found[f"{name}_ratio"].parts for name in ("positive", "negative"))
    np.testing.assert_allclose(loss, np.logaddexp(0, -2.0 * ratio) / 3.0, rtol=1e-5)
    then = DSM(1.0)(models._replace(denoise=lambda x, sigma, condition: x), problem, batch, keys)[0]
    np.testing.assert_allclose(ratio, 2 * (then - shown), rtol=1e-4, atol=1e-5)
    assert np.abs(negative - ratio).max() > 0.1


def test_the_shares_of_gft_are_uniform_and_its_network_is_told_the_strength():
    exact, seen = toy(), []
    batch, keys = small(exact, 4000)

    def denoise(x, sigma, condition):
        seen.append(condition.strength)
        return exact.denoise(x, sigma, condition)

    models = cases.models(denoise, self=exact.denoise)
    problem = cases.problem(noise.LogNormal(), strength=(0.25, 4.0))
    loss, _ = GFT()(models, problem, batch, keys)
    (strength,) = seen
    share = np.sort(1 / (1 + np.asarray(strength)))  # uniform between 1 / 5 and 1 / 1.25
    assert np.abs(share - np.linspace(0.2, 0.8, 4000)).max() < 0.6 * 1.95 / np.sqrt(4000)
    same, _ = GFT(strength)(models, cases.problem(noise.LogNormal()), batch, keys)
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    np.testing.assert_allclose(uniform_share(jnp.array([0.0, 1.0]), 0.25, 4.0), [0.25, 4.0], 1e-6)


class ByFrame:
    """The levels 0.5, 1 and 2, one for each frame."""

    def sample(self, key, shape):
        assert shape == (3,)
        return jnp.array([0.5, 1.0, 2.0])


def test_frames_have_weights_intervals_and_slopes_of_their_own():
    """Against each paper's formula, from what the network was shown."""
    x0 = jax.random.normal(jax.random.key(0), (5, 3, 2))
    other = jax.random.normal(jax.random.key(1), (5, 3, 2))
    batch = Batch(x0, Condition(jnp.zeros(5, jnp.int32)), other)
    keys = jax.random.split(jax.random.key(2), 5)
    problem = cases.problem(ByFrame(), weight=lambda sigma: 1 + sigma, frames=(3,))
    level, seen = np.array([0.5, 1.0, 2.0]), []

    def denoise(x, sigma, condition):
        np.testing.assert_array_equal(sigma, np.broadcast_to(level, (len(x), 3)))
        seen.append(x)
        return 0.7 * x + label_of(condition)[:, None, None]

    models = cases.models(denoise, average=denoise)

    def by_frame(values):  # (5, 3, 2) -> (5,)
        return ((1 + level) * (values**2).mean(-1)).mean(-1)

    loss, _ = ModelGuidance(0.4, (0.5, 1.5), 0.0)(models, problem, batch, keys)
    guided = np.array([0.0, 1.0, 0.0])[:, None]  # 0.5 < sigma <= 1.5
    target = x0 + 0.4 * guided * (0.0 - 3.0)
    np.testing.assert_allclose(loss, by_frame(0.7 * seen[-1] - target), rtol=1e-5)

    loss, _ = ContrastiveFlow(0.3, 0.0)(models, problem, batch, keys)
    x, s = seen[-1], level[:, None]
    velocity = x / s - (1 + 1 / s) * 0.7 * x
    wrong = normal_like(split(keys, 4)[3], x0) - other
    expected = by_frame(0.7 * x - x0) - 0.3 * by_frame((velocity - wrong) / (1 + 1 / s))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    # flow matching's own form, |v - (n - x)|^2 with n = (x_s - x) / s, has the same first term
    np.testing.assert_allclose(
        by_frame((velocity - ((x - x0) / s - x0)) / (1 + 1 / s)), by_frame(0.7 * x - x0), rtol=1e-4
    )


# ---- in the one loop -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A base run on the mixture, and samples of it."""
    folder = tmp_path_factory.mktemp("rivals")
    main.train(tiny.config(), folder / "base")
    images, labels = toy().sample(jax.random.key(0), 200)
    np.savez(folder / "samples.npz", images=np.asarray(images), labels=np.asarray(labels))
    return folder


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_trains_from_a_base_in_the_one_loop(started, name):
    strength = (0.0, 4.0) if name == "gft" else ()
    config = tiny.config(
        init_from=str(started / "base"), strength=strength, **{"objective.name": name}
    )
    if name == "ddo":
        config.data.generated = f"npz:{started / 'samples.npz'}"
    main.train(config, started / name)
    lines = (started / name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    before, after = (runs.load(started / n).weights("none")[0] for n in ("base", name))
    common = before.keys() & after.keys()  # a strength comes in by weights of its own
    shared = ({key: tree[key] for key in common} for tree in (before, after))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *shared)
    assert max(jax.tree.leaves(moved)) > 1e-5
    assert runs.load(started / name).model.strength == strength


def test_ddo_without_samples_is_refused(started, tmp_path):
    config = tiny.config(init_from=str(started / "base"), **{"objective.name": "ddo"})
    with pytest.raises(ValueError, match=r"launch.sample and set config.data.generated"):
        main.train(config, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelGuidance(1.0), "scale is 1.0; expected at least 0 and below 1"),
        (lambda: ModelGuidance(-0.1), "scale is -0.1; expected at least 0 and below 1"),
        (lambda: ContrastiveFlow(1.0), "contrast is 1.0; expected at least 0"),
        (lambda: ContrastiveFlow(-0.1), "contrast is -0.1; expected at least 0"),
    ],
)
def test_strengths_without_an_optimum_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_options_are_the_defaults_of_the_dataclass():
    options = base.options("cca")
    assert options.to_dict() == {
        "name": "cca", "beta": 0.02, "negative_weight": 1000.0, "label_dropout": 0.1
    }  # fmt: skip
