"""2-D Navier-Stokes, vorticity of 64x64 points: one trajectory model in all regimes.

  python -m launch.train --config=configs/navier_stokes_forcing.py --workdir=DIR
  python benchmarks/navier_stokes.py --workdir=DIR
  python benchmarks/navier_stokes.py --workdir=DIR --figures    # docs/navier_stokes.{png,gif}

Truth: 8 trajectories of 16 frames, of other seeds than the training data. Each frame is observed
with noise of .05 of the field's scale: a tenth of the points, the same ones in each frame (random),
or bilinear interpolation at every fourth point (downsample). The settings of filter and
batch in SCHEMES were chosen on the set "validation" with half as many trajectories and members,
those of lag8 are the same; the rows are of the set "test", and --set=validation makes the others.

Baseline: optimal interpolation, the exact answer under a Gaussian law with the covariance of the
training frames; `frame` from the observations of one frame alone, the regimes with the correlation
in time of the training data times the covariance in space.

Numbers of a row: nrmse, the mean of |estimate - truth| / |truth| of a frame; rmse and crps in units
of the vorticity, standardised in units of its scale; spectra, the mean over all frames of variance
by wave number. Writes benchmarks/results/navier_stokes.json row by row, and the members of the
first trajectory into DIR; rows that are there are not made again.
"""

import argparse
import dataclasses
import functools
import io
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from scipy.stats import norm
from tasks import RESULTS, ROOT, made

from mclr_jax import runs
from mclr_jax.assimilation import observe, regimes, scores
from mclr_jax.assimilation.schedules import Scheme, lags
from mclr_jax.assimilation.trajectories import Trajectories
from mclr_jax.files import digest, provenance, save_arrays, write_atomically, write_json
from mclr_jax.training.devices import banner

FILE = RESULTS / "navier_stokes.json"
FRAMES, STD, MEMBERS, BATCH = 16, 0.05, 8, 16
OPERATORS = {"random": observe.Random(0.1), "downsample": observe.Downsample(4)}
REGIMES = {"filter": ("filter", 0), "lag8": ("fixed_lag", 8), "batch": ("batch", 0)}
LEVELS = {"sigma_min": 0.05, "sigma_max": 10.0}
SCHEMES = {
    "filter": Scheme(window=4, steps=8, first_steps=16, **LEVELS),
    "lag8": Scheme(window=12, steps=8, first_steps=16, **LEVELS),
    "batch": Scheme(first_steps=32, **LEVELS),
}
SETS = {"validation": 1, "test": 2}
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
    size = lambda x: np.sqrt((x**2).sum((2, 3, 4)))  # noqa: E731
    each = size(mean - truth) / size(truth)
    rmse = scores.rmse(mean, truth)
    return {"nrmse": float(each.mean()), "nrmse_by_frame": each.mean(0).tolist(), "rmse": rmse,
            "spectrum_mean": spectrum(mean)}  # fmt: skip


def spectrum(fields: np.ndarray) -> list[float]:
    found = scores.energy_spectrum(fields[..., 0])
    return found.reshape(-1, found.shape[-1]).mean(0).tolist()


def baseline(name: str, regime: str, which: str) -> dict:
    """A row of optimal interpolation."""
    (truth, obs), climate_of_data = problem(name, which), climate()
    start = time.monotonic()
    ahead = None if regime == "frame" else np.minimum(lags(*_kind(regime)), FRAMES).astype(int)
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


def _kind(regime: str) -> tuple[str, int, int]:
    """Arguments of `lags`."""
    return REGIMES[regime][0], FRAMES, REGIMES[regime][1]


def analyse(run, params, name: str, regime: str, which: str) -> tuple[dict, np.ndarray]:
    """A row of the model, and its members."""
    truth, obs = problem(name, which)
    start, scheme = time.monotonic(), SCHEMES[regime]
    members = regimes.assimilate(
        run.model, params, obs, scheme, lags(*_kind(regime)), ensemble=MEMBERS, batch_size=BATCH
    ).members
    row = errors(members.mean(1), truth)
    row |= scores.summary(members, truth, run.model.data.scale)
    return row | {"spectrum_members": spectrum(members),
                  "seconds": time.monotonic() - start}, members  # fmt: skip


def denoising(run, params) -> dict[str, float]:
    """Mean square error of frame 8 at sigma 1, in units of the scale, by the levels of the others.

    `gaussian`: of the best linear denoiser of a single frame, by the covariance of `climate`.
    """
    truth, _ = problem("random", "test")
    (scale,), levels = run.model.data.scale, {"same": 1.0, "noise": 20.0, "clean": 0.02}
    x, found = jnp.asarray(truth / scale), {}
    n = jax.random.normal(jax.random.key(0), x.shape)
    for name, level in levels.items():
        sigma = jnp.full(x.shape[:2], level).at[:, 8].set(1.0)
        d = run.model.denoise(params)(x + sigma[..., None, None, None] * n, sigma, None)
        found[name] = float(((d - x)[:, 8] ** 2).mean())
    power = np.linalg.eigvalsh(climate()[0] / scale**2)
    return found | {"gaussian": float((power / (1 + power)).mean())}


