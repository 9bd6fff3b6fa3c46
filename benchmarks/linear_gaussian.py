"""A trained trajectory model on a linear-Gaussian process, where Kalman's answers are known.

  python benchmarks/linear_gaussian.py --workdir=DIR

Trains configs/lorenz63_forcing.py with CHANGES on the process of tests/oracle.py, of two
coordinates, and estimates 16 frames of which coordinate 1 is observed (std .3) in all but two, in
each regime: with the exact denoiser and with the network, by the same guidance and settings.
`error` is the RMS distance of the members' mean from Kalman's mean in posterior standard
deviations, without the error of a finite ensemble; `spread` the ratio of the standard deviations;
`rmse_ratio` that of the two means' RMSE. Writes benchmarks/results/linear_gaussian.json.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import RESULTS, ROOT, config_of, parameters

from mclr_jax import runs
from mclr_jax.assimilation.dynamics import Dynamics
from mclr_jax.assimilation.regimes import assimilate
from mclr_jax.assimilation.schedules import Scheme, lags
from mclr_jax.files import digest, provenance, write_json
from mclr_jax.main import train

sys.path.insert(0, str(ROOT / "tests"))

import oracle

FRAMES, LAG = 16, 3
PROCESS = oracle.Process(window=FRAMES)
CHANGES: dict[str, Any] = {
    "data.system": "linear_gaussian:Linear", "data.frames": FRAMES, "data.length": 256,
    "network.width": 64, "batch_size": 64, "num_steps": 8000,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Linear(Dynamics):
    """The process of the oracle, x' = rho R(angle) x + noise, whose states are N(0, I)."""

    time_step: float = 0.5
    noise: float = (1 - PROCESS.rho**2) ** 0.5

    shape, offset, scale = (2,), (0.0, 0.0), (1.0, 1.0)

    def advance(self, state: jax.Array) -> jax.Array:
        return state @ jnp.asarray(PROCESS.step.T, state.dtype)


def row(model: Any, params: Any, regime: str, trajectories: int, ensemble: int) -> dict:
    """The distance of one regime from Kalman's answer, on trajectories of seed 1."""
    truth, seen = PROCESS.draw(trajectories, FRAMES, 0.3, missing=(3, 7), seed=1)
    ahead, start = lags(regime, FRAMES, LAG), time.monotonic()
    members = assimilate(model, params, seen, Scheme(), ahead, ensemble=ensemble).members
    seconds = time.monotonic() - start
    until = np.minimum(np.arange(FRAMES) + ahead, FRAMES - 1).astype(int)
    mean, std = PROCESS.posterior(seen, until)
    error, spread = oracle.errors(members, mean, std)
    rmse, best = (np.sqrt(((m - truth) ** 2).mean()) for m in (members.mean(1), mean))
    return {"error": float(error), "spread": float(spread), "rmse_ratio": float(rmse / best),
            "rmse_kalman": float(best), "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    train(config_of("lorenz63_forcing", CHANGES), flags.workdir)
    run = runs.load(flags.workdir)
    params, step = run.weights()
    models = {"exact denoiser": (PROCESS, None), "network": (run.model, params)}
    asked = {"trajectories": 32, "ensemble": 32}
    rows = [
        {"regime": regime, "model": name, **row(*model, regime, **asked)}
        for regime in ("filter", "fixed_lag", "batch") for name, model in models.items()
    ]  # fmt: skip
    value = {"rows": rows, **asked, "lag": LAG, "step": step, "weights": digest(params),
             "parameters": parameters(run.model)}  # fmt: skip
    write_json(RESULTS / "linear_gaussian.json", value | provenance())
    for one in rows:
        print(one)


if __name__ == "__main__":
    main()
