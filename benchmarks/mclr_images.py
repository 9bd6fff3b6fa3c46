"""MCLR against CFG on real images: one base model, matched budgets, three seeds.

  python benchmarks/mclr_images.py --data=fashion_mnist
  python benchmarks/mclr_images.py --data=digits

Every task (a training run, or the sampling and judging of one model at one guidance scale) is a
process of its own on one core, as many at a time as --jobs; its outcome is a file under
runs/mclr_DATA, so that the same command continues after an interruption. The last task writes
benchmarks/results/DATA_mclr.json. Needs the package installed (pip install -e .).
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable

import mclr_figures
import mclr_probes
import numpy as np
from tasks import RESULTS, ROOT, Files, Task, add_flags, config_of, run, training

from configs import base as configs_base
from mclr_jax import generate, images, runs
from mclr_jax.data import sources
from mclr_jax.data.pixels import to_float
from mclr_jax.evaluation import evaluate, features, metrics
from mclr_jax.files import save_arrays, write_json

# gamma = guidance_scale - 1 of CFG, beta of MCLR; interpolation between the weights of the base and
# those of MCLR at the largest beta.
SETTINGS = {
    "fashion_mnist": {
        "samples": 5000,
        "one_base": True,
        "cfg": (0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
        "beta": (0.4, 1.0),
        "strength": (0.2, 0.4, 0.6, 1.0),
        "interpolation": (0.2, 0.4, 0.6, 1.5),
        "judge_steps": {"features": 1500, "accuracy": 2500},
    },
    "digits": {
        "samples": 2000,
        "one_base": False,
        "cfg": (0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
        "beta": (0.3, 1.0),
        "strength": (0.1, 0.2, 0.3, 0.5, 1.0),
        "interpolation": (0.1, 0.2, 0.3, 0.5),
        "judge_steps": {"features": 600, "accuracy": 600},
    },
    # 100 classes: the configs of digits with longer training; for guidance_free.py alone.
    "two_digits": {
        "samples": 5000,
        "one_base": True,
        "configs": "digits",
        "source": "two_digits:pairs",
        "steps": {"": 4000, "_classifier": 2000},
        "judge_steps": {"features": 2000, "accuracy": 3000},
    },
}
JUDGES = {
    "features": {
        "network": {"name": "conv_classifier", "channels": (32, 64), "patch_size": 2},
        "weight_decay": 0.0,
    },
    "accuracy": {
        "network": {"name": "mlp_classifier", "width": 256, "depth": 2},
        "weight_decay": 0.3,
    },
}
METRICS = ("fd", "fd_class", "fd_inter", "is", "pr", "dc")  # and accuracy, and copies
# A second judge, which has seen neither these images nor these classes: ImageNet features.
SECOND, SECOND_METRICS, SECOND_REFERENCE = "efficientnet_lite0", ("fd", "fd_class"), 10_000
# Changes of configs/DATA_mclr.py, at its own beta; of the first seed alone.
VARIANTS = {
    "data": {"objective.target": "data"},
    "prior_weighted": {
        "objective.negatives": "prior",
        "objective.weighting": "cfg",
        "objective.negative_share": 1.0,
    },
    "dsm_noise": {"noise.mean": -1.2},  # as the base draws it
    "plain_clip": {
        "objective.target": "data",
        "objective.negatives": "mismatched",
        "objective.negative_share": 1.0,
        "objective.bound": "clip",
        "objective.clip_ratio": 1.5,
    },
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
      tuned: name of the fine-tuning; with the seed, its work directory.
      gamma: guidance, or the strength that is given to the network, when sampling.
      seeds: of fine-tuning and sampling.
      changes: of configs/DATA_mclr.py, see `tasks.config_of`; None for the control, which
        is trained by DSM.
      interpolation: place on the line from the base's weights to the fine-tuned ones.
      interval: noise levels to guide in; None for all.
      weak: work directory of the weaker model of autoguidance; "" for none.
      needs: files that must be there before fine-tuning; {base} is replaced by the base's name.
    """

    tuned: str
    gamma: float
    seeds: tuple[int, ...]
    changes: dict | None
    interpolation: float = 1.0
    interval: tuple[float, float] | None = None
    weak: str = ""
    needs: tuple[str, ...] = ()

    def workdir(self, seed: int) -> str:
        return f"{self.tuned}_{seed}"

    def samples(self, seed: int) -> str:
        more = ("_interval" if self.interval else "") + ("_weak" if self.weak else "")
        share = f"_share_{self.interpolation:g}" if self.interpolation != 1 else ""
        return f"{self.workdir(seed)}_at_{self.gamma:g}{share}{more}"


