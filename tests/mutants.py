"""Insert errors into the code, one at a time, and run the tests that must fail.

  python tests/mutants.py [--only=TEXT] [--jobs=2]

tests/mutants.toml lists the errors: file, text to replace (it occurs once), new text, and the
test. Each error is tried in a copy of the tree; it is killed if its test fails, and it counts as
survived if the test passes or cannot be run. All tests must pass without errors first. Writes
benchmarks/results/mutants.json (not with --only) and exits with status 1 if an error survives.

Outcomes are kept as they come: a run that was interrupted goes on where it stopped, unless the tree
is dirty, which has no name. Tests run in forks of this process, which has imported the libraries.
"""

import argparse
import hashlib
import importlib
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from typing import Any

import conftest  # sets what JAX reads when it is imported
import pytest

from mclr_jax.files import append, provenance, write_json

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("mclr_jax", "launch", "configs", "tests", "benchmarks", "docs", "notebooks",
          "pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
          "CITATION.cff", "LICENSE")  # fmt: skip
LIBRARIES = ("chex", "flax.linen", "grain", "hypothesis", "jax.experimental.multihost_utils",
             "optax", "orbax.checkpoint", "scipy.stats", "sklearn.utils",
             "tensorboardX")  # fmt: skip
KEPT = conftest.CACHE.parent / "mutants.jsonl"  # outcomes of all revisions
SECONDS = 900  # after which a test is stopped: the error may have made an endless loop


def copied(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the tree, with the checkout's cache of compiled programs."""
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    (folder / ".pytest_cache").symlink_to(KEPT.parent)
    return folder


def start(root: pathlib.Path, test: str) -> int:
    """The number of a process that runs a test in a copy, and exits with pytest's status."""
    if process := os.fork():
        return process
    signal.alarm(SECONDS)  # ends the process
    os.chdir(root)
    sys.path[:] = [path for path in sys.path if path != str(ROOT / "tests")]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("mclr_jax", "conftest")]:
        del sys.modules[name]  # those of the copy are imported
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir=.", test]))


def insert(mutant: dict, root: pathlib.Path) -> str:
    """Replace the text of an error in a copy; why that was not possible, or nothing."""
    if "file" not in mutant:  # the tests without errors
        return ""
    text = (ROOT / mutant["file"]).read_text()
    if text.count(mutant["old"]) != 1:
        return f"the old text occurs {text.count(mutant['old'])} times in {mutant['file']}"
    (root / mutant["file"]).write_text(text.replace(mutant["old"], mutant["new"]))
    return ""


def outcomes(mutants: list[dict], jobs: int) -> Iterator[dict]:
    """Each error with its outcome, as they come; of `jobs` at a time."""
    left, running = list(mutants), {}
    with tempfile.TemporaryDirectory() as folder:
        free = [copied(pathlib.Path(folder) / str(number)) for number in range(jobs)]
        while left or running:
            while left and free:
                mutant, root = left.pop(0), free.pop()
                if reason := insert(mutant, root):
                    free.append(root)
                    yield {**mutant, "outcome": f"not tried: {reason}"}
                else:
                    running[start(root, mutant["test"])] = mutant, root
            if running:
                process, status = os.wait()
                mutant, root = running.pop(process)
                if "file" in mutant:  # with its time, at which Python knows the compiled file
                    shutil.copy2(ROOT / mutant["file"], root / mutant["file"])
                free.append(root)
                code = os.waitstatus_to_exitcode(status)
                known = {0: "survived", 1: "killed"}
                yield {**mutant, "outcome": known.get(code, f"not tried: pytest's status {code}")}


def identity(mutant: dict, revision: str) -> str:
    """Names an error, or a test without one, and the code in which it was tried."""
    told = {key: value for key, value in mutant.items() if key != "outcome"}
    return hashlib.sha256(json.dumps([told, revision], sort_keys=True).encode()).hexdigest()


def complete(mutants: list[dict], revision: str, jobs: int) -> list[dict]:
    """The rows of all errors in their order: those kept, and new ones, which are kept."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    rows = [] if revision.endswith("-dirty") else map(json.loads, lines)
    done: dict[str, Any] = {row.pop("identity"): row for row in rows}
    names = [identity(mutant, revision) for mutant in mutants]
    left = [mutant for mutant, name in zip(mutants, names, strict=True) if name not in done]
    for row in outcomes(left, jobs):
        words = {"survived": "passes", "killed": "fails"} if "what" not in row else {}
        told = words.get(row["outcome"], row["outcome"])
        print(f"{told:9s} {row.get('what', row['test'])}", flush=True)
        done[name := identity(row, revision)] = row
        append(KEPT, json.dumps(row | {"identity": name}) + "\n")
    return [done[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="errors whose description has this text")
    parser.add_argument("--jobs", type=int, default=2, help="errors at a time")
    arguments = parser.parse_args()
    everything = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    chosen = [mutant for mutant in everything if arguments.only in mutant["what"]]
    made_by, jobs = provenance(), arguments.jobs
    for name in LIBRARIES:
        importlib.import_module(name)
    tests = [{"test": test} for test in dict.fromkeys(mutant["test"] for mutant in chosen)]
    plain = complete(tests, made_by["revision"], jobs)
    if failed := [row["test"] for row in plain if row["outcome"] != "survived"]:
        sys.exit(f"These tests fail without any error: {' '.join(failed)}")
    rows = complete(chosen, made_by["revision"], jobs)
    alive = [row for row in rows if row["outcome"] != "killed"]
    for row in alive:
        print(f"{row['what']}: {row['outcome']} ({row['test']})")
    print(f"{len(rows) - len(alive)} of {len(rows)} errors killed.")
    if not arguments.only:
        made_by |= {"errors": len(rows), "killed": len(rows) - len(alive)}
        write_json(ROOT / "benchmarks" / "results" / "mutants.json", made_by | {"rows": rows})
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
