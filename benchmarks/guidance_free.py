"""MCLR, its rivals and guidance when sampling: one base model, one budget, three seeds.

  python benchmarks/guidance_free.py --data=fashion_mnist
  python benchmarks/guidance_free.py --data=digits

Needs the runs of benchmarks/mclr_images.py with the same --data: the base, its control, MCLR's
fine-tunings, the judges and their samples are those of that script, and every rival is fine-tuned
from the same base for as many steps as MCLR. Writes benchmarks/results/guidance_free_DATA.json and
docs/guidance_free_DATA.png.
"""

import dataclasses
import functools
import statistics

import mclr_figures
import numpy as np
from mclr_images import Bench, Model, done, run_all, trainings
from tasks import RESULTS, Task, training

from mclr_jax import generate, images
from mclr_jax.files import save_arrays, write_json

# Noise levels of every fine-tuning, the control's too: more at sigma 3 to 20 than the configs have.
NOISE = {"noise.mean": 0.8, "noise.std": 1.5}
# gamma = guidance_scale - 1 of the methods that take it when sampling.
GAMMAS = {"fashion_mnist": (0.2, 0.4, 0.6, 1.0), "digits": (0.2, 0.5, 1.0)}
INTERVAL = (0.0, 3.0)  # of noise levels that are guided
# Methods without a strength as an input are fine-tuned once, with these options beside the
# defaults; their strength is the interpolation between the base's weights and the fine-tuned ones.
RIVALS = {
    "cca": {"negative_weight": 1.0},
    "ddo": {},
    "dpo": {},
    "contrastive_flow": {},
    "model_guidance": {"scale": 0.5},
}
INTERPOLATIONS = (0.25, 0.5, 1.0)
# The strength is an input of these networks, drawn from (0, HIGHEST) in training.
HIGHEST = 2.0
NULL = {"objective.name": "mclr_null", "objective.teacher": "average"}
INPUTS = {
    "gft": {"objective.name": "gft"},
    "mclr": {},
    "mclr null, frozen teacher": {"objective.name": "mclr_null"},
    "mclr null": NULL,
    "mclr null and wrong label": NULL
    | {"objective.wrong_label": 0.5, "objective.negative_share": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Comparison(Bench):
    """The Bench with all methods as its models."""

    def methods(self, seeds: tuple[int, ...]) -> dict[str, dict[float, Model]]:
        """Rows by method and strength."""
        gammas, plain = GAMMAS[self.data], {"objective.name": "dsm", **NOISE}
        control = functools.partial(Model, "equal_dsm", seeds=seeds, changes=plain)
        methods = {
            "DSM control": {0.0: control(gamma=0.0)},
            "CFG": {g: control(gamma=g) for g in gammas},
            "CFG in an interval": {g: control(gamma=g, interval=INTERVAL) for g in gammas},
            "autoguidance": {g: control(gamma=g, weak="weak") for g in gammas},
        }
        for name, options in INPUTS.items():
            changes = {**options, "strength": (0.0, HIGHEST), **NOISE}
            workdir = f"equal_{name.replace(',', '').replace(' ', '_')}"
            interval = INTERVAL if name.startswith("mclr") else None  # gft as published
            methods[name] = {
                g: Model(workdir, g, seeds, changes, interval=interval) for g in gammas
            }
        for name, options in RIVALS.items():
            own = {f"objective.{key}": value for key, value in options.items()}
            changes = {"objective.name": name, **own, **NOISE}
            needs = ("generated_{base}.npz",) if name == "ddo" else ()
            methods[name] = {
                place: Model(f"equal_{name}", 0.0, seeds, changes, place, needs=needs)
                for place in INTERPOLATIONS
            }
        return methods

    def models(self, seeds: tuple[int, ...]) -> dict[str, Model]:
        return {
            f"{method} {strength:g}": model
            for method, rows in self.methods(seeds).items()
            for strength, model in rows.items()
        }

    def fine_tuning(self, seed: int, changes: dict | None):
        config = super().fine_tuning(seed, changes)
        if config.objective.name == "ddo":
            generated = self.root / f"generated_{self.base(seed)}.npz"
            config.data.generated = f"npz:{generated}"
        return config

    def train_weak(self) -> None:
        """The weak model of autoguidance: half as wide, and a sixth of the steps."""
        config = self.config()
        config.network.width //= 2
        config.num_steps //= 6
        self.train("weak", self.data, config)

    def generated(self, base: str) -> None:
        """The negatives of ddo: samples of the base."""
        run, params = self.load(base)
        labels = np.resize(np.arange(run.model.null_label), 2 * self.settings["samples"])
        samples = generate.generate(
            run.model, params, labels, run.sampler, seed=1000, batch_size=self.batch
        )
        path = self.root / f"generated_{base}.npz"
        save_arrays(path, images=images.clip(samples), labels=labels)

    def tasks(self, seeds: tuple[int, ...]) -> list[Task]:
        bases = dict.fromkeys(map(self.base, seeds))
        return [
            *(Task(f"generated_{base}", functools.partial(self.generated, base),
                   f"generated_{base}.npz", (done(base),)) for base in bases),
            Task("weak", self.train_weak, done("weak")),
            *super().tasks(seeds),
        ]  # fmt: skip

    def probes(self, models: dict[str, Model], seed: int) -> list[Task]:
        methods = self.methods((seed,))
        first = {name: next(iter(rows.values())) for name, rows in methods.items()}
        tuned = {m.workdir(seed): m.changes for m in first.values() if m.changes}
        sampled = [done(m.workdir(seed)) for m in first.values()]
        needs = (done("classifier"), done("weak"), f"generated_{self.base(seed)}.npz")
        return [
            self.probe("speed", (*sampled, *needs), first, seed, output="guidance_free_speed"),
            self.probe("step_cost", needs, tuned, seed, output="guidance_free_cost"),
        ]


def collect(bench: Comparison, seeds: tuple[int, ...]) -> dict:
    probes = ("guidance_free_speed", "guidance_free_cost")
    speed, cost = map(bench.read, probes)
    methods = {}
    for method, rows in bench.methods(seeds).items():
        methods[method] = []
        first = next(iter(rows.values()))
        for strength, model in rows.items():
            for seed in seeds:
                row = bench.row(model.samples(seed))
                methods[method].append({
                    "strength": strength,
                    "seed": seed,
                    **row,
                    "samples_per_second": speed[method],
                    "training_steps": row["run"]["steps"],
                    "step_cost_relative_to_dsm": cost[first.workdir(seeds[0])]
                    if model.changes else 1.0,
                })  # fmt: skip
    return {
        "parameters": training(bench.root / bench.base(seeds[0]))["parameters"],
        "floor": bench.row("real_test"),
        "interval": INTERVAL,
        "options": RIVALS,
        "methods": methods,
        "other_runs": trainings(bench, seeds, "weak"),
        "probes_made_by": {name: bench.made_by(name) for name in probes},
    }


def mean(rows: list[dict], key: str) -> tuple[float, float]:
    """Mean over seeds and standard deviation."""
    values = [row[key] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    bench, seeds, result = run_all(Comparison, __doc__)
    result |= collect(bench, seeds)
    write_json(RESULTS / f"guidance_free_{bench.data}.json", result)
    mclr_figures.pareto(bench, result)
    for method, rows in result["methods"].items():
        for strength in dict.fromkeys(row["strength"] for row in rows):
            own = [row for row in rows if row["strength"] == strength]
            keys = ("frechet", "accuracy", "precision", "recall")
            print(f"{method:24s} {strength:7g}", *("{} {:.3f} +- {:.3f}".format(k, *mean(own, k))
                                                 for k in keys))  # fmt: skip


if __name__ == "__main__":
    main()
