"""2-D Navier-Stokes, vorticity of 64x64 points: one trajectory model in all regimes.

  python -m launch.train --config=configs/navier_stokes_forcing.py --workdir=DIR
  python benchmarks/navier_stokes.py --workdir=DIR
  python benchmarks/assimilation_figures.py --navier_stokes --workdir=DIR   # docs/navier_stokes.*

  python -m launch.train --config=configs/navier_stokes_emulator.py --workdir=ONE
  python benchmarks/navier_stokes.py --workdir=ONE [--equations]

is an emulator, or the equations, in an ensemble Kalman filter, whose settings are chosen by the
CRPS of the filter on two trajectories of the validation set. With --known the first frame is known.

results/README.md explains the protocol and the rows. The settings in SCHEMES were chosen on the set
"validation" with half as many trajectories and members. Writes the rows of the set "test" (or
--set=validation) into benchmarks/results/navier_stokes.json, and the members of the first
trajectory into DIR; rows that are there are kept.
"""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from assimilation import SETS
from scipy.stats import norm
from tasks import Rows
from trajectory_rows import Subject, ahead_of, parser, tuning

from mclr_jax.assimilation import observe, scores
from mclr_jax.assimilation.ensemble import Settings
from mclr_jax.assimilation.schedules import Scheme
from mclr_jax.assimilation.trajectories import Trajectories
from mclr_jax.files import provenance, save_arrays, write_json

FRAMES, STD, MEMBERS, BATCH, FILTER_MEMBERS = 16, 0.05, 8, 16, 100
TUNED_ON, GRID = 2, {"radius": (4.0, 6.0, 8.0, 12.0, 16.0)}  # of an ensemble Kalman filter
OPERATORS = {"random": observe.Random(0.1), "downsample": observe.Downsample(4)}
LEVELS = {"sigma_min": 0.05, "sigma_max": 10.0}
SCHEMES = {
    "filter": Scheme(window=4, steps=8, first_steps=16, **LEVELS),
    "lag8": Scheme(window=12, steps=8, first_steps=16, **LEVELS),
    "batch": Scheme(first_steps=32, **LEVELS),
}
TRAINING = {"system": "navier_stokes", "trajectories": 128, "length": 256}


def problem(name: str, which: str, count: int = 8) -> tuple[np.ndarray, observe.Observations]:
    """Truth (N, FRAMES, 64, 64, 1) in units of the vorticity, and its observations."""
    data = Trajectories("test", "navier_stokes", FRAMES, 64, FRAMES, seed=SETS[which])
    truth = data[np.arange(count)][0] * np.float32(data.scale)
    operator, std = observe.Operator(OPERATORS[name]), STD * data.scale[0]
    values = np.asarray(operator(truth))
    values = values + std * np.random.default_rng(SETS[which]).standard_normal(values.shape)
    return truth, observe.Observations(values, operator, std, time_step=data.time_step)


@functools.cache
def climate() -> tuple[np.ndarray, np.ndarray]:
    """Covariance in space (4096, 4096) and correlation in time (FRAMES,) of the training data."""
    data = Trajectories("train", frames=1, **TRAINING)
    space, time_products = np.zeros((64**2, 64**2), np.float32), np.zeros(FRAMES)
    for file in data._files:
        x = np.asarray(file).reshape(len(file), data.length, -1) * np.float32(data.scale)
        flat = x.reshape(-1, x.shape[2])
        space += flat.T @ flat / (data.count * data.length)
        time_products += [(x[:, : len(x[0]) - k] * x[:, k:]).mean() for k in range(FRAMES)]
    return space, time_products / time_products[0]


