"""Insert errors into the code, one at a time, and run the tests that must fail.

  python tests/mutants.py [--only=TEXT] [--jobs=2]

tests/mutants.toml lists the errors: file, text to replace (it occurs once), new text, and the
test. Each error is tried in a copy of the tree; it is killed if its test fails, and it counts as
survived if the test passes or cannot be run. All tests must pass without errors first. Writes
benchmarks/results/mutants.json (not with --only) and exits with status 1 if an error survives.
"""

import argparse
import concurrent.futures
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

from mclr_jax.files import provenance, write_json

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("mclr_jax", "launch", "configs", "tests", "benchmarks", "docs", "notebooks",
          "pyproject.toml", "setup.py", "README.md")  # fmt: skip


def pytest(root: pathlib.Path, tests: list[str]) -> tuple[int, str]:
    """Exit status and the last line of the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return run.returncode, (run.stdout.strip().splitlines() or [run.stderr])[-1]


def copied(folder: str) -> pathlib.Path:
    """A copy of the tree in a folder."""
    root = pathlib.Path(folder)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    return root


def attempt(mutant: dict) -> dict:
    """What became of one error."""
    text = (ROOT / mutant["file"]).read_text()
    if text.count(mutant["old"]) != 1:
        found = f"the old text occurs {text.count(mutant['old'])} times in {mutant['file']}"
        return {**mutant, "outcome": f"not tried: {found}"}
    with tempfile.TemporaryDirectory() as folder:
        root = copied(folder)
        (root / mutant["file"]).write_text(text.replace(mutant["old"], mutant["new"]))
        status, last = pytest(root, [mutant["test"]])
    outcome = {0: "survived", 1: "killed"}.get(status, f"not tried: pytest said {last}")
    print(f"{outcome:9s} {mutant['what']}", flush=True)
    return {**mutant, "outcome": outcome}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="errors whose description has this text")
    parser.add_argument("--jobs", type=int, default=2, help="errors at a time")
    arguments = parser.parse_args()
    everything = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    chosen = [mutant for mutant in everything if arguments.only in mutant["what"]]
    status, last = pytest(ROOT, sorted({mutant["test"] for mutant in chosen}))
    if status:
        sys.exit(f"The tests fail without any error: {last}")
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(attempt, chosen))
    alive = [row for row in rows if row["outcome"] != "killed"]
    for row in alive:
        print(f"{row['what']}: {row['outcome']} ({row['test']})")
    print(f"{len(rows) - len(alive)} of {len(rows)} errors killed.")
    if not arguments.only:
        made_by = provenance() | {"errors": len(rows), "killed": len(rows) - len(alive)}
        write_json(ROOT / "benchmarks" / "results" / "mutants.json", {**made_by, "rows": rows})
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