def stored() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}


def figures(workdir: pathlib.Path) -> None:
    """The first test trajectory: fields and spectra as a picture, all frames as an animation."""
    rows = [row for row in stored()["rows"] if row["set"] == "test"]
    found = {name: observe.load(workdir / f"{name}.npz")
             for name in ("random_filter", "random_batch", "downsample_batch")}  # fmt: skip
    frame, limit = FRAMES // 2, 6

    def show(axis, values, title="", **options):
        options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "origin": "lower"} | options
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
        return axis.imshow(values, **options)

    figure = Figure((12, 4.4), layout="constrained")
    axes = figure.subplots(2, 6)
    for line, name in zip(axes, OPERATORS, strict=True):
        batch = found[f"{name}_batch"]
        mean = batch["members"].mean(0)
        panels = {"truth": batch["truth"], "observations": batch["seen"], "batch mean": mean,
                  "a member": batch["members"][0]}  # fmt: skip
        for axis, (title, values) in zip(line, panels.items(), strict=False):
            show(axis, values[frame], title if name == "random" else "")
        line[0].set_ylabel(name)
        std = batch["members"].std(0, ddof=1)[frame]
        title = "standard deviation" if name == "random" else ""
        figure.colorbar(show(line[4], std, title, cmap="viridis", vmin=0, vmax=None), ax=line[4])
        for row in rows:
            if (row["operator"], row["regime"], row["method"]) == (name, "batch", "model"):
                for label in ("truth", "mean", "members"):
                    line[5].loglog(row[f"spectrum_{label}"], label=label)
        line[5].set(xlim=(1, 32), ylim=(1e-6, 3))
        line[5].legend(fontsize=7)
    axes[0, 5].set_title("energy by wave number", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(ROOT / "docs" / "navier_stokes.png", buffer.getvalue())

    filtered, batch = found["random_filter"], found["random_batch"]
    panels = {"truth": batch["truth"], "observations": batch["seen"],
              "filter mean": filtered["members"].mean(0),
              "batch mean": batch["members"].mean(0)}  # fmt: skip
    figure = Figure((8, 2.3), layout="constrained")
    shown = [show(axis, np.zeros((64, 64)), title)
             for axis, title in zip(figure.subplots(1, 4), panels, strict=True)]  # fmt: skip

    def draw(k: int) -> list:
        for image, values in zip(shown, panels.values(), strict=True):
            image.set_data(values[k])
        return shown

    film = FuncAnimation(figure, draw, frames=FRAMES)
    film.save(ROOT / "docs" / "navier_stokes.gif", PillowWriter(fps=4), dpi=80)


def observed_fields(name: str, values: np.ndarray) -> np.ndarray:
    """Observations (T, m) as pictures (T, n, n), NaN where nothing was seen."""
    if name == "downsample":
        return values.reshape(len(values), 16, 16)
    places = np.asarray(OPERATORS[name](np.arange(64**2).reshape(1, 1, 64, 64, 1)))[0, 0]
    fields = np.full((len(values), 64**2), np.nan)
    fields[:, places] = values
    return fields.reshape(-1, 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--set", choices=SETS, default="test")
    parser.add_argument("--operators", choices=OPERATORS, nargs="+", default=[*OPERATORS])
    parser.add_argument("--regimes", choices=REGIMES, nargs="+", default=[*REGIMES])
    parser.add_argument("--figures", action="store_true", help="only draw, of the files in DIR")
    flags = parser.parse_args()
    if flags.figures:
        return figures(flags.workdir)
    run = runs.load(flags.workdir)
    params, step = run.weights()
    model = {"method": "model", "step": step, "weights": digest(params)}
    if "denoising" not in stored():
        found = denoising(run, params) | {"step": step, "made_by": provenance()}
        write_json(FILE, stored() | {"denoising": found})
        print(found, flush=True)
    todo = [(name, regime, {"method": "interpolation"})
            for name in flags.operators for regime in ("frame", *flags.regimes)]  # fmt: skip
    todo += [(name, regime, model) for name in flags.operators for regime in flags.regimes]
    for name, regime, kind in todo:
        asked = {"set": flags.set, "operator": name, "regime": regime, **kind}
        if kind is model:
            asked["plan"] = dataclasses.asdict(SCHEMES[regime])
        if made(stored()["rows"], asked):
            continue
        truth, obs = problem(name, flags.set)
        if kind is model:
            row, members = analyse(run, params, name, regime, flags.set)
            if flags.set == "test":
                save_arrays(
                    flags.workdir / f"{name}_{regime}.npz", members=members[0, ..., 0],
                    truth=truth[0, ..., 0], seen=observed_fields(name, obs.values[0]),
                )  # fmt: skip
        else:
            row = baseline(name, regime, flags.set)
        row["spectrum_truth"] = spectrum(truth)
        row |= asked | provenance() | {"device": banner()}
        result = stored()  # another process may have written since
        write_json(FILE, result | {"rows": [*result["rows"], row]})
        print(name, regime, kind["method"], row["nrmse"], row["crps"], row["seconds"], flush=True)


if __name__ == "__main__":
    main()
