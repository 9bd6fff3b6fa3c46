"""Reference numbers for data assimilation: particle filter and smoother on Lorenz-63.

  python benchmarks/assimilation_baselines.py --folder=DIR    # 6 minutes on one core

Writes DIR/{flowdas,lo,hi}_{validation,test}.npz (truth, observations, posterior means, standard
deviations and members) and the keys particle_filter_{flowdas,lo,hi} of
benchmarks/results/assimilation_baselines.json. The protocols are described in assimilation.py.

The regimes and the numbers of a row are explained in results/README.md.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from assimilation import (
    PROTOCOLS,
    SETS,
    STD,
    TIME_STEP,
    Protocol,
    System,
    attractor,
    backward_simulation,
    fixed_lag,
    particle_filter,
)  # fmt: skip
from tasks import RESULTS

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
        history = particle_filter(system, values, particles, keys[1])
        found = {}
        for (name, lag), key in zip(REGIMES.items(), keys[3:], strict=True):
            if lag is None:
                x = backward_simulation(system, history, keys[2], BACKWARD)
                found[name] = x.mean(1), x.std(1, ddof=1), x[:, : 2 * STORED]
            else:
                found[name] = fixed_lag(history, lag, key, 2 * STORED)
        return found

    keys = jax.random.split(jax.random.fold_in(key, 1), len(truth))
    each = [jax.device_get(one(*row)) for row in zip(truth, values, keys, strict=True)]
    found = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    return {name: (m, s, np.moveaxis(x, 2, 1)) for name, (m, s, x) in found.items()}


def crps(members: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Unbiased, members (n, E, ...), truth (n, ...) to (n, ...)."""
    size = members.shape[1]
    ranks = (2 * np.arange(size) - size + 1).reshape(-1, *[1] * (members.ndim - 2))
    apart = (ranks * np.sort(members, 1)).sum(1) * 2 / (size * (size - 1))  # E|X - X'|
    return np.abs(members - truth[:, None]).mean(1) - apart / 2


def score(
    system: System, truth: np.ndarray, values: np.ndarray,
    mean: np.ndarray, std: np.ndarray, members: np.ndarray, joint: bool = False,
    scale: np.ndarray = STD,
) -> dict:  # fmt: skip
    """The numbers of results/README.md; members (n, 2 E, T, d), joint where trajectories."""
    square = (mean - truth) ** 2
    rmse = float(np.sqrt(square.mean()))
    each = square.mean((1, 2))
    square_of_members = ((members - truth[:, None]) ** 2 / scale**2).sum(-1)
    first, second = np.split(members, 2, 1)
    row = {
        "rmse": rmse,
        "rmse_error": float(each.std(ddof=1) / len(each) ** 0.5 / (2 * rmse)),
        "rmse_second_half": float(np.sqrt(square[:, square.shape[1] // 2 :].mean())),
        "rmse_standardised": float(np.sqrt((square / scale**2).mean())),
        "rmse_flowdas": float(np.sqrt(square_of_members.mean(-1)).mean()),
        "spread_skill": float(np.sqrt((std**2).mean()) / rmse),
        "crps": float(crps(members, truth).mean()),
        "w1_to_truth": float(np.abs(members - truth[:, None]).mean()),
        "w1_standardised": float((np.abs(members - truth[:, None]) / scale).mean()),
        "w1_floor": float(np.abs(np.sort(first, 1) - np.sort(second, 1)).mean()),
        "log_prior": float(system.log_prior(mean).mean()),
        "log_prior_truth": float(system.log_prior(truth).mean()),
    }
    if joint:
        row["log_prior_members"] = float(system.log_prior(members).mean())
    for name, x, y in (
        ("", mean, values), ("_truth", truth, values), ("_members", members, values[:, None]),
    ):  # fmt: skip
        row["log_likelihood" + name] = float(system.log_likelihood(y, x).sum(-1).mean())
    return row


def described(protocol: Protocol, truth: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a file of observations, as `mclr_jax.assimilation.observe` reads them."""
    found: dict[str, Any] = {"truth": truth, "values": values, "time_step": TIME_STEP}
    found |= {"std": protocol.system.observation_std, "state_scale": STD, **protocol.operator}
    found |= {"initial": truth[:, 0]} if protocol.known else {}
    return {key: np.asarray(value) for key, value in found.items()}


def judge(folder: pathlib.Path, name: str, which: str) -> list[dict]:
    """Draw a set, find its posterior, write both; the rows of its regimes."""
    protocol = PROTOCOLS[name]
    seed = 10 * list(PROTOCOLS).index(name) + SETS[which]
    start = time.time()
    truth, values = map(np.asarray, protocol.draw(seed))
    found = posterior(protocol, truth, values, seed)
    arrays, rows = described(protocol, truth, values), []
    for regime in REGIMES:
        mean, std, members = found[regime]
        kept = {"mean": mean, "std": std, "members": members[:, :STORED]}
        arrays |= {f"{regime}_{key}": value for key, value in kept.items()}
        row = score(protocol.system, truth, values, mean, std, members, regime == "batch")
        rows.append({"protocol": name, "set": which, "regime": regime, **row})
    np.savez_compressed(folder / f"{name}_{which}.npz", **arrays)
    print(f"{name} {which}: {time.time() - start:.0f} s", flush=True)
    return rows


def update(part: str, rows: list[dict], **more: str) -> None:
    """Replace one part of the result file."""
    result = json.loads(FILE.read_text()) if FILE.exists() else {}
    write_json(FILE, result | {part: {"made_by": provenance() | more, "rows": rows}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--protocol", choices=PROTOCOLS, help="this one alone")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    for name in [flags.protocol] if flags.protocol else PROTOCOLS:
        rows = [row for which in SETS for row in judge(flags.folder, name, which)]
        update(f"particle_filter_{name}", rows)


if __name__ == "__main__":
    main()
