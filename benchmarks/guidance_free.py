"""MCLR, its rivals and guidance when sampling: one base model, one budget, three seeds.

  python benchmarks/guidance_free.py --data=fashion_mnist
  python benchmarks/guidance_free.py --data=digits
  python benchmarks/guidance_free.py --data=two_digits
  python benchmarks/guidance_free.py --data=fashion_mnist --base_steps=40000

Every method is fine-tuned from the base for as many steps and at the same noise levels, the
control that is guided when sampling, too; image_bench.py has the base and the judges. Writes
benchmarks/results/guidance_free_DATA.json and the figure docs/equal_noise_DATA.png; --collect
writes the rows that are there, without making others. The second judge of the samples needs
pip install -e '.[features]'.
"""

import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import figures
from image_bench import JUDGED_BY, SECOND, Bench, Model
from tables import RATE
from tasks import RESULTS, ROOT, SEEDS, Task, done, parsed, run

from mclr_jax import images, plan
from mclr_jax.config import Training
from mclr_jax.experiment import Experiment
from mclr_jax.files import save_arrays, write_json

# Noise levels of every fine-tuning, the control's too: more at sigma 3 to 20 than the configs have.
NOISE = {"noise.mean": 0.8, "noise.std": 1.5}
# gamma = guidance_scale - 1 of the methods that take it when sampling.
GAMMAS = {"fashion_mnist": (0.2, 0.4, 0.6, 1.0), "digits": (0.2, 0.5, 1.0),
          "two_digits": (0.2, 0.5, 1.0)}  # fmt: skip
INTERVAL = (0.0, 3.0)  # of noise levels that are guided
INTERPOLATIONS = (0.25, 0.5, 0.75, 1.0, 1.25)
HIGHEST = 1.0  # strengths as an input are drawn from (0, HIGHEST) in training
NULL = {"objective.name": "mclr_null", "objective.teacher": "average"}
WRONG = {"objective.wrong_label": 0.5, "objective.negative_share": 0.5}
GUIDED = {"objective.sigma_interval": INTERVAL}
# The strength is an input of these networks.
INPUTS = {
    "gft": {"objective.name": "gft"},
    "mclr": {},
    "mclr null": NULL,
    "mclr null, frozen teacher": {"objective.name": "mclr_null"},
    "mclr null and wrong label": NULL | WRONG,
}
# These are fine-tuned once, with these options beside the defaults; their strength is the
# interpolation between the base's weights and the fine-tuned ones.
ONCE = {
    "cca": {"objective.name": "cca", "objective.negative_weight": 1.0},
    "ddo": {"objective.name": "ddo"},
    "dpo": {"objective.name": "dpo"},
    "contrastive_flow": {"objective.name": "contrastive_flow"},
    "model_guidance": {"objective.name": "model_guidance", "objective.scale": 0.5},
    "mclr null, beta 1": NULL | GUIDED,
    "mclr null and wrong label, beta 0.5": NULL | GUIDED | WRONG | {"objective.beta": 0.5},
    "mclr weak, beta 0.5": NULL | {"objective.wrong": "weak", "objective.beta": 0.5},
}
NEEDS = {"ddo": ("generated_{base}.npz",), "mclr weak, beta 0.5": ("weak/done.json",)}
# These are fine-tuned a second time, with the strengths by class that launch.calibrate finds
# between the base's weights and those of the first time (seed 0).
BY_CLASS = ("cca", "model_guidance", "mclr null, beta 1", "mclr null and wrong label, beta 0.5")
# These are fine-tuned at other learning rates than the config's, too, by the factors: upwards,
# since model guidance and the null contrast gained by twice the rate.
SEARCHED = ("dsm", *BY_CLASS)
LEARNING_RATES = (2.0, 4.0)
FLOPS = "guidance_free_flops"  # file of the cost of steps
IDENTITY = ("strength", "seed", "noise")  # what tells a row from the others of its method


def place_of(method: str) -> str:
    """Work directory of a method, without the seed."""
    return "equal_" + method.replace(",", "").replace(" ", "_")