def interpolated(
    values: np.ndarray, rows: np.ndarray, std: float, space: np.ndarray, time: np.ndarray,
    ahead: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Mean and std (N, T, d) of x given values (N, T, m) = x rows + std n, rows (d, m).

    The covariance of x is `space` (d, d) times the correlation `time` (T,) by distance. Frame k has
    the values up to frame k + ahead[k], or with ahead None its own alone. With the eigenvectors of
    the correlation and of the covariance of the values, the covariance of all values is diagonal.
    """
    cross = space @ rows
    power, modes = np.linalg.eigh(rows.T @ cross)
    seen, gain, places = values @ modes, cross @ modes, np.arange(values.shape[1])
    mean, variance = np.empty((2, *values.shape[:2], len(space)))
    for k in places:
        frames = places[k : k + 1] if ahead is None else places[: k + ahead[k] + 1]
        in_time, courses = np.linalg.eigh(time[abs(np.subtract.outer(frames, frames))])
        weights = time[abs(frames - k)] @ courses
        inverse = 1 / (np.outer(in_time, power) + std**2)
        parts = courses.T @ seen[:, frames]
        mean[:, k] = np.einsum("f,fm,nfm->nm", weights, inverse, parts) @ gain.T
        variance[:, k] = np.diag(space) - gain**2 @ (weights**2 @ inverse)
    return mean, np.sqrt(variance)


def errors(mean: np.ndarray, truth: np.ndarray) -> dict:
    """Numbers of a row that a mean has."""
    squares = [(x**2).sum((2, 3, 4)) for x in (mean - truth, truth)]
    nrmse = float(np.sqrt(np.divide(*squares)).mean())
    return {"nrmse": nrmse, "rmse": scores.rmse(mean, truth), "spectrum_mean": spectrum(mean)}


def spectrum(fields: np.ndarray) -> list[float]:
    found = scores.energy_spectrum(fields[..., 0])
    return found.reshape(-1, found.shape[-1]).mean(0).tolist()


def baseline(truth: np.ndarray, obs: observe.Observations, regime: str) -> dict:
    """A row of optimal interpolation."""
    climate_of_data = climate()
    start = time.monotonic()
    ahead = None if regime == "frame" else np.minimum(ahead_of(regime, FRAMES), FRAMES).astype(int)
    unit = np.eye(64**2, dtype=np.float32).reshape(-1, 1, 64, 64, 1)
    rows = np.asarray(obs.operator(unit))[:, 0]
    found = interpolated(obs.values, rows, obs.std, *climate_of_data, ahead)
    mean, std = (x.reshape(truth.shape) for x in found)
    z = (truth - mean) / std
    crps = std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - np.pi**-0.5)
    row = errors(mean, truth)
    return {**row, "standardised": float(row["rmse"] * STD / obs.std), "crps": float(crps.mean()),
            "spread_skill": float(np.sqrt((std**2).mean()) / row["rmse"]),
            "seconds": time.monotonic() - start}  # fmt: skip


def denoising(subject: Subject) -> dict[str, float]:
    """Mean square error of frame 8 at sigma 1, in units of the scale, by the levels of the others.

    `gaussian`: of the best linear denoiser of a single frame, by the covariance of `climate`.
    """
    truth, _ = problem("random", "test")
    model = subject.run.model
    (scale,), levels = model.data.scale, {"same": 1.0, "noise": 20.0, "clean": 0.02}
    x, found = jnp.asarray(truth / scale), {}
    n = jax.random.normal(jax.random.key(0), x.shape)
    for name, level in levels.items():
        sigma = jnp.full(x.shape[:2], level).at[:, 8].set(1.0)
        d = model.denoise(subject.params)(x + sigma[..., None, None, None] * n, sigma, None)
        found[name] = float(((d - x)[:, 8] ** 2).mean())
    power = np.linalg.eigvalsh(climate()[0] / scale**2)
    return found | {"gaussian": float((power / (1 + power)).mean())}


def observed_fields(name: str, values: np.ndarray) -> np.ndarray:
    """Observations (T, m) as pictures (T, n, n), NaN where nothing was seen."""
    if name == "downsample":
        return values.reshape(len(values), 16, 16)
    places = np.asarray(OPERATORS[name](np.arange(64**2).reshape(1, 1, 64, 64, 1)))[0, 0]
    fields = np.full((len(values), 64**2), np.nan)
    fields[:, places] = values
    return fields.reshape(-1, 64, 64)


def main() -> None:
    found = parser(__doc__, folder=False)
    found.add_argument("--set", choices=SETS, default="test")
    found.add_argument("--operators", choices=OPERATORS, nargs="+", default=[*OPERATORS])
    found.add_argument("--regimes", choices=SCHEMES, nargs="+", default=[*SCHEMES])
    found.add_argument("--equations", action="store_true", help="in place of the emulator")
    found.add_argument("--known", action="store_true", help="the first frame, to a model")
    flags = found.parse_args()
    subject, rows = Subject(flags.workdir, "", flags.equations), Rows("navier_stokes")
    is_filter = subject.method == "enkf"
    if not is_filter and "denoising" not in rows.content():
        more = {"step": subject.name["step"], "made_by": provenance()}
        write_json(rows.path, rows.content() | {"denoising": denoising(subject) | more})

    def estimate(name: str, regime: str, method: str) -> dict:
        truth, obs = problem(name, flags.set)
        shown = {"spectrum_truth": spectrum(truth)}
        if method == "interpolation":
            return baseline(truth, obs, regime) | shown
        if flags.known:
            obs = dataclasses.replace(obs, initial=truth[:, 0])
        scheme = Settings(**best[name]) if is_filter else SCHEMES[regime]
        options = {"ensemble": FILTER_MEMBERS if is_filter else MEMBERS, "batch_size": BATCH}
        members, seconds = subject.estimate(obs, scheme, ahead_of(regime, FRAMES), **options)
        if flags.set == "test" and not flags.known:
            save_arrays(
                flags.workdir / f"{name}_{regime}.npz", members=members[0, ..., 0],
                truth=truth[0, ..., 0], seen=observed_fields(name, obs.values[0]),
            )  # fmt: skip
        row = errors(members.mean(1), truth)
        row |= scores.summary(members, truth, subject.run.model.data.scale)
        return row | {"spectrum_members": spectrum(members), "seconds": seconds} | shown

    best: dict[str, dict] = {}
    for name in flags.operators if is_filter else ():
        truth, seen = problem(name, "validation", TUNED_ON)
        asked = {"set": "validation", "operator": name, "regime": "tuning", **subject.name}
        make = functools.partial(tuning, subject, seen, truth, FILTER_MEMBERS, **GRID)
        best[name] = rows.row(asked, make)["plan"]

    methods = {} if flags.known else {"interpolation": ("frame", *flags.regimes)}
    methods[subject.method] = flags.regimes
    for method, regimes in methods.items():
        for name, regime in itertools.product(flags.operators, regimes):
            asked = {"set": flags.set, "operator": name, "regime": regime, "method": method}
            if method == "enkf":
                asked |= {**subject.name, "plan": best[name], "members": FILTER_MEMBERS}
            elif method == "trajectory":
                plan = dataclasses.asdict(SCHEMES[regime])
                asked |= {"method": "model", **subject.name, "plan": plan}
            asked["regime"] += "_known" * flags.known
            rows.row(asked, functools.partial(estimate, name, regime, method))


if __name__ == "__main__":
    main()
