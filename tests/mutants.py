"""Insert errors into the code, one at a time, and run the tests that must fail.

  python tests/mutants.py [--only=TEXT] [--jobs=2]

tests/mutants.toml lists the errors: file, text to replace (it occurs once), new text, and the
test. Each error is tried in a copy of the tree; it is killed if its test fails, and it counts as
survived if the test passes or cannot be run. All tests must pass without errors first. Writes
benchmarks/results/mutants.json (not with --only) and exits with status 1 if an error survives.

Outcomes are kept as they come: a run that was interrupted goes on where it stopped, unless the tree
is dirty, which has no name.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import tomllib
from typing import Any

from mclr_jax.files import append, provenance, write_json

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("mclr_jax", "launch", "configs", "tests", "benchmarks", "docs", "notebooks",
          "pyproject.toml", "setup.py", "README.md")  # fmt: skip
KEPT = ROOT / ".pytest_cache" / "mutants.jsonl"  # outcomes: rows with the revision
SECONDS = 900  # after which a test is stopped: the error may have made an endless loop


def pytest(root: pathlib.Path, tests: list[str], *options: str, seconds: Any = None) -> tuple:
    """Exit status and the last line of the output; -1: not finished in so many seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        run = subprocess.run(
            [*command, *options, *tests], cwd=root, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return -1, f"it took more than {seconds} seconds"
    return run.returncode, (run.stdout.strip().splitlines() or [run.stderr])[-1]


def copied(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the tree, with the checkout's cache of compiled programs."""
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    (ROOT / ".pytest_cache").mkdir(exist_ok=True)
    (folder / ".pytest_cache").symlink_to(ROOT / ".pytest_cache")
    return folder


def attempt(mutant: dict, root: pathlib.Path) -> dict:
    """What became of one error, tried in the copy `root`, which is as before afterwards."""
    file = root / mutant["file"]
    text = file.read_text()
    if text.count(mutant["old"]) != 1:
        found = f"the old text occurs {text.count(mutant['old'])} times in {mutant['file']}"
        return {**mutant, "outcome": f"not tried: {found}"}
    before = file.stat()
    file.write_text(text.replace(mutant["old"], mutant["new"]))
    try:
        status, last = pytest(root, [mutant["test"]], seconds=SECONDS)
    finally:  # with its old time, at which Python knows the compiled file of the old text
        file.write_text(text)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return {**mutant, "outcome": {0: "survived", 1: "killed"}.get(status, f"not tried: {last}")}


def identity(mutant: dict, revision: str) -> str:
    """Names an error and the code in which it was tried."""
    told = {key: value for key, value in mutant.items() if key != "outcome"}
    return hashlib.sha256(json.dumps([told, revision], sort_keys=True).encode()).hexdigest()


def kept(revision: str) -> dict[str, dict]:
    """Rows of an interrupted run by their identity."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    rows = [] if revision.endswith("-dirty") else map(json.loads, lines)
    return {row.pop("identity"): row for row in rows}


def outcomes(chosen: list[dict], revision: str, jobs: int) -> list[dict]:
    """The rows of the errors in their order; each new one is printed and kept."""
    done, copies = kept(revision), queue.Queue[pathlib.Path]()

    def row(mutant: dict) -> dict:
        if (name := identity(mutant, revision)) in done:
            return done[name]
        root = copies.get()
        try:
            found = attempt(mutant, root)
        finally:
            copies.put(root)
        print(f"{found['outcome']:9s} {mutant['what']}", flush=True)
        append(KEPT, json.dumps(found | {"identity": name}) + "\n")
        return found

    with tempfile.TemporaryDirectory() as folder:
        for number in range(jobs):
            copies.put(copied(pathlib.Path(folder) / str(number)))
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(row, chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="errors whose description has this text")
    parser.add_argument("--jobs", type=int, default=2, help="errors at a time")
    arguments = parser.parse_args()
    everything = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    chosen = [mutant for mutant in everything if arguments.only in mutant["what"]]
    made_by = provenance()
    left = [m for m in chosen if identity(m, made_by["revision"]) not in kept(made_by["revision"])]
    several = ("-n", str(arguments.jobs)) if arguments.jobs > 1 else ()
    status, last = pytest(ROOT, sorted({mutant["test"] for mutant in left}), *several)
    if left and status:
        sys.exit(f"The tests fail without any error: {last}")
    rows = outcomes(chosen, made_by["revision"], arguments.jobs)
    alive = [row for row in rows if row["outcome"] != "killed"]
    for row in alive:
        print(f"{row['what']}: {row['outcome']} ({row['test']})")
    print(f"{len(rows) - len(alive)} of {len(rows)} errors killed.")
    if not arguments.only:
        counts = {"errors": len(rows), "killed": len(rows) - len(alive)}
        write_json(
            ROOT / "benchmarks" / "results" / "mutants.json", made_by | counts | {"rows": rows}
        )
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
