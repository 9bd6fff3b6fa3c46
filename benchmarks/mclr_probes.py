"""What benchmarks/mclr_images.py measures beside samples: calibration, guidance, speed, cost.

Each function takes the Bench of that script and returns numbers.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax import generate, noise, posterior, run
from mclr_jax.data import pipeline, sources
from mclr_jax.training import loop
from mclr_jax.training import step as training_step


def calibration(bench) -> dict:
    """How well the posterior is calibrated on held-out images, by noise level."""
    experiment, params = bench.load("classifier")
    log_posterior = jax.jit(
        posterior.from_classifier(experiment.logits(params), experiment.null_label)
    )
    table: dict = {}
    for split in ("train", "test"):
        source = sources.load(bench.data, split)
        images, labels = source[np.arange(min(5000, len(source)))]
        x0, table[split] = np.asarray(pipeline.to_float(images)), {}
        for sigma in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
            keys = noise.sample_keys(0, np.arange(len(x0)))
            x = x0 + sigma * noise.normal_like(keys, x0)
            log_probs = log_posterior(x, np.full(len(x), sigma, np.float32), keys, labels)
            table[split][f"{sigma:g}"] = posterior.calibration_error(log_probs, labels)
    return table


def profile(bench, model, seed: int, count: int = 1000) -> dict:
    """What fine-tuning did to the denoiser, by noise level, on held-out images of its class.

    With G = D_c - D_null of the base, the direction of CFG, and H = D_c - sum p(c'|x) D_c', the
    direction that the posterior implies (both are the same where the base is exact), the
    multiple of G in H, and the multiples of G and of H in D_mclr - D_c.
    """

    experiment, params = bench.load(bench.base(seed))
    _, tuned = bench.load(model.workdir(seed))
    judge, judge_params = bench.load("classifier")
    null = experiment.null_label
    log_posterior = posterior.from_classifier(judge.logits(judge_params), null)

    @jax.jit
    def products(x, sigma, keys, label):
        base = experiment.denoiser(params)
        own = base(x, sigma, label)
        probs = jnp.exp(log_posterior(x, sigma, keys, label))
        mean = sum(
            probs[:, c, None, None, None] * base(x, sigma, jnp.full_like(label, c))
            for c in range(null)
        )
        cfg, bayes = own - base(x, sigma, jnp.full_like(label, null)), own - mean
        moved = experiment.denoiser(tuned)(x, sigma, label) - own
        pairs = [(bayes, cfg), (moved, cfg), (cfg, cfg), (moved, bayes), (bayes, bayes)]
        return jnp.stack([(a * b).sum() for a, b in pairs])

    source = sources.load(bench.data, "test")
    images, labels = source[np.arange(min(count, len(source)) // bench.batch * bench.batch)]
    x0, table = np.asarray(pipeline.to_float(images)), {}
    for level in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        keys = noise.sample_keys(0, np.arange(len(x0)))
        x = np.asarray(x0 + level * noise.normal_like(keys, x0))
        sigma = np.full(bench.batch, level, np.float32)
        bayes_cfg, moved_cfg, cfg, moved_bayes, bayes = np.sum(
            [
                products(
                    x[i : i + bench.batch],
                    sigma,
                    keys[i : i + bench.batch],
                    labels[i : i + bench.batch],
                )
                for i in range(0, len(x), bench.batch)
            ],
            axis=0,
        )
        table[f"{level:g}"] = {
            "cfg_in_bayes": float(bayes_cfg / cfg),
            "cfg_in_mclr": float(moved_cfg / cfg),
            "bayes_in_mclr": float(moved_bayes / bayes),
        }
    return {"model": model.workdir(seed), "by_sigma": table}


def speed(bench, models: dict, seed: int) -> dict:
    """Samples per second of models, run alternately: medians."""
    loaded = {kind: bench.load(model.workdir(seed)) for kind, model in models.items()}
    options = {kind: bench.options(model) for kind, model in models.items()}
    labels = np.resize(np.arange(10), 5 * bench.batch)
    rates: dict[str, list[float]] = {}
    for _ in range(6):  # the first compiles
        for kind in models:
            start = time.perf_counter()
            generate.generate(*loaded[kind], labels, batch_size=bench.batch, **options[kind])
            rates.setdefault(kind, []).append(len(labels) / (time.perf_counter() - start))
    return {kind: float(np.median(r[1:])) for kind, r in rates.items()}


def step_cost(bench, objectives: dict, seed: int, steps: int = 10, rounds: int = 7) -> dict:
    """Time of a training step of objectives (as Model.changes) relative to DSM's: medians.

    They are run alternately.
    """
    classifier, posterior_params = bench.load("classifier")
    source = loop.load_source(bench.config(), "train")
    runs: dict = {}
    for name, changes in ({"dsm": None} | objectives).items():
        config = bench.fine_tuning(seed, changes)
        experiment = loop.make_experiment(config, source, classifier)
        companions = experiment.takes("other") or experiment.takes("generated")
        stream = pipeline.stream(source, config.batch_size, 0, other=source if companions else None)
        batches = loop.stack(stream, steps, steps)
        update = jax.jit(training_step.make_update(experiment), donate_argnums=0)
        state = jax.jit(functools.partial(training_step.init_state, experiment))()
        frozen = {"classifier": posterior_params, "reference": run.pretrained(experiment)[0]}
        held = {key: frozen[key] for key in jax.eval_shape(experiment.init_frozen)}
        runs[name] = [update, state, held, batches, []]
    for _ in range(rounds + 1):  # the first compiles
        for entry in runs.values():
            update, state, held, batches, seconds = entry
            start = time.perf_counter()
            entry[1] = jax.block_until_ready(update(state, held, batches, steps)[0])
            seconds.append((time.perf_counter() - start) / steps)
    base = np.median(runs["dsm"][-1][1:])
    return {name: float(np.median(entry[-1][1:]) / base) for name, entry in runs.items()}
