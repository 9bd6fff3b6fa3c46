"""Reference numbers for data assimilation: particle filter and smoother on Lorenz-63.

  python benchmarks/assimilation_baselines.py --folder=DIR    # 6 minutes on one core

Writes DIR/{flowdas,lo,hi}_{validation,test}.npz (truth, observations, posterior means, standard
deviations and members) and the keys particle_filter_{flowdas,lo,hi} of
benchmarks/results/assimilation_baselines.json. The protocols are described in assimilation.py.

The regimes and the numbers of a row are explained in results/README.md.
"""

import json
import pathlib
import time
from typing import Any

import assimilation
import jax
import jax.numpy as jnp
import numpy as np
from assimilation import PROTOCOLS, SETS, STD, TIME_STEP, Protocol, attractor
from tasks import RESULTS, parsed

from mclr_jax.assimilation import scores
from mclr_jax.files import provenance, write_json

REGIMES = {"filter": 0, "lag8": 8, "lag16": 16, "batch": None}  # lag in frames
PARTICLES, BACKWARD, STORED = 16_384, 256, 64
FILE = RESULTS / "assimilation_baselines.json"


def posterior(protocol: Protocol, truth: jax.Array, values: jax.Array, seed: int) -> dict:
    """Per regime: mean and std (n, T, 3), 2 STORED members (n, 2 STORED, T, 3)."""
    system, key = protocol.system, jax.random.key(1000 + seed)
    pool = attractor(jax.random.fold_in(key, 0), 4 * PARTICLES)

    @jax.jit
    def one(truth, values, key):
        keys = jax.random.split(key, 3 + len(REGIMES))
        if protocol.known:
            particles = jnp.broadcast_to(truth[0], (PARTICLES, 3))
        else:
            particles = jax.random.choice(keys[0], pool, (PARTICLES,), replace=False)
        history = assimilation.particle_filter(system, values, particles, keys[1])
        found = {}
        for (name, lag), key in zip(REGIMES.items(), keys[3:], strict=True):
            if lag is None:
                x = assimilation.backward_simulation(system, history, keys[2], BACKWARD)
                found[name] = x.mean(1), x.std(1, ddof=1), x[:, : 2 * STORED]
            else:
                found[name] = assimilation.fixed_lag(history, lag, key, 2 * STORED)
        return found

    keys = jax.random.split(jax.random.fold_in(key, 1), len(truth))
    each = [jax.device_get(one(*row)) for row in zip(truth, values, keys, strict=True)]
    found = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    return {name: (m, s, np.moveaxis(x, 2, 1)) for name, (m, s, x) in found.items()}


def score(truth: Any, mean: Any, std: Any, members: Any, scale: Any = STD) -> dict[str, float]:
    """The numbers of results/README.md; truth, mean, std (n, T, d), members (n, E, T, d)."""
    square, apart = (mean - truth) ** 2, (members - truth[:, None]) / scale
    each, rmse = square.mean((1, 2)), scores.rmse(mean, truth)
    found = {
        "rmse": rmse,
        "rmse_error": each.std(ddof=1) / len(each) ** 0.5 / (2 * rmse),
        "rmse_second_half": np.sqrt(square[:, square.shape[1] // 2 :].mean()),
        "rmse_flowdas": np.sqrt((apart**2).sum(-1).mean(-1)).mean(),
        "spread_skill": np.sqrt((std**2).mean()) / rmse,
        "crps": scores.crps(members, truth),
        "w1_standardised": np.abs(apart).mean(),
    }
    return {key: float(value) for key, value in found.items()}


def described(protocol: Protocol, truth: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a file of observations, as `mclr_jax.assimilation.observe` reads them."""
    found: dict[str, Any] = {"truth": truth, "values": values, "time_step": TIME_STEP}
    found |= {"std": protocol.system.observation_std, "state_scale": STD, **protocol.operator}
    found |= {"initial": truth[:, 0]} if protocol.known else {}
    return {key: np.asarray(value) for key, value in found.items()}


def judge(folder: pathlib.Path, name: str, which: str) -> list[dict]:
    """Draw a set, find its posterior, write both; the rows of its regimes."""
    protocol, start = PROTOCOLS[name], time.time()
    seed = 10 * list(PROTOCOLS).index(name) + SETS[which]
    truth, values = map(np.asarray, protocol.draw(seed))
    found = posterior(protocol, truth, values, seed)
    arrays, rows = described(protocol, truth, values), []
    for regime in REGIMES:
        mean, std, members = found[regime]
        kept = {"mean": mean, "std": std, "members": members[:, :STORED]}
        arrays |= {f"{regime}_{key}": value for key, value in kept.items()}
        row = score(truth, mean, std, members)
        rows.append({"protocol": name, "set": which, "regime": regime, **row})
    np.savez_compressed(folder / f"{name}_{which}.npz", **arrays)
    print(f"{name} {which}: {time.time() - start:.0f} s", flush=True)
    return rows


def update(part: str, rows: list[dict], **more: str) -> None:
    """Replace one part of the result file."""
    result = json.loads(FILE.read_text()) if FILE.exists() else {}
    write_json(FILE, result | {part: {"made_by": provenance() | more, "rows": rows}})


def main() -> None:
    folder = parsed(__doc__, folder=(pathlib.Path, "of the files to write")).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROTOCOLS:
        rows = [row for which in SETS for row in judge(folder, name, which)]
        update(f"particle_filter_{name}", rows)


if __name__ == "__main__":
    main()
