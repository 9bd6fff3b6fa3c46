"""Where a model of trajectories may be worth its price: Lorenz-96, beside an emulator's smoother.

  python -m launch.train --config=configs/lorenz96_forcing.py --workdir=DIR/trajectory
  python -m launch.train --config=configs/lorenz96_emulator.py --workdir=DIR/emulator
  python benchmarks/niche.py --folder=DIR --cases abs sparse

--config.num_steps was 20,000 and 6,000. Settings of both methods are chosen by the CRPS on
validation trajectories, those of an emulator with the equations in its place where these are known.
The same trainings with --config.data.system=niche:Half, of the emulator with
--config.network.variance=True, in DIR/half_trajectory and DIR/half_emulator, and the emulator also
of niche:Past in DIR/half_past, are for the case `partial`; benchmarks/ is then in PYTHONPATH.
Writes benchmarks/results/niche.json; rows that are there are kept.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import Rows
from trajectory_rows import Subject

from mclr_jax.assimilation import ensemble, methods, observe, scores
from mclr_jax.assimilation.dynamics import Lorenz96
from mclr_jax.assimilation.schedules import Scheme
from mclr_jax.schema import key

FRAMES, TUNED_ON = 100, {"trajectory": 4, "enkf": 8}


@dataclasses.dataclass(frozen=True)
class Smoother(ensemble.Settings):
    """Settings of the filter, and its lag."""

    lag: float = key(8.0, 0.0, math.inf, says="of all frames")


STARTS: dict[str, Any] = {"trajectory": Scheme(c=0.5), "enkf": Smoother(radius=4.0)}
GRIDS: dict[str, dict[str, tuple]] = {
    "trajectory": {"c": (0.25, 0.5, 1.0, 2.0), "window": (0, 32)},
    "enkf": {"radius": (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0),
             "inflation": (1.0, 1.01, 1.02, 1.05, 1.1, 1.2), "relaxation": (0.0, 0.2, 0.4, 0.6),
             "lag": (8.0, 24.0, 1000.0)},
}  # fmt: skip


class Half(Lorenz96):
    """Lorenz-96, of which every second coordinate is recorded."""

    shape = (20,)
    offset, scale = (2.34,) * 20, (3.64,) * 20

    def spin_up(self, key: jax.Array) -> jax.Array:
        return Lorenz96().spin_up(key)

    def trajectory(self, key: jax.Array, state: jax.Array, length: int) -> jax.Array:
        return Lorenz96().trajectory(key, state, length)[..., ::2]


class Past(Half):
    """The same with the 3 frames before as channels of a place, the newest first."""

    shape = (20, 1, 4)
    offset, scale = (2.34,) * 4, (3.64,) * 4

    def trajectory(self, key: jax.Array, state: jax.Array, length: int) -> jax.Array:
        return with_past(super().trajectory(key, state, length + 3), 4)


def with_past(x: Any, frames: int) -> jax.Array:
    """States (T, d) -> (T - frames + 1, d, 1, frames), the newest first."""
    last = len(x) - frames + 1
    return jnp.stack([x[frames - 1 - i :][:last] for i in range(frames)], -1)[:, :, None]


def remembering(step: Any, key: jax.Array, states: jax.Array) -> jax.Array:
    """The forecast of states (E, d, 1, frames) by that of their newest frames."""
    new = step(key, states[:, :, 0, 0])
    return jnp.concatenate([new[:, :, None, None], states[..., :-1]], -1)


@dataclasses.dataclass(frozen=True)
class Mean:
    """Some coordinates, each the mean of a frame and those before it; 0 before the first."""

    indices: tuple[int, ...]
    frames: int

    def __call__(self, x: jax.Array, power: int = 1) -> jax.Array:
        x = x.reshape(*x.shape[:2], -1)[..., np.array(self.indices)]
        padded = jnp.pad(x, ((0, 0), (self.frames - 1, 0), (0, 0)))
        parts = [padded[:, i:][:, : x.shape[1]] for i in range(self.frames)]
        return sum(parts[1:], parts[0]) / self.frames**power


@dataclasses.dataclass(frozen=True)
class Case:
    """What is observed with noise of std 1: every `every`-th of the coordinates that are known, in
    every `period`-th frame, as the mean of `frames` frames; `half` of the coordinates are known."""

    every: int = 2
    period: int = 1
    frames: int = 1
    function: str = "identity"
    half: bool = False

    def observed(self, which: str, count: int) -> tuple[np.ndarray, observe.Observations]:
        """Truth (count, T, d) of a set, and its observations."""
        keys = jax.random.split(jax.random.key({"validation": 1001, "test": 1002}[which]), count)
        system = Lorenz96()
        truth = jax.jit(jax.vmap(lambda k: system.trajectory(k, system.spin_up(k), FRAMES)))(keys)
        truth = np.asarray(truth)[..., :: 1 + self.half]
        indices = tuple(range(0, truth.shape[2], self.every))
        linear = Mean(indices, self.frames) if self.frames > 1 else observe.Select(indices)
        operator = observe.Operator(linear, self.function)
        values = np.array(operator(jnp.asarray(truth)))
        values += np.random.default_rng(len(which)).standard_normal(values.shape)
        values[:, (np.arange(FRAMES) + 1) % self.period > 0] = np.nan
        return truth, observe.Observations(values, operator, 1.0)

    def with_past(self, seen: observe.Observations, frames: int) -> observe.Observations:
        """The same observations for states (d, 1, frames)."""
        size = 40 // (1 + self.half)
        rows = np.zeros((size, size, frames), np.float32)
        rows[np.arange(size), np.arange(size), : self.frames] = 1 / self.frames
        matrix = tuple(map(tuple, rows[:: self.every].reshape(-1, size * frames).tolist()))
        return dataclasses.replace(seen, operator=observe.Operator(observe.Matrix(matrix)))


CASES = {"plain": Case(), "abs": Case(function="abs"), "sparse": Case(4), "rare8": Case(period=8),
         "rare12": Case(period=12), "means": Case(period=8, frames=8),
         "partial": Case(half=True)}  # fmt: skip


# By whether half of the coordinates are known: for these there are no equations.
MODELS = {False: ("equations", "emulator", "trajectory"), True: ("past", "emulator", "trajectory")}


def solver(subject: Subject, case: Case) -> tuple[methods.Solver, int]:
    """`assimilate` of the subject, and the number of frames that its states have."""
    run, shape = subject.run, subject.run.model.data.shape[1:]
    if subject.method == "trajectory" or case.frames == 1:
        return subject.solve, shape[2] if len(shape) == 3 else 1
    data = dataclasses.replace(run.data, options={**run.data.options, "frames": case.frames})
    source = dataclasses.replace(run, data=data).source("train")
    rows = np.linspace(0, len(source) - 1, methods.CLIMATE).astype(int)
    x = np.asarray(source.offset) + np.asarray(source.scale) * source[rows][0]
    climate = np.float32(np.moveaxis(x[:, ::-1], 1, 2)[:, :, None])
    step = ensemble.as_tree(subject.solve.args[0])
    step = jax.tree_util.Partial(remembering, step)
    return functools.partial(ensemble.assimilate, step, climate), case.frames


def estimating(
    subject: Subject, case: Case, which: str, count: int
) -> tuple[methods.Solver, np.ndarray, observe.Observations]:
    """A solver with members (N, E, T, d) and the lag of its settings, truth and observations."""
    (solve, past), (truth, seen) = solver(subject, case), case.observed(which, count)

    def newest(seen: observe.Observations, settings: Any, _: Any, **options: Any) -> Any:
        ahead = np.full(FRAMES, getattr(settings, "lag", math.inf))
        found = solve(seen, settings, np.where(ahead < FRAMES, ahead, math.inf), **options)
        return found._replace(members=found.members[..., 0, 0]) if past > 1 else found

    return newest, truth, case.with_past(seen, past) if past > 1 else seen


def tuning(subject: Subject, case: Case, passes: int, members: int) -> dict[str, Any]:
    """The settings of the lowest CRPS, found by going through the keys."""
    best, grid, tried = STARTS[subject.method], dict(GRIDS[subject.method]), []
    if subject.method == "trajectory" and case.frames > 1:
        grid["window"] = (0,)  # others would cut means
    solve, *data = estimating(subject, case, "validation", TUNED_ON[subject.method])
    for _ in range(passes):
        start = best
        best, rows = methods.tuned(solve, start, grid, *data, (), ensemble=members)
        tried += rows
        if best == start:  # a second time it would be the same
            break
    return {"plan": {key: getattr(best, key) for key in grid}, "tried": tried}


def tested(subject: Subject, case: Case, plan: dict, count: int, members: int) -> dict[str, Any]:
    """The numbers of a row, and of each trajectory; one is lost if the climate is a better
    estimate. Seconds are CPU seconds, of a filter without those of compilation."""
    subject.solve, truth, seen = estimating(subject, case, "test", count)
    settings = dataclasses.replace(STARTS[subject.method], **plan)
    x, seconds = subject.estimate(seen, settings, (), ensemble=members)
    each = [scores.summary(x[n : n + 1], truth[n : n + 1], ()) for n in range(count)]
    told = {key: np.array([one[key] for one in each]) for key in ("rmse", "crps")}
    return {
        **scores.summary(x, truth, ()), "seconds": seconds, "no_skill": float(truth.std()),
        **{f"{key}_error": float(v.std(ddof=1) / count**0.5) for key, v in told.items()},
        **{f"{key}_by_trajectory": np.round(v, 4).tolist() for key, v in told.items()},
        "lost": int((told["rmse"] > truth.std()).sum()),
    }  # fmt: skip


def compared(
    rows: Rows, folder: pathlib.Path, name: str, model: str, count: int = 8, members: int = 0
) -> None:
    """Make the rows of a case and a model, for `count` trajectories of so many members."""
    case = CASES[name]
    known = model in ("equations", "emulator") and not case.half

    def subject(equations: bool) -> Subject:
        run = "half_" * case.half + ("emulator" if equations else model)
        return Subject(folder / run, "", equations)

    tuned_as, tested_as = subject(known), subject(model == "equations")
    members = members or methods.MEMBERS[tuned_as.method]
    asked = {"case": name, "set": "validation", "members": members, **tuned_as.name}
    plan = rows.row(asked, lambda: tuning(tuned_as, case, 1 + known, members))["plan"]
    asked |= {"model": model, "set": "test", "plan": plan, "trajectories": count, **tested_as.name}
    rows.row(asked, lambda: tested(tested_as, case, plan, count, members))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--models", nargs="+", help="of MODELS; default: all of the case")
    parser.add_argument("--ensemble", type=int, default=0)
    flags, rows = parser.parse_args(), Rows("niche")
    for name in flags.cases:
        for model in flags.models or MODELS[CASES[name].half]:
            compared(rows, flags.folder, name, model, members=flags.ensemble)


if __name__ == "__main__":
    main()