@dataclasses.dataclass(frozen=True)
class Bench(Files):
    """Where everything is, and how each part is made."""

    data: str
    base_steps: int = 0  # of another base than that of configs/DATA.py
    batch: int = 50  # samples at a time: on a CPU core twice as fast as 250, which leaves its cache

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.data}_{self.base_steps}" if self.base_steps else self.data

    @property
    def settings(self) -> dict:
        return SETTINGS[self.data]

    @property
    def root(self) -> pathlib.Path:
        return ROOT / "runs" / f"mclr_{self.name}"

    @property
    def configs(self) -> str:
        """How the names of its configs begin."""
        return self.settings.get("configs", self.data)

    @property
    def source(self) -> str:
        return self.settings.get("source", self.data)

    def config(self, name: str = "", changes: dict | None = None):
        steps = self.settings.get("steps", {}).get(name)
        own = {"data.name": self.source} | ({"num_steps": steps} if steps else {})
        return config_of(f"{self.configs}{name}", own | (changes or {}))

    def base(self, seed: int) -> str:
        return "base" if self.settings["one_base"] else f"base_{seed}"

    def train_base(self, seed: int) -> None:
        config = self.config()
        config.seed = seed
        config.num_steps = self.base_steps or config.num_steps
        config.sample_every = 0
        self.train(self.base(seed), self.configs, config)

    def share(self) -> None:
        """Posterior and judges are those of the base of configs/DATA.py, where it has some."""
        own = dataclasses.replace(self, base_steps=0).root
        for name in ("classifier", *(f"judge_{j}" for j in JUDGES)):
            if (own / done(name)).exists() and not (self.root / name).exists():
                self.root.mkdir(parents=True, exist_ok=True)
                (self.root / name).symlink_to(own / name)

    def train_classifier(self) -> None:
        """The posterior that MCLR draws from."""
        self.train("classifier", f"{self.configs}_classifier", self.config("_classifier"))

    def judge(self, judge: str) -> None:
        """A classifier of clean images (noise of level 0.01), to judge samples with."""
        config = self.config("_classifier")
        config.noise = configs_base.options("loguniform", sigma_min=0.01, sigma_max=0.01)
        config.network = configs_base.options(**JUDGES[judge]["network"], dropout=0.1)
        config.optimizer.weight_decay = JUDGES[judge]["weight_decay"]
        config.num_steps = self.settings["judge_steps"][judge]
        config.batch_size = 64
        config.seed = 100
        self.train(f"judge_{judge}", f"{self.configs}_classifier", config)

    def fine_tuning(self, seed: int, changes: dict | None):
        """The config of MCLR, or of another objective with the same steps and learning rates."""
        config = self.config("_mclr", changes)
        if changes is None:
            plain = self.config()
            config.noise, config.objective = plain.noise, plain.objective
        config.init_from = str(self.root / self.base(seed))
        config.companions.classifier = str(self.root / "classifier")
        config.seed = seed + 1
        config.sample_every = 0
        return config

    def tune(self, name: str, seed: int, changes: dict | None) -> None:
        self.train(name, f"{self.configs}_mclr", self.fine_tuning(seed, changes))

    def load(self, name: str, interpolation: float = 1.0):
        """(run, parameters) of this work directory."""
        found = runs.load(self.root / name)
        return found, found.weights(interpolation=interpolation)[0]

    def options(self, model: Model) -> dict:
        """How to sample from a model."""
        weak = runs.load_model(self.root / model.weak) if model.weak else None
        return {"guidance_scale": 1 + model.gamma, "interval": model.interval, "weak": weak}

    def sample(self, model: Model, seed: int) -> None:
        """Samples of a model, judged; features are kept to compare sets of samples."""
        found, params = self.load(model.workdir(seed), model.interpolation)
        labels = np.resize(np.arange(found.model.null_label), self.settings["samples"])
        options = self.options(model)
        samples = generate.generate(
            found.model, params, labels, found.sampler,
            seed=seed, batch_size=self.batch, **options,
        )  # fmt: skip
        calls = generate.network_calls(found.model, found.sampler, **options)
        self.store(
            model.samples(seed), images.as_8_bits(samples), labels,
            {"network_calls": calls}, found.workdir,
        )  # fmt: skip

    def real(self, split: str) -> None:
        """The floor: real images judged as samples are. `train` is the reference itself."""
        source = sources.load(self.source, split)
        count = len(source) if split == "train" else min(self.settings["samples"], len(source))
        pixels, labels = source[np.arange(count)]
        self.store(f"real_{split}", np.asarray(to_float(pixels)), labels, {})

    def store(
        self, name: str, pixels, labels, more: dict, workdir: pathlib.Path | None = None
    ) -> None:
        """Features and metrics of images (n, ...) in [-1, 1] -> NAME.npz, NAME.json."""
        found = self.judged("features", pixels, labels)
        row: dict = {"samples": len(pixels), **more}
        if name != "real_train":
            with np.load(self.root / "sets" / "real_train.npz") as file:
                nothing = np.zeros((len(file["labels"]), 0))
                kept = features.Features(file["features"], nothing, file["labels"])
            real = evaluate.RealStatistics(metrics.moments(kept.features), kept, "")
            row |= evaluate.measure(found, real, METRICS, self.judged("accuracy", pixels, labels))
            row["memorized"] = evaluate.memorized(pixels, sources.load(self.source, "train"))
        save_arrays(
            self.root / "sets" / f"{name}.npz", features=found.features, labels=labels,
            images=images.to_uint8(np.asarray(pixels)),
        )  # fmt: skip
        self.write(f"sets/{name}", row, workdir)

    def second(self, name: str) -> None:
        """A set of images before the second judge -> second/NAME.json."""
        reference = "second/real_train"
        with np.load(self.root / "sets" / f"{name}.npz") as file:
            pixels, labels = file["images"], file["labels"]
        if name == "real_train":
            rows = np.linspace(0, len(labels) - 1, SECOND_REFERENCE).astype(int)
            pixels, labels = pixels[rows], labels[rows]
        found, row = features.load(SECOND)(pixels, labels), {"samples": len(labels)}
        if name == "real_train":
            save_arrays(self.root / f"{reference}.npz", features=found.features, labels=labels)
        else:
            with np.load(self.root / f"{reference}.npz") as file:
                kept = found._replace(features=file["features"], labels=file["labels"])
            real = evaluate.RealStatistics(metrics.moments(kept.features), kept, "")
            row |= evaluate.measure(found, real, SECOND_METRICS)
            del row["accuracy"]  # of ImageNet's classes
        self.write(f"second/{name}", row)

    def judged(self, judge: str, pixels, labels) -> features.Features:
        """Features of images in [-1, 1] by a judge."""
        return features.load(f"classifier:{self.root / f'judge_{judge}'}")(pixels, labels)

    def row(self, name: str) -> dict:
        """A set of images: what was measured, and what made it."""
        row = self.read(f"sets/{name}") | self.made_by(f"sets/{name}")
        if self.there(f"second/{name}"):
            row[SECOND] = self.read(f"second/{name}") | self.made_by(f"second/{name}")
        return row

    def models(self, seeds: tuple[int, ...]) -> dict[str, Model]:
        """The rows of the table by name."""
        models = {"base": Model("control", 0.0, seeds, None)}
        for gamma in self.settings["cfg"]:
            models[f"cfg {gamma:g}"] = Model("control", gamma, seeds, None)
        for beta in self.settings["beta"]:
            changes: dict = {"objective.beta": beta}
            models[f"mclr {beta:g}"] = Model(f"posterior_beta{beta:g}", 0.0, seeds, changes)
        for beta in self.settings["strength"]:
            changes = {"strength": (0.0, max(self.settings["strength"]))}
            models[f"mclr strength {beta:g}"] = Model("strength", beta, seeds, changes)
        beta = max(self.settings["beta"])
        for place in self.settings["interpolation"]:
            changes = {"objective.beta": beta}
            models[f"mclr share {place:g}"] = Model(
                f"posterior_beta{beta:g}", 0.0, seeds, changes, place
            )
        for name, changes in VARIANTS.items():
            models[f"mclr {name}"] = Model(name, 0.0, seeds[:1], changes)
        return models

    def probe(self, function: str, needs: tuple[str, ...], *arguments, output: str = "") -> Task:
        """The task of a function in mclr_probes; `output` is the function's name if empty."""
        name = output or function

        def measure():
            self.write(name, getattr(mclr_probes, function)(self, *arguments))

        return Task(name, measure, f"{name}.json", needs)

    # ---- the parts together ------------------------------------------------------------------

    def tasks(self, seeds: tuple[int, ...]) -> list[Task]:
        """All tasks but the last, each after those it needs."""
        tasks = [
            Task("classifier", self.train_classifier, done("classifier")),
            *(Task(f"judge_{j}", functools.partial(self.judge, j), done(f"judge_{j}"))
              for j in JUDGES),
        ]  # fmt: skip
        tasks.append(self.probe("calibration", (done("classifier"),)))
        judges = tuple(done(f"judge_{j}") for j in JUDGES)
        for seed in [seeds[0]] if self.settings["one_base"] else seeds:
            name = self.base(seed)
            tasks.append(Task(name, functools.partial(self.train_base, seed), done(name)))
        for split, needs in [("train", judges), ("test", ("sets/real_train.json",))]:
            tasks.append(Task(f"real_{split}", functools.partial(self.real, split),
                              f"sets/real_{split}.json", needs))  # fmt: skip

        models = self.models(seeds)
        for seed in seeds:
            for model in models.values():
                if seed not in model.seeds:
                    continue
                workdir, samples = model.workdir(seed), model.samples(seed)
                tune = functools.partial(self.tune, workdir, seed, model.changes)
                needs = (need.format(base=self.base(seed)) for need in model.needs)
                start = (done(self.base(seed)), done("classifier"), *needs)
                if workdir not in [task.name for task in tasks]:
                    tasks.append(Task(workdir, tune, done(workdir), start))
                read = [workdir, *([model.weak] if model.weak else [])]
                tasks.append(Task(samples, functools.partial(self.sample, model, seed),
                                  f"sets/{samples}.json",
                                  (*map(done, read), "sets/real_train.json")))  # fmt: skip
        return [*tasks, *self.probes(models, seeds[0])]

    def probes(self, models: dict[str, Model], seed: int) -> list[Task]:
        """What is measured beside samples."""
        own = f"mclr {self.config('_mclr').objective.beta:g}"
        compared = {
            "base": models["base"],
            "cfg": models[f"cfg {self.settings['cfg'][0]:g}"],
            "mclr": models[own],
        }
        objectives = {"mclr": {}, "mclr, target data": {"objective.target": "data"},
                      "mclr, all negatives": {"objective.negative_share": 1.0}}  # fmt: skip
        tuned = tuple(done(model.workdir(seed)) for model in compared.values())
        start = (done(self.base(seed)), done("classifier"))
        return [
            self.probe("speed", tuned, compared, seed),
            self.probe("profile", (*tuned, *start), models[own], seed),
            self.probe("step_cost", start, objectives, seed),
        ]


