"""The theorem with trained networks: how far from exact CFG each objective ends on a 2-D mixture.

  python benchmarks/mixture_mclr.py

Trains configs/mixture.py, fine-tunes it by every variant of MCLR (configs/mixture_mclr.py, beta 1)
and measures weight(sigma) |D - D_cfg|^2, summed over dimensions and averaged over the data and the
noise levels of training. Runs are kept in runs/mixture_bench: the same command goes on where it was
stopped. Writes benchmarks/results/mixture_mclr.json. Needs the package installed.
"""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import mixture as mixture_config  # noqa: E402
from configs import mixture_mclr as mclr_config  # noqa: E402
from launch.common import keep_compiled  # noqa: E402
from mclr_jax import guidance, mixture, noise, run  # noqa: E402
from mclr_jax.training.devices import banner  # noqa: E402
from mclr_jax.training.loop import NonFiniteError, train  # noqa: E402

RUNS = ROOT / "runs" / "mixture_bench"
PLAIN = {"negatives": "prior"}
VARIANTS = {
    "mclr": {},
    "prior negatives, weighted": {"negatives": "prior", "weighting": "cfg"},
    "mismatched negatives, weighted": {"negatives": "mismatched", "weighting": "cfg"},
    "half of the negatives": {"negative_share": 0.5},
    "the reference as the target": {"target": "reference"},
    "posterior from a classifier": {"posterior": "classifier"},
    "posterior from the denoiser": {"posterior": "denoiser", "posterior_levels": 4},
    "posterior from the denoiser, clip": {
        "posterior": "denoiser",
        "posterior_levels": 4,
        "bound": "clip",
    },
    "strength as an input": {"strength": (0.0, 2.0)},
    "plain": PLAIN,
    "plain, beta 0.2": PLAIN | {"beta": 0.2},
    "plain, clip": PLAIN | {"bound": "clip"},
    "plain, logistic": PLAIN | {"bound": "logistic"},
    "plain, reference penalty 1": PLAIN | {"reference_penalty": 1.0},
}


def directory(name: str) -> pathlib.Path:
    return RUNS / name.replace(" ", "_").replace(",", "")


def done(name: str, config) -> str:
    """Train a run to its end unless it got there before; the message of a run that diverged."""
    workdir = directory(name)
    outcome = workdir / "outcome.txt"
    if not outcome.exists():
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        try:
            train(config, workdir)
            message = ""
        except NonFiniteError as error:
            message = str(error)
        outcome.write_text(message)
    return outcome.read_text()


def classifier_config():
    config = mixture_config.get_config()
    config.objective = ConfigDict({"name": "classify"})
    config.network.name = "mlp_classifier"
    config.num_steps = 6000
    config.sample_every = 0
    return config


def distance(
    name: str, beta: float, strength: float = 0.0, share: float = 1.0, draws: int = 400_000
) -> float:
    """E weight(sigma) |D(x, sigma, c) - D_cfg(x, sigma, c)|^2 of a run's averaged weights.

    strength: input of the network; share: of the way from the base's weights to the run's.
    """
    workdir = directory(name)
    experiment = run.load_experiment(workdir)
    params, _ = run.load_weights(workdir, strength=share)
    oracle = mixture.toy()
    x0, label = oracle.sample(jax.random.key(5), draws)
    levels = noise.LogNormal(mean=-0.4, std=1.2)
    sigma = jax.vmap(levels.sample)(jax.random.split(jax.random.key(6), draws))
    x = x0 + sigma[:, None] * jax.random.normal(jax.random.key(7), x0.shape)
    target = guidance.classifier_free(oracle.denoise, 3, 1 + beta)(x, sigma, label)
    denoised = jax.jit(lambda *a: experiment.denoiser(params, strength)(*a))(x, sigma, label)
    square = jnp.sum((denoised - target) ** 2, axis=-1)
    return float((noise.edm_weight(sigma, 1.0) * square).mean())


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    RUNS.mkdir(parents=True, exist_ok=True)
    keep_compiled()
    done("base", mixture_config.get_config())
    done("classifier", classifier_config())
    outcomes = {}
    for name, changes in VARIANTS.items():
        config = mclr_config.get_config()
        config.init_from = str(RUNS / "base")
        config.objective.posterior_from = str(RUNS / "classifier")
        config.objective.update(changes)
        config.sample_every = 0
        if config.objective.posterior == "denoiser":  # 24 more network calls a step
            config.num_steps = 1500
        outcomes[name] = done(name, config)
    table: dict = {"base": distance("base", 1.0)}
    for name, changes in VARIANTS.items():
        if outcomes[name]:
            table[name] = outcomes[name]
        elif "strength" not in changes:
            table[name] = distance(name, 1.0)
    strengths = {
        f"{beta:g}": {
            "base": distance("base", beta),
            "input": distance("strength as an input", beta, strength=beta),
            "share": distance("mclr", beta, share=beta),
        }
        for beta in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
    }
    result = {
        "command": "python benchmarks/mixture_mclr.py",
        "config": "configs/mixture_mclr.py",
        "device": banner(),
        "distance_to_cfg": table,
        "base_to_exact_unguided": distance("base", 0.0),
        "by_strength": strengths,
    }
    path = ROOT / "benchmarks" / "results" / "mixture_mclr.json"
    run.write_atomically(path, json.dumps(result, indent=1) + "\n")
    for name, value in table.items():
        print(f"{name:32s}", f"{value:.4f}" if isinstance(value, float) else value)
    print(json.dumps(strengths, indent=1))


if __name__ == "__main__":
    main()