def strengths_of(method: str) -> str:
    """File of a method's strengths by class."""
    return f"strengths_{place_of(method)}.json"


@dataclasses.dataclass(frozen=True)
class Comparison(Bench):
    """The Bench with all methods as its models."""

    def methods(self) -> dict[str, dict[float, Model]]:
        """Rows by method and strength."""
        plain, rate = {"objective.name": "dsm"}, self.config("_mclr").optimizer.learning_rate

        def model(method: str, gamma: float, changes: Mapping[str, Any], **more: Any) -> Model:
            return Model(place_of(method), gamma, {**changes, **NOISE}, **more)

        def guided(method: str, changes: Mapping[str, Any], **more: Any) -> dict[float, Model]:
            return {g: model(method, g, changes, **more) for g in GAMMAS[self.data]}

        def moved(method: str, changes: Mapping[str, Any], **more: Any) -> dict[float, Model]:
            return {p: model(method, 0.0, changes, interpolation=p, **more) for p in INTERPOLATIONS}

        methods = {
            "DSM control": {0.0: model("dsm", 0.0, plain)},
            "CFG": guided("dsm", plain),
            "CFG in an interval": guided("dsm", plain, interval=INTERVAL),
            "autoguidance": guided("dsm", plain, weak="weak"),
        }
        for name, options in INPUTS.items():
            interval = INTERVAL if name.startswith("mclr") else None  # gft as published
            changes = {**options, "strength": (0.0, HIGHEST)}
            methods[name] = guided(name, changes, interval=interval)
        for name, options in ONCE.items():
            methods[name] = moved(name, options, needs=NEEDS.get(name, ()))
        for name in BY_CLASS:
            method, file = f"{name} by class", strengths_of(name)
            changes = {**ONCE[name], "class_strengths": file}
            methods[method] = {1.0: model(method, 0.0, changes, needs=(file,))}
        for name, factor in itertools.product(SEARCHED, LEARNING_RATES):
            more, faster = f"{RATE}{factor:g}", {"optimizer.learning_rate": factor * rate}
            if name == "dsm":
                control = guided(f"{name}{more}", plain | faster, interval=INTERVAL)
                methods[f"CFG in an interval{more}"] = control
            else:
                methods[f"{name}{more}"] = moved(f"{name}{more}", ONCE[name] | faster)
        return methods

    def models(self) -> dict[str, Model]:
        return {f"{method} {strength:g}": model for method, rows in self.methods().items()
                for strength, model in rows.items()}  # fmt: skip

    def fine_tuning(self, seed: int, changes: Mapping[str, Any]) -> Any:
        if "class_strengths" in changes:
            found = json.loads((self.root / changes["class_strengths"]).read_text())
            changes = {**changes, "class_strengths": tuple(found["class_strengths"])}
        config = super().fine_tuning(seed, changes)
        if config.objective.get("wrong") == "weak":
            config.companions.weak = str(self.root / "weak")
        if config.objective.name == "ddo":
            generated = self.root / f"generated_{self.base(seed)}.npz"
            config.data.generated = f"npz:{generated}"
        return config

    def train_weak(self) -> None:
        """The weak model of autoguidance: half as wide, and a sixth of the base's steps."""
        config = self.config()
        config.network.width //= 2
        config.num_steps = (self.base_steps or config.num_steps) // 6
        self.train("weak", self.configs, config)

    def calibrate(self, method: str) -> None:
        """Strengths by class of a method, at which it is as recognisable as held-out images."""
        run, out = f"{place_of(method)}_0", strengths_of(method)
        paths = {"workdir": run, "classifier": "classifier", "out": out}
        subprocess.run(
            [sys.executable, "-m", "launch.calibrate", "--interpolation", "--grid=4",
             "--samples_per_class=100", f"--batch_size={self.batch}",
             *(f"--{flag}={self.root / path}" for flag, path in paths.items())],
            cwd=ROOT, check=True,
        )  # fmt: skip

    def generated(self, base: str) -> None:
        """The negatives of ddo: samples of the base."""
        _, samples, labels, _ = self.drawn(base, 2 * self.settings["samples"], seed=1000)
        path = self.root / f"generated_{base}.npz"
        save_arrays(path, images=images.clip(samples), labels=labels)

    def tasks(self, seeds: tuple[int, ...]) -> list[Task]:
        do, bases, judge = functools.partial, self.bases(seeds), done("classifier")
        return [
            *(Task(f"generated_{base}", do(self.generated, base), f"generated_{base}.npz",
                   (done(base),)) for base in bases),
            Task("weak", self.train_weak, done("weak")),
            *(Task(file := strengths_of(name), do(self.calibrate, name), file,
                   (done(f"{place_of(name)}_0"), judge)) for name in BY_CLASS),
            *(tasks := super().tasks(seeds)),
            *self.second_tasks(task.output for task in tasks),
            Task("flops", do(self.flops, seeds[0]), f"{FLOPS}.json", (judge, done(bases[0]))),
        ]  # fmt: skip

    def flops(self, seed: int) -> None:
        """FLOPs of a step of each method over DSM's; strengths by class cost nothing."""
        first = [next(iter(r.values())) for name, r in self.methods().items() if RATE not in name]
        flops = {}
        for model in first:
            changes = {k: v for k, v in model.changes.items() if k != "class_strengths"}
            each = Experiment(Training.parse(self.fine_tuning(seed, changes)), self.root)
            flops[model.tuned] = plan.step_flops(each.task, each.training.batch_size)
        self.write(FLOPS, {k: value / flops["equal_dsm"] for k, value in flops.items()})


