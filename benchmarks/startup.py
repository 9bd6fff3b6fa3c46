"""Seconds from the start of `launch.demo` to its first training step, and of its imports.

  python benchmarks/startup.py --before=DIR

DIR is a checkout of an earlier revision. Both revisions run alternately in this environment, three
times each, first with an empty cache of compiled programs (cold), then with a filled one (warm).
Writes benchmarks/results/startup.json, with the least of the three times.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from mclr_jax.files import provenance, write_json
from mclr_jax.training.devices import banner

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEFORE = flags.DEFINE_string("before", None, "Checkout of an earlier revision.", required=True)
REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each case.", lower_bound=1)


def first_step(root: pathlib.Path, cache: pathlib.Path) -> float:
    """Seconds until the demo says that the first step is done; then it is stopped."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.demo", f"--workdir={folder}"]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "Compiled in" in line:
                    return time.monotonic() - start
            raise RuntimeError(f"{command} in {root} ended before its first step.")
        finally:
            process.kill()
            process.communicate()


def imports(root: pathlib.Path) -> float:
    """Seconds to import what training imports."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", "import launch.train"], cwd=root, env=environment, check=True
    )
    return time.monotonic() - start


def main(_) -> None:
    roots = {"before": pathlib.Path(BEFORE.value), "after": ROOT}
    times: dict[str, dict[str, list[float]]] = {
        name: {"imports": [], "cold": [], "warm": []} for name in roots
    }
    for _ in range(REPEATS.value):
        for name, root in roots.items():
            with tempfile.TemporaryDirectory() as folder:
                times[name]["imports"].append(imports(root))
                times[name]["cold"].append(first_step(root, pathlib.Path(folder)))
                times[name]["warm"].append(first_step(root, pathlib.Path(folder)))
    git = ["git", "rev-parse", "HEAD"]
    before = subprocess.run(git, cwd=roots["before"], capture_output=True, text=True, check=True)
    rows = [
        {"name": name, **{key: min(values) for key, values in cases.items()}, "all": cases}
        for name, cases in times.items()
    ]
    result = {**provenance(), "before": before.stdout.strip(), "unit": "s", "rows": rows}
    path = ROOT / "benchmarks" / "results" / "startup.json"
    write_json(path, {**result, "device": banner()})
    print(path.read_text())


if __name__ == "__main__":
    app.run(main)
