"""What benchmarks/mclr_images.py measures beside samples: calibration, guidance, speed, cost.

Each function takes the Bench of that script and returns numbers.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax import experiment, generate, main, noise, plan, posterior, runs
from mclr_jax.data import pipeline, sources
from mclr_jax.data.pixels import to_float
from mclr_jax.training.step import init_state, make_update
from mclr_jax.types import Condition


def calibration(bench) -> dict:
    """How well the posterior is calibrated on held-out images, by noise level."""
    run, params = bench.load("classifier")
    log_posterior = jax.jit(
        posterior.from_classifier(run.model.logits(params), run.model.null_label)
    )
    table: dict = {}
    for split in ("train", "test"):
        source = sources.load(bench.source, split)
        images, labels = source[np.arange(min(5000, len(source)))]
        x0, table[split] = np.asarray(to_float(images)), {}
        for sigma in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
            keys = noise.sample_keys(0, np.arange(len(x0)))
            x = x0 + sigma * noise.normal_like(keys, x0)
            levels = np.full(len(x), sigma, np.float32)
            log_probs = log_posterior(x, levels, Condition(labels), keys)
            table[split][f"{sigma:g}"] = posterior.calibration_error(log_probs, labels)
    return table


def profile(bench, model, seed: int, count: int = 1000) -> dict:
    """What fine-tuning did to the denoiser, by noise level, on held-out images of its class.

    With G = D_c - D_null of the base, the direction of CFG, and H = D_c - sum p(c'|x) D_c', the
    direction that the posterior implies (both are the same where the base is exact), the
    multiple of G in H, and the multiples of G and of H in D_mclr - D_c.
    """
    run, params = bench.load(bench.base(seed))
    tuned_run, tuned = bench.load(model.workdir(seed))
    judge, judge_params = bench.load("classifier")
    null = run.model.null_label
    log_posterior = posterior.from_classifier(judge.model.logits(judge_params), null)

    @jax.jit
    def products(x, sigma, keys, label):
        base = run.model.denoise(params)
        own = base(x, sigma, label)
        probs = jnp.exp(log_posterior(x, sigma, Condition(label), keys))
        mean = sum(
            probs[:, c, None, None, None] * base(x, sigma, jnp.full_like(label, c))
            for c in range(null)
        )
        cfg, bayes = own - base(x, sigma, jnp.full_like(label, null)), own - mean
        moved = tuned_run.model.denoise(tuned)(x, sigma, label) - own
        pairs = [(bayes, cfg), (moved, cfg), (cfg, cfg), (moved, bayes), (bayes, bayes)]
        return jnp.stack([(a * b).sum() for a, b in pairs])

    source = sources.load(bench.source, "test")
    images, labels = source[np.arange(min(count, len(source)) // bench.batch * bench.batch)]
    x0, table = np.asarray(to_float(images)), {}
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
        for kind, (run, params) in loaded.items():
            start = time.perf_counter()
            generate.generate(
                run.model, params, labels, run.sampler, batch_size=bench.batch, **options[kind]
            )
            rates.setdefault(kind, []).append(len(labels) / (time.perf_counter() - start))
    return {kind: float(np.median(r[1:])) for kind, r in rates.items()}


def _task(bench, seed: int, changes: dict | None):
    """(config, source, task) of a fine-tuning."""
    config = bench.fine_tuning(seed, changes)
    source = sources.from_config(config.data, "train", config.seed)
    data = experiment.data_info(config, source)
    task = experiment.make_task(config, data, runs.companions(config, data, bench.root))
    return config, source, task


def step_flops(bench, objectives: dict, seed: int) -> dict:
    """FLOPs of a training step of objectives (as Model.changes) relative to DSM's."""
    flops = {}
    for name, changes in ({"dsm": None} | objectives).items():
        config, _, task = _task(bench, seed, changes)
        flops[name] = plan.step_flops(task, config.batch_size)
    return {name: value / flops["dsm"] for name, value in flops.items()}


def step_cost(bench, objectives: dict, seed: int, steps: int = 10, rounds: int = 7) -> dict:
    """Time of a training step of objectives (as Model.changes) relative to DSM's: medians.

    They are run alternately.
    """
    entries: dict = {}
    for name, changes in ({"dsm": None} | objectives).items():
        config, source, task = _task(bench, seed, changes)
        extra = main.extra_sources(config, task, source)
        stream = pipeline.stream(source, config.batch_size, 0, extra=extra)
        batches = pipeline.stack(stream, steps, steps)
        update = jax.jit(make_update(task), donate_argnums=0)
        state = jax.jit(functools.partial(init_state, task))()
        frozen = {k: runs.load_model(p)[1] for k, p in runs.companion_paths(config).items()}
        entries[name] = [update, state, frozen, batches, []]
    for _ in range(rounds + 1):  # the first compiles
        for entry in entries.values():
            update, state, frozen, batches, seconds = entry
            start = time.perf_counter()
            entry[1] = jax.block_until_ready(update(state, frozen, batches, steps)[0])
            seconds.append((time.perf_counter() - start) / steps)
    base = np.median(entries["dsm"][-1][1:])
    return {name: float(np.median(entry[-1][1:]) / base) for name, entry in entries.items()}