def collect(bench: Comparison, seeds: tuple[int, ...], before: dict) -> dict:
    """The rows that are there, beside those of `before` with other noise levels or seeds.

    The floor of `before` must be this one's: its rows have the same judges then.
    """
    flops = bench.read(FLOPS) if bench.there(FLOPS) else {}
    floor, methods = bench.row("real_test"), before.get("methods", {})
    if before and not math.isclose(floor["frechet"], before["floor"]["frechet"], rel_tol=1e-3):
        raise SystemExit("The judges are not those of the stored rows: move that file away.")
    for method, rows in bench.methods().items():
        found = [
            {"strength": strength, "seed": seed, "noise": [*NOISE.values()],
             **bench.row(model.samples(seed)),
             "step_flops_relative_to_dsm": flops.get(model.tuned)}
            for strength, model in rows.items() for seed in seeds
            if bench.there(f"sets/{model.samples(seed)}")
        ]  # fmt: skip
        for row in found:
            row["training_steps"] = row["run"]["steps"]
        made = [[row[key] for key in IDENTITY] for row in found]
        kept = [row for row in methods.get(method, []) if [row[k] for k in IDENTITY] not in made]
        if kept or found:
            methods[method] = kept + found
    weak = ["weak"] * bench.there("weak/done")
    others = bench.trainings([*bench.bases(seeds), "classifier", *JUDGED_BY, *weak])
    return {"parameters": others[bench.base(seeds[0])]["parameters"], "floor": floor,
            "interval": INTERVAL, "options": INPUTS | ONCE, "methods": methods,
            "other_runs": others}  # fmt: skip


def main() -> None:
    flags = parsed(__doc__, data=("fashion_mnist", "what is trained on", sorted(GAMMAS)),
                   base_steps=(0, "another base than the config's"), **SEEDS)  # fmt: skip
    bench = Comparison(flags.data, flags.base_steps)
    bench.share()
    result = run(bench.root, bench.tasks(flags.seeds), flags)
    path = RESULTS / f"guidance_free_{bench.name}.json"
    result |= collect(bench, flags.seeds, json.loads(path.read_text()) if path.exists() else {})
    write_json(path, result)
    equal = {method: [row for row in rows if row["noise"] == [*NOISE.values()]]
             for method, rows in result["methods"].items()}  # fmt: skip
    figures.pareto(bench, result | {"methods": equal}, SECOND)


if __name__ == "__main__":
    main()
