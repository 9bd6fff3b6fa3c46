"""Every pure function gives the same result plain, from NumPy arrays, under jit and under pmap."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mclr_jax import denoiser, guidance, mixture, model, noise, posterior, samplers
from mclr_jax.data import augment, pixels
from mclr_jax.denoiser import EDM, Epsilon, V, Velocity
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.mlp import MLP
from mclr_jax.objectives.base import Batch, Models, Problem
from mclr_jax.objectives.classify import Classify
from mclr_jax.objectives.dsm import DSM
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.objectives.mclr_null import NullMCLR
from mclr_jax.objectives.rivals import CCA, DDO, DPO, GFT, ContrastiveFlow, ModelGuidance
from mclr_jax.representation import perturb
from mclr_jax.training import ema
from mclr_jax.types import Answers, Condition

B, EXACT = 6, mixture.toy()
DRAW = np.random.default_rng(0)
SIGMA = np.float32([0.02, 0.3, 0.7, 1.5, 4.0, 20.0])
LABEL = np.int32([0, 1, 2, 3, 0, 1])  # 3 is the null label
X = np.float32(DRAW.normal(size=(B, 2)) * np.sqrt(1 + SIGMA**2)[:, None])
IMAGES = np.float32(DRAW.uniform(-1, 1, (B, 6, 6, 1)))
LEVELS = Problem(noise.LogNormal(), jnp.ones_like, 3, (0.5, 0.3, 0.2), 1.0)
GRID = noise.rho_grid(3, 0.05, 5.0).astype(np.float32)


def keys(seed):
    return noise.sample_keys(seed, jnp.arange(B))


def raw(x, c_noise, condition):
    """A network in closed form."""
    return jnp.sin(x) + (c_noise + condition.label)[:, None]


def logits(x, sigma, condition):
    return EXACT.log_prob_given_label(x, sigma)


def of_preconditioning(preconditioning):
    return lambda x, sigma, label: denoiser.denoiser(preconditioning, raw)(
        x, jnp.clip(sigma, *preconditioning.sigma_range), label
    )


def of_objective(objective):
    """(x0, label, seed) -> loss and the parts of its metrics."""

    def run(x0, label, seed):
        answers = Answers(
            lambda x, sigma, condition: 0.9 * EXACT.denoise(x, sigma, condition), logits
        )
        held = dict.fromkeys(("reference", "self", "average"), answers)
        given = Models(EXACT.denoise, logits, held, posterior.exact(EXACT))
        batch = Batch(x0, Condition(label % 3), x0[::-1], (-x0, (label + 1) % 3))
        return objective(given, LEVELS, batch, keys(seed))

    return run


def of_posterior(made):
    """(x, sigma, label, seed) -> log probabilities of a posterior."""
    return lambda x, sigma, label, seed: made(x, sigma, Condition(label), keys(seed))


def of_network(network, shape):
    """(x, sigma, label) -> the network in a Model, with random parameters."""
    made = model.Model(network, EDM(), model.DataInfo(shape, 3, 0.5))
    params = functools.cache(lambda: tiny.weights(made))
    return lambda x, sigma, label: made.denoise(params())(x, sigma, label)


def of_sampler(method, **options):
    def run(x, label, scale, seed):
        denoise = guidance.classifier_free(EXACT.denoise, 3, scale, (0.1, 3.0))
        churned = {name: samplers.Churn(*value) for name, value in options.items()}
        return samplers.sample(denoise, x, label, GRID, method, keys=keys(seed), **churned)

    return run


SEED, SCALE, STEP = np.uint32(3), np.float32(1.5), np.float32(7.0)
NOISY, DATA = (X, SIGMA, LABEL), (X, LABEL, SEED)
CASES = {
    "edm": (of_preconditioning(EDM()), NOISY),
    "velocity": (of_preconditioning(Velocity()), NOISY),
    "epsilon": (of_preconditioning(Epsilon()), NOISY),
    "v": (of_preconditioning(V()), NOISY),
    "natural_weight": (lambda sigma: denoiser.natural_weight(EDM(), sigma), (SIGMA,)),
    "mlp": (of_network(MLP(num_classes=3, width=8, depth=1), (2,)), NOISY),
    "dit": (
        of_network(DiT(out_channels=1, num_classes=3, patch_size=3, width=8, depth=1, heads=2),
                   (6, 6, 1)),
        (IMAGES, SIGMA, LABEL),
    ),
    "lognormal": (lambda seed: noise.LogNormal().sample(jax.random.key(seed), (4,)), (SEED,)),
    "loguniform": (lambda seed: noise.LogUniform().sample(jax.random.key(seed), (4,)), (SEED,)),
    "normal_like": (lambda seed, x: noise.normal_like(keys(seed), x), (SEED, X)),
    "autoguidance": (
        lambda scale, *noisy: guidance.autoguidance(EXACT.denoise, lambda x, *_: x, scale)(*noisy),
        (SCALE, *NOISY),
    ),
    "euler": (of_sampler("euler"), (X, LABEL, SCALE, SEED)),
    "heun": (of_sampler("heun"), (X, LABEL, SCALE, SEED)),
    "heun churned": (of_sampler("heun", churn=(2.0, 0.1, 3.0)), (X, LABEL, SCALE, SEED)),
    "dpmpp_2m": (of_sampler("dpmpp_2m"), (X, LABEL, SCALE, SEED)),
    "mixture denoise": (EXACT.denoise, NOISY),
    "mixture log_prob": (EXACT.log_prob, (X, SIGMA)),
    "mixture sample": (lambda seed: EXACT.sample(jax.random.key(seed), B), (SEED,)),
    "posterior exact": (of_posterior(posterior.exact(EXACT)), (*NOISY, SEED)),
    "posterior classifier": (of_posterior(posterior.from_classifier(logits, 3)), (*NOISY, SEED)),
    "ema halflife": (ema.halflife(100.0), (STEP,)),
    "ema power": (ema.power(0.1), (STEP,)),
    "to_float": (pixels.to_float, (np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3),)),
    "random_flip": (lambda seed, x: pixels.random_flip(x, keys(seed)), (SEED, IMAGES)),
    "augment": (lambda seed, x: augment.augment(x, keys(seed), 0.5), (SEED, IMAGES)),
    "view": (
        lambda seed, x, sigma: perturb.view(x, sigma, keys(seed), perturb.Augmentation(flip=True)),
        (SEED, IMAGES, SIGMA),
    ),
    "dsm": (of_objective(DSM()), DATA),
    "classify": (of_objective(Classify()), DATA),
    "mclr posterior": (of_objective(MCLR(target="reference", negative_share=0.5)), DATA),
    "mclr prior": (of_objective(MCLR(negatives="prior", weighting="cfg", bound="clip")), DATA),
    "mclr mismatched": (of_objective(MCLR(negatives="mismatched", weighting="cfg")), DATA),
    "mclr_null": (of_objective(NullMCLR(wrong_label=0.5)), DATA),
    "cca": (of_objective(CCA(0.5, 2.0, second_positives=True)), DATA),
    "dpo": (of_objective(DPO(0.5)), DATA),
    "ddo": (of_objective(DDO()), DATA),
    "contrastive_flow": (of_objective(ContrastiveFlow()), DATA),
    "gft": (of_objective(GFT()), DATA),
    "model_guidance": (of_objective(ModelGuidance()), DATA),
}  # fmt: skip


# tests/test_equations.py has their values without jit, tests/test_task.py their loss under jit.
LONG = {"classify", "mclr prior", "mclr mismatched", "cca", "dpo", "ddo", "contrastive_flow", "gft",
        "model_guidance"}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[pytest.mark.slow] * (x in LONG)) for x in CASES]
)
def test_a_pure_function_is_the_same_plain_from_numpy_under_jit_and_under_pmap(case):
    function, arguments = CASES[case]
    plain = jax.tree.leaves(function(*jax.tree.map(jnp.asarray, arguments)))
    chex.assert_tree_all_finite(plain)
    by_pmap = jax.pmap(function)(*jax.tree.map(lambda x: x[None], arguments))
    for found in (jax.jit(function)(*arguments), jax.tree.map(lambda x: x[0], by_pmap)):
        found = jax.tree.leaves(found)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, plain)
        chex.assert_trees_all_close(found, plain, rtol=2e-4, atol=2e-5)


@chex.assert_max_traces(n=1)
def _sample(x, label, scale, interval, sigmas, seed):
    denoise = guidance.classifier_free(EXACT.denoise, 3, scale, interval)
    churn = samplers.Churn(scale)
    return samplers.sample(denoise, x, label, sigmas, "heun", churn=churn, keys=keys(seed))


def test_scales_intervals_grids_and_seeds_do_not_recompile():
    compiled, grid = jax.jit(_sample), noise.rho_grid(6, 0.05, 5.0).astype(np.float32)
    settings = [(1, 0.1, 1, 0), (2, 0.1, 1, 0), (2, 1.0, 1, 0), (2, 1.0, 2, 0), (2, 1.0, 2, 1)]
    results = [
        np.asarray(
            compiled(X, LABEL, jnp.float32(scale), (jnp.float32(low), 9.0), top * grid, seed)
        )
        for scale, low, top, seed in settings
    ]
    for a, b in itertools.pairwise(results):
        assert np.abs(a - b).max() > 1e-3
