"""The theorem with trained networks: how far from exact CFG each objective ends on a 2-D mixture.

  python benchmarks/mixture_mclr.py

Trains configs/mixture.py, fine-tunes it by every variant of MCLR (configs/mixture_mclr.py, beta 1)
and measures weight(sigma) |D - D_cfg|^2, summed over dimensions and averaged over the data and the
noise levels of training. Every training is a process of its own on one core, as many at a time as
--jobs, under runs/mixture_bench: the same command continues. Writes
benchmarks/results/mixture_mclr.json. Needs the package installed.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
from tasks import RESULTS, ROOT, TASKS, Files, Task, config_of, done, parsed, run, training

from mclr_jax import guidance, mixture, noise, runs
from mclr_jax.denoiser import natural_weight
from mclr_jax.files import write_json
from mclr_jax.types import Condition

PLAIN = {"objective.negatives": "prior"}
VARIANTS: dict[str, dict] = {
    "mclr": {},
    "prior negatives, weighted": {"objective.negatives": "prior", "objective.weighting": "cfg"},
    "mismatched negatives, weighted": {"objective.negatives": "mismatched",
                                       "objective.weighting": "cfg"},
    "half of the negatives": {"objective.negative_share": 0.5},
    "a quarter of the negatives": {"objective.negative_share": 0.25},
    "the reference as the target": {"objective.target": "reference"},
    "posterior from a classifier": {"posterior.name": "classifier"},
    "strength as an input": {"strength": (0.0, 2.0)},
    "plain": PLAIN,
    "plain, beta 0.2": PLAIN | {"objective.beta": 0.2},
    "plain, clip": PLAIN | {"objective.bound": "clip"},
}  # fmt: skip
CLASSIFIER = {
    "objective.name": "classify", "network.name": "mlp_classifier", "network.width": 128,
    "network.depth": 4, "network.dropout": 0.0, "num_steps": 6000, "sample_every": 0,
}  # fmt: skip
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class Bench(Files):
    """Where everything is, and how each part is made."""

    root: pathlib.Path = ROOT / "runs" / "mixture_bench"

    def workdir(self, name: str) -> str:
        return name.replace(" ", "_").replace(",", "")

    def task(self, name: str, file: str, changes: dict, *needs: str) -> Task:
        """A training, which may diverge: some variants are here to show that."""
        workdir = self.workdir(name)
        train = functools.partial(self.train, workdir, file, config_of(file, changes), True)
        return Task(workdir, train, done(workdir), tuple(map(done, needs)))

    def tasks(self) -> list[Task]:
        tasks = [self.task("base", "mixture", {}), self.task("classifier", "mixture", CLASSIFIER)]
        own = {"init_from": str(self.root / "base"), "sample_every": 0,
               "companions.classifier": str(self.root / "classifier")}  # fmt: skip
        for name, changes in VARIANTS.items():
            judge = ("classifier",) * (changes.get("posterior.name") == "classifier")
            tasks.append(self.task(name, "mixture_mclr", own | changes, "base", *judge))
        return tasks

    def distance(
        self, name: str, beta: float, strength: float = 0.0, interpolation: float = 1.0,
        draws: int = 400_000,
    ) -> float:  # fmt: skip
        """E weight(sigma) |D(x, sigma, c) - D_cfg(x, sigma, c)|^2 of a run's averaged weights.

        CFG is exact, of guidance_scale 1 + beta. The run is "base" or one of VARIANTS, its weights
        at this place on the line from the base's; a network that takes a strength is told it.
        """
        found = runs.load(self.root / self.workdir(name))
        model, (params, _) = found.model, found.weights(interpolation=interpolation)
        oracle = mixture.toy()
        x0, label = oracle.sample(jax.random.key(5), draws)
        levels = noise.LogNormal(mean=-0.4, std=1.2)
        sigma = jax.vmap(levels.sample)(jax.random.split(jax.random.key(6), draws))
        x = x0 + sigma[:, None] * jax.random.normal(jax.random.key(7), x0.shape)
        target = guidance.classifier_free(oracle.denoise, 3, 1 + beta)(x, sigma, label)
        condition = Condition(label, strength=jnp.full(draws, strength))
        square = jnp.sum((jax.jit(model.denoise(params))(x, sigma, condition) - target) ** 2, -1)
        return float((natural_weight(model.preconditioning, sigma) * square).mean())


def collect(bench: Bench) -> dict:
    """All distances, and how each run was trained."""
    names = ("base", "classifier", *VARIANTS)
    trained = {name: training(bench.root / bench.workdir(name)) for name in names}
    table: dict = {"base": bench.distance("base", 1.0)}
    for name, changes in VARIANTS.items():
        if "diverged" in trained[name]:
            table[name] = trained[name]["diverged"]
        elif "strength" not in changes:
            table[name] = bench.distance(name, 1.0)
    strengths = {
        f"{beta:g}": {
            "base": bench.distance("base", beta),
            "input": bench.distance("strength as an input", beta, strength=beta),
            "share": bench.distance("mclr", beta, interpolation=beta),
        } for beta in STRENGTHS
    }  # fmt: skip
    return {"config": "configs/mixture_mclr.py", "parameters": trained["base"]["parameters"],
            "distance_to_cfg": table, "base_to_exact_unguided": bench.distance("base", 0.0),
            "by_strength": strengths, "runs": trained}  # fmt: skip


def main() -> None:
    bench = Bench()
    result = run(bench.root, bench.tasks(), parsed(__doc__, **TASKS)) | collect(bench)
    write_json(RESULTS / "mixture_mclr.json", result)
    print(json.dumps(result["distance_to_cfg"] | result["by_strength"], indent=1))


if __name__ == "__main__":
    main()
