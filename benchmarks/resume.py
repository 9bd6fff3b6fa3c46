"""A run killed by SIGKILL at 10 random moments must end with the bits of one that ran through.

python benchmarks/resume.py     # writes benchmarks/results/resume.json
"""

import argparse
import json
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mclr_jax import runs  # noqa: E402
from mclr_jax.files import write_json  # noqa: E402

OPTIONS = """
    --config=configs/digits.py --config.num_steps=300 --config.checkpoint_every=20
    --config.log_every=5 --config.sample_every=0 --config.network.width=48
    --config.network.dropout=0.1 --config.steps_per_dispatch=5
""".split()


def start(workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.train", f"--workdir={workdir}", *OPTIONS]
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stderr=log)


def last_step(workdir: pathlib.Path) -> int:
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    complete = [line for line in lines if line.endswith("}")]
    return json.loads(complete[-1])["step"] if complete else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = sorted(random.Random(args.seed).sample(range(5, 295), args.kills))

    with tempfile.TemporaryDirectory() as folder:
        whole, killed = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "killed"
        assert start(whole).wait() == 0, whole.with_suffix(".log").read_text()
        killed_after = []
        for moment in moments:
            process = start(killed)
            while process.poll() is None and last_step(killed) < moment:
                time.sleep(0.005)
            process.kill()
            if process.wait() == 0:
                break  # the run was over before it could be killed
            killed_after.append(last_step(killed))
        assert start(killed).wait() == 0, killed.with_suffix(".log").read_text()

        equal = {}
        for average in ("none", "halflife"):
            pair = [jax.tree.leaves(runs.load(w).weights(average)[0]) for w in (whole, killed)]
            equal[average] = all(np.array_equal(a, b) for a, b in zip(*pair, strict=True))
        curves = [
            list(map(json.loads, (w / "metrics.jsonl").read_text().splitlines()))
            for w in (whole, killed)
        ]
    result = {
        "command": "python benchmarks/resume.py " + " ".join(sys.argv[1:]),
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "steps": 300,
        "checkpoint_every": 20,
        "killed_after_step": killed_after,
        "parameters_bit_identical": equal["none"],
        "averages_bit_identical": equal["halflife"],
        "last_record_identical": curves[0][-1] == curves[1][-1],
    }
    print(json.dumps(result, indent=1))
    write_json(ROOT / "benchmarks" / "results" / "resume.json", result)
    assert len(killed_after) == args.kills
    assert equal == {"none": True, "halflife": True}


if __name__ == "__main__":
    main()
