"""Odd and hostile input: every use must work, warn, or end in an error of this project's own.

  python benchmarks/robustness.py    # writes benchmarks/results/robustness.json

The result counts the cases of each section by their outcome and lists every bad one: FOREIGN, an
error in the words of a library; SILENT, a wrong result without an error; LOST, a training that
could not be continued to the same weights. Sections that are not run again keep their results. The
exit status is 1 if a case is bad.

  values     10,000 configs with odd values, up to the first compiled step, which is traced
  commands   500 command lines with mistakes
  runs       500 damages of a run, which is then read, and one in 10 continued
  files      500 damaged or hostile files of data and weights
  processes  30 SIGKILLs, 10 SIGTERMs, full disks
  sequences  300 pairs and triples of uses of one directory, compared with what they claim
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import tempfile
import time

FLAGS = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_FILTERING"] = "off"  # an error is raised where its traceback ends

import outcomes  # noqa: E402
import robustness_commands as commands  # noqa: E402
import robustness_files as files  # noqa: E402
import robustness_sequences as sequences  # noqa: E402
import robustness_values as values  # noqa: E402
from tasks import RESULTS  # noqa: E402

from mclr_jax.cpu import keep_compiled  # noqa: E402
from mclr_jax.files import provenance, write_json  # noqa: E402

MEMORY = 12 * 2**30  # bytes of address space: a request for more fails, and is an outcome
# name: (cases(seed, count, folder), count, count of --quick)
SECTIONS = {
    "values": (values.cases, 10_000, 12),
    "commands": (commands.cases, 500, 4),
    "runs": (files.damaged_runs, 500, 3),
    "files": (files.damaged_files, 500, 60),
    "processes": (commands.processes, 30, 1),
    "sequences": (sequences.cases, 300, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small share of every section")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "robustness.json")
    args = parser.parse_args()
    keep_compiled()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.sections:
        cases, full, few = SECTIONS[name]
        start, count = time.time(), few if args.quick else full
        with tempfile.TemporaryDirectory() as folder:
            found = outcomes.summary(cases(args.seed, count, pathlib.Path(folder)))
        seconds = round(time.time() - start, 1)
        result[name] = {**provenance(), "seed": args.seed, "seconds": seconds, **found}
        print(name, {key: found[key] for key in found if key != "bad"}, flush=True)
        write_json(args.out, result)
    sys.exit(any(result[name]["bad"] for name in args.sections))


if __name__ == "__main__":
    main()
