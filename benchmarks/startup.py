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

from tasks import RESULTS, ROOT, parsed

from mclr_jax.files import provenance, write_json
from mclr_jax.training.devices import banner


def seconds_until(line: str, root: pathlib.Path, cache: str, *arguments: str) -> float:
    """Seconds until Python, with the modules of `root`, prints a line with this text, or ends."""
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_COMPILATION_CACHE_DIR": cache}
    start = time.monotonic()
    with subprocess.Popen([sys.executable, *arguments], cwd=root, env=environment, text=True,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        found = any(line and line in each for each in process.stderr)  # type: ignore[union-attr]
        seconds = time.monotonic() - start
        process.kill()
    if bool(line) != found or (not line and process.returncode):
        raise RuntimeError(f"{arguments} in {root} ended with status {process.returncode}.")
    return seconds


def main() -> None:
    before = parsed(__doc__, before=(pathlib.Path, "the other checkout")).before.resolve()
    roots = {"before": before, "after": ROOT}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in roots}
    for name, root in 3 * [*roots.items()]:
        with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as run:
            demo = ("Compiled in", root, cache, "-m", "launch.demo")
            for kind, given in {
                "imports": ("", root, cache, "-c", "import launch.train"),
                "cold": (*demo, f"--workdir={run}/cold"),
                "warm": (*demo, f"--workdir={run}/warm"),
            }.items():
                times[name].setdefault(kind, []).append(seconds_until(*given))
    git = ["git", "rev-parse", "HEAD"]
    revision = subprocess.check_output(git, cwd=before, text=True).strip()
    rows = [{"name": name, **{key: min(values) for key, values in kinds.items()}, "all": kinds}
            for name, kinds in times.items()]  # fmt: skip
    result = {**provenance(), "before": revision, "unit": "s", "rows": rows, "device": banner()}
    write_json(RESULTS / "startup.json", result)
    print(rows)


if __name__ == "__main__":
    main()