def done(workdir: str) -> str:
    """The file that says that a training has come to its end."""
    return f"{workdir}/done.json"


def trainings(bench: Bench, seeds: tuple[int, ...], *more: str) -> dict[str, dict]:
    """How the runs were trained that no row shows: bases, classifier, judges."""
    names = [*dict.fromkeys(map(bench.base, seeds)), "classifier", *(f"judge_{j}" for j in JUDGES)]
    return {name: training(bench.root / name) for name in [*names, *more]}


def collect(bench: Bench, seeds: tuple[int, ...]) -> dict:
    """All rows, and what they say."""

    def moments_of(name: str):
        with np.load(bench.root / "sets" / f"{name}.npz") as file:
            return metrics.moments(file["features"])

    def mean(names: list[str]) -> dict:
        """Mean over seeds and, where there are several, their standard deviation."""
        rows = [bench.read(f"sets/{name}") for name in names]
        both = {key: [r[key] for r in rows] for key in rows[0]}
        spread = {f"{k}_std": float(np.std(v, ddof=1)) for k, v in both.items() if len(rows) > 1}
        return {key: float(np.mean(v)) for key, v in both.items()} | spread

    models = bench.models(seeds)
    sets = {name: [model.samples(seed) for seed in model.seeds] for name, model in models.items()}
    table = {name: mean(names) for name, names in sets.items()}

    # The theorem on real data: the distance of each model's samples from those of CFG at each gamma
    # (0 is unguided), from other noise where there are several seeds; between CFG's own it is the
    # floor.
    gammas = (0.0, *bench.settings["cfg"])
    pairs = [(a, b) for a in seeds for b in seeds if a != b] or [(seeds[0], seeds[0])]
    moments = {
        name: {seed: moments_of(model.samples(seed)) for seed in model.seeds}
        for name, model in models.items()
    }
    theorem = {
        name: {
            f"{gamma:g}": float(np.mean([
                metrics.frechet_distance(
                    moments[name][a], moments[f"cfg {gamma:g}" if gamma else "base"][b]
                )
                for a, b in pairs if a in moments[name]
            ]))
            for gamma in gammas
        }
        for name in models
    }  # fmt: skip

    rates = bench.read("speed")

    def best(prefix: str) -> str:
        names = (n for n, m in models.items() if n.startswith(prefix) and m.seeds == seeds)
        return min(names, key=lambda n: table[n]["frechet"])

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
    base = bench.root / bench.base(seeds[0])
    probes = ("speed", "step_cost", "calibration", "profile")
    return {
        "config": runs.load(base).config.to_dict(),
        "parameters": training(base)["parameters"],
        "features": "last hidden layer of judge_features; 8-bit rounding; reference: training set",
        "judges": JUDGES,
        "seeds": seeds,
        "summary": summary,
        "floor": bench.row("real_test"),
        "table": table,
        "frechet_to_cfg": theorem,
        "step_cost_relative_to_dsm": bench.read("step_cost"),
        "fine_tuning_share_of_base_steps": bench.config("_mclr").num_steps
        / bench.config().num_steps,
        "calibration": bench.read("calibration"),
        "guidance_by_noise_level": bench.read("profile"),
        "rows": {name: bench.row(name) for names in sets.values() for name in names},
        "other_runs": trainings(bench, seeds),
        "probes_made_by": {name: bench.made_by(name) for name in probes},
    }


def run_all(
    make: Callable[[str, int], Bench], doc: str, known: Iterable[str]
) -> tuple[Bench, tuple[int, ...], dict]:
    """What the command line asks for: the bench, the seeds, and what `tasks.run` returns."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", choices=sorted(known), default="fashion_mnist")
    parser.add_argument("--base_steps", type=int, default=0, help="another base than the config's")
    parser.add_argument("--seeds", default="0,1,2", help="of fine-tuning and sampling")
    add_flags(parser)
    arguments = parser.parse_args()
    seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    bench = make(arguments.data, arguments.base_steps)
    bench.share()
    return bench, seeds, run(bench.root, bench.tasks(seeds), arguments)


def main() -> None:
    bench, seeds, result = run_all(
        Bench, __doc__, (name for name, own in SETTINGS.items() if "cfg" in own)
    )
    result |= collect(bench, seeds)
    mclr_figures.picture(bench, result["summary"], seeds[0])
    mclr_figures.figure(bench, result)
    write_json(RESULTS / f"{bench.name}_mclr.json", result)
    for name, values in result["table"].items():
        print(f"{name:22s}", *(f"{k} {values[k]:.3f}" for k in ("frechet", "accuracy", "recall")))
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
