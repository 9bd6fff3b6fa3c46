"""A model that this project did not train: in, MCLR on top, and out again.

  pip install -e '.[torch,published,features]'
  python benchmarks/outside.py

torch_dit.py trains a DiT of diffusers' own classes and samples it. launch.convert reads its folder,
`mclr_null` fine-tunes the run, and launch.convert writes a folder again, which diffusers' pipeline
samples without guidance. Strengths are chosen with one seed, and compared with three others. Writes
benchmarks/results/outside.json; --collect writes the rows that are there, without making others.
--torch is the Python that has torch and diffusers, if that is another.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from image_bench import JUDGED_BY, REFERENCE, SETTINGS, Bench, once
from tasks import RESULTS, ROOT, SEEDS, Task, config_of, done, parsed, run

from mclr_jax import generate, images, pretrained, samplers
from mclr_jax.data import sources
from mclr_jax.files import save_arrays, write_json

VALIDATION, COUNTS, COUNT = 100, {100: 1000}, 2000  # the seed; samples of it, and of others
INTERVAL = (0.0, 3.0)  # of noise levels that are guided, and where MCLR has a contrast
# Strengths to choose from: guidance scales at all levels and in the interval, and of MCLR the place
# between the base's weights (0) and those that were fine-tuned with beta 1.5.
GRIDS = {"scale": (1.0, 1.2, 1.4, 1.6, 2.0), "interval": (1.4, 1.7, 2.0, 2.5, 3.0, 4.0),
         "interpolation": (0.5, 0.75, 1.0, 1.25, 1.5)}  # fmt: skip
TUNING = {
    "data.name": "fashion_mnist", "data.flip": False, "num_steps": 600, "batch_size": 64,
    "noise.mean": 0.8, "noise.std": 1.5, "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 50, "optimizer.schedule": "cosine", "ema.halflife_steps": 60.0,
    "log_every": 100, "checkpoint_every": 200, "steps_per_dispatch": 10, "sample_every": 0,
}  # fmt: skip
MCLR = {"objective.beta": 1.5, "objective.sigma_interval": INTERVAL}
BASE = "base/run.json"  # PyTorch's base, read
# The rows: what samples, and where its strength was chosen; "" for none.
METHODS = {
    "base": "",
    "base, CFG": "scale",
    "base, CFG in an interval": "interval",
    "MCLR": "interpolation",
    "MCLR, as fine-tuned": "",
}


@dataclasses.dataclass(frozen=True)
class Outside(Bench):
    """The Bench whose base comes from PyTorch."""

    data: str = "fashion_mnist"
    torch: str = sys.executable

    root = ROOT / "runs" / "outside"  # type: ignore[assignment]
    settings = SETTINGS["fashion_mnist"] | {"samples": COUNT}  # type: ignore[assignment]

    def in_torch(self, do: str, **options: Any) -> dict:
        """What a function of torch_dit.py gives."""
        script = ROOT / "benchmarks" / "torch_dit.py"
        command = [self.torch, str(script), json.dumps({"do": do, **options})]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(made.splitlines()[-1])

    def train_base(self, seed: int = 0) -> None:
        """The folder of diffusers, trained in PyTorch."""
        source = sources.load(self.source, "train")
        pixels, labels = source[np.arange(len(source))]
        save_arrays(self.root / "train.npz", images=pixels[..., 0], labels=labels)
        folder = self.root / "diffusers"
        made = self.in_torch("train", images=str(self.root / "train.npz"), out=str(folder))
        self.write("diffusers/done", made)

    def take(self) -> None:
        shutil.rmtree(self.root / "base", ignore_errors=True)
        pretrained.convert(self.root / "diffusers", self.root / "base")

    def parity(self) -> None:
        """Largest differences of samples from the same noise: the base here and in PyTorch.

        And in PyTorch that of the folder that was read, and of the one written.
        """
        folders = {"read": self.root / "diffusers", "written": self.back("base")}
        paths = {name: self.root / f"parity_{name}.npz" for name in folders}
        for name, path in paths.items():
            folder = str(folders[name])
            made = self.in_torch("sample", folder=folder, out=str(path), count=100, seed=7)
        with np.load(paths["read"]) as file:
            original = file["images"][..., None]
        with np.load(paths["written"]) as file:
            noise, theirs, labels = (file[k][..., None] for k in ("noise", "images", "labels"))
        found, params = self.load("base")
        sigmas = found.sampler.grid(found.model.preconditioning)
        # At the first level, x / sqrt(alpha) is noise / sqrt(alpha).
        x = jnp.asarray(noise * np.sqrt(1 + sigmas[0] ** 2), jnp.float32)
        denoise = found.model.denoise(params)
        ours = samplers.sample(denoise, x, labels[:, 0], sigmas, "euler")
        errors = {"here": images.clip(np.asarray(ours)), "original": original}
        largest = {name: float(np.abs(x - theirs).max()) for name, x in errors.items()}
        self.write("parity", {**made, "largest_difference": largest})

    def mclr(self, seed: int) -> None:
        own = {"init_from": str(self.root / "base"), "seed": seed + 1}
        self.train(f"mclr_{seed}", "finetune", config_of("finetune", own | TUNING | MCLR))

    def back(self, name: str, place: float = 1.0) -> pathlib.Path:
        """The folder of diffusers of a run; of its weights at a place."""
        folder = self.root / f"{name}_at_{place:g}_diffusers"
        shutil.rmtree(folder, ignore_errors=True)
        found, params = self.load(name, place)
        pretrained.export(found, params, folder)
        return folder

    def draw(self, method: str, seed: int, strength: float | None) -> None:
        """Samples of a method, judged; None: the strength that was chosen."""
        kind, count, name = METHODS[method], COUNTS.get(seed, COUNT), named(method, seed, strength)
        if strength is None and kind:
            strength = self.read(f"chosen_{kind}")["best"]
        labels, tuned = np.arange(count) % 10, f"mclr_{seed}" if "MCLR" in method else ""
        if kind == "interval":
            guided = generate.Guidance(strength, interval=INTERVAL)
            _, samples, _, calls = self.drawn("base", count, seed, guided)
            made = {"samples": count, "scale": strength, **calls}
        else:
            path = self.root / f"{name}.npz"
            options = {"count": count, "seed": seed, "scale": strength if kind == "scale" else 1.0}
            folder = self.back(tuned, strength or 1.0) if tuned else self.root / "diffusers"
            made = self.in_torch("sample", folder=str(folder), out=str(path), **options)
            with np.load(path) as file:
                samples = file["images"][..., None]
            path.unlink()
        row = {"method": method, "seed": seed, "strength": strength, **made}
        workdir = self.root / tuned if tuned else None
        self.store(name, images.as_8_bits(samples), labels, row, workdir)

    def store(
        self, name: str, pixels: Any, labels: Any, more: dict, workdir: pathlib.Path | None = None
    ) -> None:
        """As the Bench does, with the accuracy by the judge of features, too."""
        found = self.judged("features", pixels, labels).log_probs.argmax(1)
        accuracy = {"accuracy_by_features": float((found == labels).mean())}
        super().store(name, pixels, labels, accuracy | more, workdir)

    def choose(self, method: str) -> None:
        """The strength of a method with the lowest FD of the validation seed."""
        kind = METHODS[method]
        sets = {s: named(method, VALIDATION, s) for s in GRIDS[kind]}
        distances = {s: self.read(f"sets/{name}")["frechet"] for s, name in sets.items()}
        best = min(distances, key=distances.__getitem__)
        inside = min(distances) < best < max(distances)
        self.write(f"chosen_{kind}", {"best": best, "inside": inside, "frechet": distances})

    def tasks(self, seeds: tuple[int, ...]) -> list[Task]:
        tasks = [
            Task("diffusers", self.train_base, done("diffusers")),
            *self.judging(),
            Task("base", self.take, BASE, (done("diffusers"),)),
            Task("parity", self.parity, "parity.json", (BASE,)),
        ]
        for method, kind in METHODS.items():
            tried = [t for s in GRIDS.get(kind, ()) for t in self.of_set(method, VALIDATION, s)]
            tasks += tried
            if kind:
                choose, needs = functools.partial(self.choose, method), (t.output for t in tried)
                tasks.append(Task(f"chosen_{kind}", choose, f"chosen_{kind}.json", (*needs,)))
            tasks += [task for seed in seeds for task in self.of_set(method, seed, None)]
        tasks += self.second_tasks(t.output for t in tasks if "_at_" not in t.output)
        return once(tasks)  # a fine-tuning has several places

    def of_set(self, method: str, seed: int, strength: float | None) -> list[Task]:
        """The tasks for a set of samples."""
        name, tuned, kind = named(method, seed, strength), f"mclr_{seed}", METHODS[method]
        start = done(tuned) if "MCLR" in method else done("diffusers")
        needs = [BASE if kind == "interval" else start, REFERENCE]
        needs += [f"chosen_{kind}.json"] if kind and strength is None else []
        draw = functools.partial(self.draw, method, seed, strength)
        sets = [Task(f"set_{name}", draw, f"sets/{name}.json", tuple(needs))]
        tune = Task(tuned, functools.partial(self.mclr, seed), done(tuned), (BASE,))
        return [tune, *sets] if "MCLR" in method else sets


def named(method: str, seed: int, strength: float | None) -> str:
    """Name of a set of samples, or of a run."""
    place = method.lower().replace(",", "").replace(" ", "_")
    return f"{place}_{seed}" + (f"_at_{strength:g}" if strength else "")


def collect(bench: Outside, seeds: tuple[int, ...]) -> dict[str, Any]:
    """The rows that are there."""
    of_seeds: dict[str, list] = {"validation": [], "rows": []}
    for method, kind in METHODS.items():
        grid = [(VALIDATION, s) for s in GRIDS[kind]] if kind else []
        for seed, strength in [*grid, *((seed, None) for seed in seeds)]:
            if bench.there(f"sets/{(name := named(method, seed, strength))}"):
                of_seeds["validation" if strength else "rows"].append(bench.row(name))
    names = ("diffusers/done", "parity", *(f"chosen_{kind}" for kind in GRIDS))
    single = {name.removesuffix("/done"): bench.read(name) | bench.made_by(name)
              for name in filter(bench.there, names)}  # fmt: skip
    return {"floor": bench.row("real_test"), "interval": INTERVAL, **single, **of_seeds,
            "other_runs": bench.trainings(JUDGED_BY)}  # fmt: skip


def main() -> None:
    torch = (sys.executable, "Python with torch and diffusers")
    flags = parsed(__doc__, torch=torch, **SEEDS)
    bench = Outside(torch=flags.torch)
    result = run(bench.root, bench.tasks(flags.seeds), flags)
    write_json(RESULTS / "outside.json", result | collect(bench, flags.seeds))


if __name__ == "__main__":
    main()
