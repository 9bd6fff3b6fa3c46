"""MCLR against CFG on real images: one base model, matched budgets, three seeds.

  python benchmarks/mclr_images.py --data=fashion_mnist
  python benchmarks/mclr_images.py --data=digits

Every task (a training run, or the sampling and judging of one model at one guidance scale) is a
process of its own on one core, as many at a time as --jobs; its outcome is a file under
runs/mclr_DATA, so that the same command goes on after an interruption. The last task writes
benchmarks/results/DATA_mclr.json. Needs the package installed (pip install -e .).
"""

import argparse
import dataclasses
import functools
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

BATCH = 50  # samples at a time: on a CPU core twice as fast as 250, which leaves its cache

# gamma = guidance_scale - 1 of CFG, beta of MCLR.
SETTINGS = {
    "fashion_mnist": {
        "samples": 5000,
        "one_base": True,
        "cfg": (0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
        "beta": (0.4, 0.6, 1.0),
        "strength": (0.2, 0.4, 0.6, 1.0),
        "judge_steps": {"features": 1500, "accuracy": 2500},
    },
    "digits": {
        "samples": 2000,
        "one_base": False,
        "cfg": (0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
        "beta": (0.2, 0.3, 0.5, 1.0),
        "strength": (0.1, 0.2, 0.3, 0.5, 1.0),
        "judge_steps": {"features": 600, "accuracy": 600},
    },
}
JUDGES = {
    "features": {"name": "conv_classifier", "channels": (32, 64), "patch_size": 2},
    "accuracy": {"name": "mlp_classifier", "width": 256, "depth": 2},
}
# Changes of the objective in configs/DATA_mclr.py, at its own beta; of the first seed alone.
VARIANTS = {
    "data": {"target": "data"},
    "prior_weighted": {"negatives": "prior", "weighting": "cfg", "negative_share": 1.0},
    "interval": {"sigma_interval": (0.1, 2.0)},
    "plain_clip": {
        "target": "data",
        "negatives": "mismatched",
        "negative_share": 1.0,
        "bound": "clip",
        "clip_ratio": 1.5,
    },
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where everything is, and how each part is made."""

    data: str

    @property
    def settings(self) -> dict:
        return SETTINGS[self.data]

    @property
    def root(self) -> pathlib.Path:
        return ROOT / "runs" / f"mclr_{self.data}"

    def config(self, name: str = ""):
        return importlib.import_module(f"configs.{self.data}{name}").get_config()

    def base(self, seed: int) -> str:
        return "base" if self.settings["one_base"] else f"base_{seed}"

    def train_base(self, seed: int) -> None:
        config = self.config()
        config.seed = seed
        self.train(self.base(seed), config)

    def train(self, name: str, config) -> None:
        """Train to the end; `done` says so."""
        from mclr_jax.training.loop import train

        train(config, self.root / name)
        (self.root / name / "done").touch()

    def judge(self, judge: str) -> None:
        """A classifier of clean images (noise of level 0.01), to judge samples with."""
        from ml_collections import ConfigDict

        config = self.config("_classifier")
        config.noise = ConfigDict({"name": "loguniform", "sigma_min": 0.01, "sigma_max": 0.01})
        config.network = ConfigDict(JUDGES[judge] | {"dropout": 0.1, "dtype": "float32"})
        config.num_steps = self.settings["judge_steps"][judge]
        config.batch_size = 64
        config.seed = 100
        self.train(f"judge_{judge}", config)

    def fine_tune(self, name: str, seed: int, control: bool, changes: dict) -> None:
        """MCLR, or DSM with the same steps and learning rates."""
        config = self.config("_mclr")
        config.init_from = str(self.root / self.base(seed))
        config.objective.posterior_from = str(self.root / "classifier")
        config.objective.update(changes)
        if control:
            config.objective = self.config().objective
        config.seed = seed + 1
        config.sample_every = 0
        self.train(name, config)

    def sample(self, name: str, model: str, gamma: float, seed: int) -> None:
        """Samples of a model, judged; features are kept to compare sets of samples."""
        import numpy as np

        from mclr_jax import generate, run

        experiment = run.load_experiment(self.root / model)
        params, _ = run.load_weights(self.root / model)
        labels = np.resize(np.arange(experiment.null_label), self.settings["samples"])
        samples = generate.generate(
            experiment, params, labels, seed=seed, guidance_scale=1 + gamma, batch_size=BATCH
        )
        calls = {"network_calls": generate.network_calls(experiment, guidance_scale=1 + gamma)}
        self.store(name, np.round(samples.clip(-1, 1) * 127.5) / 127.5, labels, calls)

    def calibrate(self) -> None:
        """How well the posterior is calibrated on held-out images, by noise level."""
        import jax
        import numpy as np

        from mclr_jax import noise, posterior, run
        from mclr_jax.data import pipeline, sources

        experiment = run.load_experiment(self.root / "classifier")
        params, _ = run.load_weights(self.root / "classifier")
        log_posterior = jax.jit(
            posterior.from_classifier(experiment.logits(params), experiment.null_label)
        )
        table: dict = {}
        for split in ("train", "test"):
            source = sources.load(self.data, split)
            images, labels = source[np.arange(min(5000, len(source)))]
            x0, table[split] = np.asarray(pipeline.to_float(images)), {}
            for sigma in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
                keys = noise.sample_keys(0, np.arange(len(x0)))
                x = x0 + sigma * noise.normal_like(keys, x0)
                log_probs = log_posterior(x, np.full(len(x), sigma, np.float32), keys, labels)
                table[split][f"{sigma:g}"] = posterior.calibration_error(log_probs, labels)
        self.write("calibration", table)

    def real(self, split: str) -> None:
        """The floor: real images judged as samples are. `train` is the reference itself."""
        import numpy as np

        from mclr_jax.data import pipeline, sources

        source = sources.load(self.data, split)
        count = len(source) if split == "train" else min(self.settings["samples"], len(source))
        images, labels = source[np.arange(count)]
        self.store(f"real_{split}", np.asarray(pipeline.to_float(images)), labels, {})

    def compared(self, seed: int) -> dict[str, str]:
        """The work directories of the models whose speed is compared."""
        mclr = f"posterior_beta{self.settings['beta'][0]:g}_{seed}"
        return {"base": f"control_{seed}", "cfg": f"control_{seed}", "mclr": mclr}

    def speed(self, seed: int) -> None:
        """Samples per second without and with guidance and by MCLR, run alternately: medians."""
        import numpy as np

        from mclr_jax import generate, run

        loaded = {}
        for kind, name in self.compared(seed).items():
            params, _ = run.load_weights(self.root / name)
            scale = 1.3 if kind == "cfg" else 1.0
            loaded[kind] = run.load_experiment(self.root / name), params, scale
        labels = np.resize(np.arange(10), 5 * BATCH)
        rates: dict[str, list[float]] = {kind: [] for kind in loaded}
        for _ in range(6):  # the first compiles
            for kind, (experiment, params, scale) in loaded.items():
                start = time.perf_counter()
                generate.generate(
                    experiment, params, labels, guidance_scale=scale, batch_size=BATCH
                )
                rates[kind].append(len(labels) / (time.perf_counter() - start))
        self.write("speed", {kind: float(np.median(r[1:])) for kind, r in rates.items()})

    def step_cost(self, steps: int = 10, rounds: int = 7) -> None:
        """Time of a training step relative to DSM's, run alternately: medians."""
        import jax
        import ml_collections
        import numpy as np

        from mclr_jax import run
        from mclr_jax.data import pipeline
        from mclr_jax.training import loop
        from mclr_jax.training import step as training_step

        frozen = {"classifier": run.load_weights(self.root / "classifier")[0]}
        classifier = run.load_experiment(self.root / "classifier")
        dsm = self.config("_mclr")
        dsm.objective = self.config().objective
        configs = {"dsm": dsm}
        for share in (1.0, 0.5):
            config = ml_collections.ConfigDict(self.config("_mclr"))
            config.objective.negative_share = share
            configs[f"mclr, negative_share {share:g}"] = config
        source = loop.load_source(dsm, "train")
        batches = loop.stack(pipeline.stream(source, dsm.batch_size, 0), steps, steps)
        runs: dict = {}
        for name, config in configs.items():
            mclr = config is not dsm
            experiment = loop.make_experiment(config, source, classifier if mclr else None)
            update = jax.jit(training_step.make_update(experiment), donate_argnums=0)
            state = jax.jit(functools.partial(training_step.init_state, experiment))()
            runs[name] = [update, state, frozen if mclr else {}, []]
        for _ in range(rounds + 1):  # the first compiles
            for entry in runs.values():
                update, state, held, seconds = entry
                start = time.perf_counter()
                entry[1] = jax.block_until_ready(update(state, held, batches, steps)[0])
                seconds.append((time.perf_counter() - start) / steps)
        base = np.median(runs["dsm"][-1][1:])
        cost = {name: float(np.median(entry[-1][1:]) / base) for name, entry in runs.items()}
        self.write("step_cost", cost)

    def write(self, name: str, value: dict) -> None:
        from mclr_jax.run import write_atomically

        write_atomically(self.root / f"{name}.json", json.dumps(value, indent=1))

    def read(self, name: str) -> dict:
        return json.loads((self.root / f"{name}.json").read_text())

    def store(self, name: str, images, labels, more: dict) -> None:
        """Features and metrics of images (n, ...) in [-1, 1] -> NAME.npz, NAME.json."""
        import numpy as np

        from mclr_jax.evaluation import metrics
        from mclr_jax.run import write_atomically

        features, log_probs = self.judged("features", images)
        buffer = io.BytesIO()
        np.savez(buffer, features=features, labels=labels)
        (self.root / "sets").mkdir(exist_ok=True)
        row: dict = {"samples": len(images), **more}
        if name != "real_train":
            with np.load(self.root / "sets" / "real_train.npz") as real:
                real_features, real_labels = real["features"], real["labels"]
            reference = metrics.moments(real_features)
            subset = np.random.default_rng(0).permutation(len(real_labels))[: len(images)]
            precision, recall = metrics.precision_recall(real_features[subset], features)
            per_class = metrics.per_class_frechet(features, labels, real_features, real_labels)
            row |= {
                "frechet": metrics.frechet_distance(metrics.moments(features), reference),
                "per_class_frechet": float(np.mean(per_class)),
                "inter_class_frechet": metrics.inter_class_frechet(features, labels),
                "inception_score": metrics.inception_score(np.exp(log_probs)),
                "accuracy": float((self.judged("accuracy", images)[1].argmax(1) == labels).mean()),
                "precision": precision,
                "recall": recall,
            }
        write_atomically(self.root / "sets" / f"{name}.npz", buffer.getvalue())
        self.write(f"sets/{name}", row)

    def judged(self, judge: str, images):
        """(features (n, d), log probabilities (n, K)) by a judge."""
        import jax
        import numpy as np
        import scipy.special

        from mclr_jax import run

        experiment = run.load_experiment(self.root / f"judge_{judge}")
        params, _ = run.load_weights(self.root / f"judge_{judge}")
        compute = jax.jit(experiment.features)
        kept = []
        for chunk in np.array_split(images, -(-len(images) // 500)):
            padded = np.resize(chunk, (500, *chunk.shape[1:]))  # one program serves all
            kept.append([a[: len(chunk)] for a in jax.device_get(compute(params, padded))])
        features, logits = (
            np.concatenate(arrays).astype(np.float64) for arrays in zip(*kept, strict=True)
        )
        return features, scipy.special.log_softmax(logits, axis=1)

    # ---- the parts together ------------------------------------------------------------------

    def tasks(self, seeds: tuple[int, ...]) -> list["Task"]:
        """All tasks but the last, each after those it needs."""
        beta, cfg = self.settings["beta"], self.settings["cfg"]
        tasks = [
            Task("classifier", lambda: self.train("classifier", self.config("_classifier")),
                 "classifier/done"),
            *(Task(f"judge_{j}", lambda j=j: self.judge(j), f"judge_{j}/done") for j in JUDGES),
        ]  # fmt: skip
        tasks.append(Task("calibration", self.calibrate, "calibration.json", ("classifier/done",)))
        judges = tuple(f"judge_{j}/done" for j in JUDGES)
        for seed in [seeds[0]] if self.settings["one_base"] else seeds:
            name = self.base(seed)
            tasks.append(Task(name, functools.partial(self.train_base, seed), f"{name}/done"))
        for split, needs in [("train", judges), ("test", ("sets/real_train.json",))]:
            tasks.append(Task(f"real_{split}", functools.partial(self.real, split),
                              f"sets/real_{split}.json", needs))  # fmt: skip

        def model(name: str, seed: int, gammas, control=False, **changes) -> None:
            """A fine-tuned model, and its samples at each of the strengths."""
            workdir = f"{name}_{seed}"
            tune = functools.partial(self.fine_tune, workdir, seed, control, changes)
            start = (f"{self.base(seed)}/done", "classifier/done")
            tasks.append(Task(workdir, tune, f"{workdir}/done", start))
            for gamma in gammas:
                row = f"{workdir}_at_{gamma:g}"
                draw = functools.partial(self.sample, row, workdir, gamma, seed)
                needs = (f"{workdir}/done", "sets/real_train.json")
                tasks.append(Task(row, draw, f"sets/{row}.json", needs))

        for seed in seeds:
            model("control", seed, (0.0, *cfg), control=True)
            for b in beta:
                model(f"posterior_beta{b:g}", seed, (0.0,), beta=b)
            strengths = self.settings["strength"]
            model("strength", seed, strengths, strength=(0.0, max(strengths)))
        for name, changes in VARIANTS.items():
            model(name, seeds[0], (0.0,), **changes)
        models = tuple(f"{name}/done" for name in self.compared(seeds[0]).values())
        tasks.append(Task("speed", functools.partial(self.speed, seeds[0]), "speed.json", models))
        tasks.append(Task("step_cost", self.step_cost, "step_cost.json", ("classifier/done",)))
        return tasks


@dataclasses.dataclass(frozen=True)
class Task:
    """One process: `run` makes the file `output`, once the files `needs` are there."""

    name: str
    run: Callable[[], None]
    output: str
    needs: tuple[str, ...] = ()


def schedule(bench: Bench, tasks: list[Task], arguments: list[str], jobs: int) -> None:
    """Run what is missing, `jobs` processes at a time, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    running: dict[int, tuple[Task, subprocess.Popen]] = {}
    started: set[str] = set()
    logs = bench.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def there(output: str) -> bool:
        return (bench.root / output).exists()

    while any(not there(task.output) for task in tasks):
        for core, (task, process) in list(running.items()):
            if process.poll() is not None:
                del running[core]
                if process.returncode:
                    sys.exit(f"{task.name} failed; see {logs / task.name}.log")
                print(f"{time.strftime('%H:%M:%S')} {task.name}", flush=True)
        ready = [
            task for task in tasks
            if task.name not in started and not there(task.output) and all(map(there, task.needs))
        ]  # fmt: skip
        for core in [c for c in cores if c not in running][: len(ready)]:
            task = ready.pop(0)
            started.add(task.name)
            command = ["taskset", "-c", str(core), sys.executable, __file__, *arguments]
            with (logs / f"{task.name}.log").open("ab") as log:
                running[core] = task, subprocess.Popen(
                    [*command, f"--task={task.name}"], stdout=log, stderr=log
                )  # fmt: skip
        time.sleep(0.5)


def collect(bench: Bench, seeds: tuple[int, ...]) -> dict:
    """All rows, and what they say."""
    import numpy as np

    from mclr_jax import run
    from mclr_jax.evaluation import metrics
    from mclr_jax.training.devices import banner

    def row(name: str) -> dict:
        return bench.read(f"sets/{name}")

    def moments(name: str):
        with np.load(bench.root / "sets" / f"{name}.npz") as file:
            return metrics.moments(file["features"])

    def mean(names: list[str]) -> dict:
        """Mean over seeds and, where there are several, their standard deviation."""
        rows = [row(name) for name in names]
        both = {key: [r[key] for r in rows] for key in rows[0]}
        spread = {f"{k}_std": float(np.std(v, ddof=1)) for k, v in both.items() if len(rows) > 1}
        return {key: float(np.mean(v)) for key, v in both.items()} | spread

    models = {"base": [f"control_{s}_at_0" for s in seeds]}
    for gamma in bench.settings["cfg"]:
        models[f"cfg {gamma:g}"] = [f"control_{s}_at_{gamma:g}" for s in seeds]
    for beta in bench.settings["beta"]:
        models[f"mclr {beta:g}"] = [f"posterior_beta{beta:g}_{s}_at_0" for s in seeds]
    for beta in bench.settings["strength"]:
        models[f"mclr strength {beta:g}"] = [f"strength_{s}_at_{beta:g}" for s in seeds]
    for name in VARIANTS:
        models[f"mclr {name}"] = [f"{name}_{seeds[0]}_at_0"]
    table = {name: mean(rows) for name, rows in models.items()}

    # The theorem on real data: samples of MCLR at beta against those of CFG at gamma = beta, from
    # other noise; beside it two sets of CFG samples from different noise, where there are two.
    theorem: dict = {}
    pairs = [(a, b) for a in seeds for b in seeds if a != b]
    for beta in sorted(set(bench.settings["beta"]) & set(bench.settings["cfg"])):
        kinds = {
            "unguided": "control_{}_at_0",
            "mclr": f"posterior_beta{beta:g}_{{}}_at_0",
            "mclr_strength": f"strength_{{}}_at_{beta:g}",
            "floor": f"control_{{}}_at_{beta:g}",
        }
        for kind, name in kinds.items():
            used = pairs or ([(seeds[0], seeds[0])] if kind != "floor" else [])
            distances = [
                metrics.frechet_distance(
                    moments(name.format(a)), moments(f"control_{b}_at_{beta:g}")
                )
                for a, b in used
            ]
            if distances:
                theorem.setdefault(f"{beta:g}", {})[kind] = float(np.mean(distances))

    rates = bench.read("speed")

    def best(prefix: str) -> str:
        return min((n for n in table if n.startswith(prefix)), key=lambda n: table[n]["frechet"])

    def summarised(name: str, kind: str) -> dict:
        keys = ("frechet", "accuracy", "network_calls")
        return (
            {"name": name} | {k: table[name][k] for k in keys} | {"samples_per_second": rates[kind]}
        )

    summary = {"base": summarised("base", "base"), "cfg_best": summarised(best("cfg"), "cfg"),
               "mclr": summarised(best("mclr"), "mclr")}  # fmt: skip
    gap = summary["base"]["frechet"] - summary["cfg_best"]["frechet"]
    summary["gap_closed"] = (summary["base"]["frechet"] - summary["mclr"]["frechet"]) / gap
    summary["speedup_over_cfg"] = rates["mclr"] / rates["cfg"]
    experiment = run.load_experiment(bench.root / bench.base(seeds[0]))
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "command": f"python benchmarks/mclr_images.py --data={bench.data} "
        f"--seeds={','.join(map(str, seeds))}",
        "revision": revision.stdout.strip(),
        "device": banner(),
        "config": experiment.config.to_dict(),
        "features": "last hidden layer of judge_features; 8-bit rounding; reference: training set",
        "judges": JUDGES,
        "seeds": seeds,
        "summary": summary,
        "floor": row("real_test"),
        "table": table,
        "frechet_to_cfg": theorem,
        "step_cost_relative_to_dsm": bench.read("step_cost"),
        "fine_tuning_share_of_base_steps": bench.config("_mclr").num_steps
        / bench.config().num_steps,
        "calibration": bench.read("calibration"),
        "rows": {name: row(name) for rows in models.values() for name in rows},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=sorted(SETTINGS), default="fashion_mnist")
    parser.add_argument("--seeds", default="0,1,2", help="of fine-tuning and sampling")
    parser.add_argument("--jobs", type=int, default=2, help="tasks at a time, one core each")
    parser.add_argument("--task", help="run this task alone, in this process")
    arguments = parser.parse_args()
    seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    bench = Bench(arguments.data)
    tasks = bench.tasks(seeds)
    import jax

    cache = pathlib.Path.home() / ".cache" / "mclr_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    if arguments.task:
        next(task for task in tasks if task.name == arguments.task).run()
        return
    start = time.time()
    schedule(bench, tasks, sys.argv[1:], arguments.jobs)
    result = collect(bench, seeds) | {"seconds_of_this_call": round(time.time() - start)}
    from mclr_jax.run import write_atomically

    path = RESULTS / f"{bench.data}_mclr.json"
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    for name, values in result["table"].items():
        print(f"{name:22s}", *(f"{k} {values[k]:.3f}" for k in ("frechet", "accuracy", "recall")))
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
