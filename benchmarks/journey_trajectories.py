"""Trajectories of one's own, from a file to an analysis, beside a particle filter.

  python benchmarks/journey_trajectories.py --folder=DIR

A user has simulated or measured predators and prey: mine.npy, (200, 500, 2). Of other trajectories
the prey is observed with noise in every 4th frame, and the predators never: seen.npz. COMMANDS are
all that the user types. The judge is a bootstrap particle filter that knows the equations and the
noise, as the trained model does not. Outputs in DIR are kept; what the commands print goes to
benchmarks/results/journey_trajectories.txt, and the errors to journey_trajectories.json.
"""

import pathlib
import shlex
import subprocess
import sys
import time

import numpy as np
from tasks import RESULTS, parsed

from mclr_jax.assimilation import scores
from mclr_jax.files import provenance, write_json

COMMANDS = """
mclr train trajectories --config.data.name=npy:mine.npy --workdir=run
mclr assimilate --workdir=run --observations=seen.npz --out=filter.npz
mclr assimilate --workdir=run --observations=seen.npz --regime=batch --out=batch.npz --figure
"""
STD, EVERY, FRAMES, PARTICLES = 0.1, 4, 64, 20_000


def advanced(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The next frame of log prey and log predators (..., 2): Rosenzweig and MacArthur's equations.

    4 Euler-Maruyama steps, with multiplicative noise.
    """
    for _ in range(4):
        prey, predators = np.exp(np.moveaxis(x, -1, 0))
        eaten = 1 / (0.35 + prey)
        drift = [1 - prey / 1.6 - predators * eaten, 0.9 * prey * eaten - 0.45]
        x = x + np.stack(drift, -1) / 8 + 0.15 * np.sqrt(1 / 8) * rng.normal(size=x.shape)
    return x


def simulated(count: int, frames: int, seed: int) -> np.ndarray:
    """Prey and predators (count, frames, 2), after 200 frames."""
    rng = np.random.default_rng(seed)
    states = [np.log(0.5) + 0.3 * rng.normal(size=(count, 2))]
    for _ in range(200 + frames):
        states.append(advanced(states[-1], rng))
    return np.exp(np.stack(states[-frames:], 1)).astype(np.float32)


def particles(values: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means (T, 2) of filter and smoother for values (T,) of the prey, from states (P, 2).

    A bootstrap filter, and the genealogy of its last particles.
    """
    rng, x, means = np.random.default_rng(0), np.log(start), []
    paths = np.empty((len(x), len(values), 2), np.float32)
    for k, value in enumerate(values):
        x = paths[:, k] = advanced(x, rng) if k else x
        weights = np.ones(len(x))
        if np.isfinite(value):
            misfit = (value - np.exp(x[:, 0])) ** 2
            weights = np.exp((misfit.min() - misfit) / (2 * STD**2))
        weights /= weights.sum()
        means.append(weights @ np.exp(x))
        places = (np.arange(len(x)) + rng.uniform()) / len(x)
        chosen = np.minimum(np.searchsorted(weights.cumsum(), places), len(x) - 1)
        x, paths[:, : k + 1] = x[chosen], paths[chosen, : k + 1]
    return np.stack(means), np.exp(paths).mean(0)


def main() -> None:
    folder = parsed(__doc__, folder=(pathlib.Path, "that the commands run in")).folder
    folder.mkdir(parents=True, exist_ok=True)
    truth = simulated(32, FRAMES, seed=1)
    if not (folder / "mine.npy").exists():
        np.save(folder / "mine.npy", simulated(200, 500, seed=0))
        values = truth[..., :1] + STD * np.random.default_rng(2).normal(size=(32, FRAMES, 1))
        values[:, np.arange(FRAMES) % EVERY > 0] = np.nan
        np.savez(folder / "seen.npz", values=values, std=STD, H=[[1.0, 0.0]], truth=truth)
    log, seconds = [], []
    for line in COMMANDS.strip().splitlines():
        start, words = time.time(), shlex.split(line)
        words[0] = str(pathlib.Path(sys.executable).with_name("mclr"))
        done = subprocess.run(words, cwd=folder, text=True, stdout=-1, stderr=-2)
        kept = [text for text in done.stdout.splitlines() if not text.endswith("left)")]  # progress
        log.append("\n".join([f"$ {line}", *kept, ""]))
        seconds.append(round(time.time() - start))
        if done.returncode:
            raise SystemExit(log[-1])
    with np.load(folder / "seen.npz") as file:
        values = file["values"][..., 0]
    # its first particles are frames of the user's trajectories, as drawn from the same law
    frames = np.load(folder / "mine.npy").reshape(-1, 2)
    first = frames[np.random.default_rng(3).permutation(len(frames))[:PARTICLES]]
    means = map(np.stack, zip(*(particles(row, first) for row in values), strict=True))
    scale = frames.std(0)
    found = dict(zip(("particle filter", "particle smoother"), means, strict=True))
    members = {name: np.load(folder / f"{name}.npz")["members"] for name in ("filter", "batch")}
    rows = {name: scores.summary(x, truth, scale.tolist()) for name, x in members.items()}
    found |= {name: x.mean(1) for name, x in members.items()}
    rmse = {name: np.sqrt(((x - truth) ** 2).mean((0, 1))) for name, x in found.items()}
    rmse["standard deviation of the data"] = scale
    lines = [f"{name:30s} prey {a:.3f}  predators {b:.3f}" for name, (a, b) in rmse.items()]
    text = "\n".join([*log, "RMSE of the mean over 32 trajectories of 64 frames:", *lines, ""])
    (RESULTS / "journey_trajectories.txt").write_text(text)
    write_json(RESULTS / "journey_trajectories.json", {
        "commands": len(seconds), "seconds": seconds, "particles": PARTICLES,
        "rmse": {name: dict(zip(("prey", "predators"), map(float, pair), strict=True))
                 for name, pair in rmse.items()},
        "scores": rows, **provenance(),
    })  # fmt: skip
    print("\n".join(lines))


if __name__ == "__main__":
    main()
