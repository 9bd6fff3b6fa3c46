"""What one GPU or TPU says about this project; each result is stored when it is measured.

  python benchmarks/accelerator.py --out=accelerator.json                     # at most 20 minutes
  python benchmarks/accelerator.py --out=accelerator.json --only=parity,torch
  python benchmarks/accelerator.py --out=tiny.json --tiny                     # any machine

It needs jax, flax, optax, ml_collections, Pillow and NumPy, the section `torch` also PyTorch. Run
again, it makes the rows that are missing or have failed. Each section runs in a process of its own,
and each row of `throughput`, `layouts` and `rivals`, so that its peak of memory is its own; a
process that dies leaves the other rows. docs/results/h200.md explains the sections.
"""

import argparse
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import tasks

from mclr_jax.files import provenance, write_json
from mclr_jax.schema import nearest

SECTIONS = ("parity", "throughput", "plan", "torch", "sampling", "resume", "objectives", "layouts",
            "rivals")  # in the order of their value, if time ends  # fmt: skip
ALONE = ("throughput", "layouts", "rivals")  # a process for each row
SHOWN = ("passed", "batch_size", "over_first", "skipped", "error")  # of a row, when it is made
ONLY_CPU = ("JAX found no accelerator, only the CPU. Install JAX for yours (pip install 'jax[tpu]' "
            "or 'jax[cuda12]'), or try small shapes on the CPU with --tiny.")  # fmt: skip
NO_DEVICE, AGAIN = 2, 3  # exit statuses of the process of a section
SCRIPT = __file__


def inside(sections: list[str], out: pathlib.Path, tiny: bool, row_name: str, session: str) -> int:
    """Make the missing rows of these sections in this process; its exit status."""
    if (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms:
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # the CPU has the reference
    share = 0.45 if "torch" in sections else 0.92  # of the GPU's memory; PyTorch needs some
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(share))
    if sections == ["resume"]:  # bits are compared: by default, sums on GPUs have no fixed order
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    import accelerator_sections as measured
    import alternation
    import jax

    from mclr_jax.cpu import keep_compiled

    keep_compiled()
    if jax.default_backend() == "cpu" and not tiny:
        print(ONLY_CPU, file=sys.stderr)
        return NO_DEVICE
    made_by = {**provenance(), **versions()}
    every = measured.all_rows(measured.TINY if tiny else measured.FULL)
    for section in sections:
        for name, function in every[section].items():
            if not name.startswith(row_name):
                continue
            asked = {"section": section, "name": name}
            stored = read(out)
            row = tasks.made(stored, asked)
            if row and (not row.keys() & {"error", "skipped"} or row["session"] == session):
                continue
            begun = {**asked, "session": session, **made_by}
            store(out, {**begun, "error": "the process ended before the result was there"})
            start = time.perf_counter()
            try:
                found = function(stored)
            except Exception as error:
                found = {"error": alternation.first_lines(error)}
            seconds = round(time.perf_counter() - start, 2)
            store(out, {**begun, **found, "seconds_of_row": seconds})
            shown = {key: found[key] for key in SHOWN if key in found} or found
            print(f"{section}, {name} ({seconds} s): {str(shown)[:400]}", flush=True)
            if section in ALONE and not tiny:
                return AGAIN
    return 0


def versions() -> dict[str, str]:
    """The device and the versions of what computes."""
    from importlib.metadata import version

    import jax

    device = jax.devices()[0]
    parts = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    system = str(getattr(device.client, "platform_version", device.platform))
    return {"device": device.device_kind, "platform": system,
            "python": platform.python_version(), **parts}  # fmt: skip


def read(out: pathlib.Path) -> list[dict[str, Any]]:
    """The rows that are stored."""
    return tasks.Rows(out).content()["rows"]


def store(out: pathlib.Path, row: dict[str, Any]) -> None:
    """Add a row, in place of the one with its section and name."""
    key = {name: row[name] for name in ("section", "name")}
    write_json(out, {"rows": [*(r for r in read(out) if not key.items() <= r.items()), row]})


def good(row: Mapping[str, Any]) -> bool:
    """Whether nothing is wrong with a row: no error, also of a part, and no tolerance exceeded."""
    parts = [part for part in row.values() if isinstance(part, dict)]
    return row.get("passed", True) and not any("error" in part for part in (row, *parts))


def outside(flags: argparse.Namespace, session: str) -> int:
    """Run the sections as processes; the exit status of this one."""
    end = time.monotonic() + 60 * flags.minutes
    for section in flags.only:
        options = [f"--out={flags.out}", f"--only={section}", f"--row={flags.row}"]
        command = [sys.executable, SCRIPT, *options, f"--inside={session}"]
        status, tried = AGAIN, -1
        while status:
            own = sum(row["session"] == session for row in read(flags.out))
            if status != AGAIN and own == tried:
                break  # it died before it began a row
            tried, left = own, max(end - time.monotonic(), 0.01)
            try:
                status = subprocess.run(command, timeout=left).returncode
            except subprocess.TimeoutExpired:
                print(f"{flags.minutes:g} minutes are over; the same command continues.")
                return 1
            if status == NO_DEVICE:
                return status
            if status not in (0, AGAIN):
                print(f"The process of {section} ended with status {status}.", flush=True)
    return 0


def chosen(text: str) -> list[str]:
    """Names of sections, in the order of SECTIONS."""
    asked = text.split(",")
    for name in asked:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"no section {name!r}. {nearest(name, SECTIONS)}")
    return [name for name in SECTIONS if name in asked]


def result_file(text: str) -> pathlib.Path:
    """The file of --out."""
    path = pathlib.Path(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a name that ends in .json")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=result_file, required=True, help="file to write, NAME.json")
    parser.add_argument("--only", type=chosen, default=list(SECTIONS), metavar="SECTION,...",
                        help=", ".join(SECTIONS))  # fmt: skip
    parser.add_argument("--row", default="", help="beginning of the names of rows")
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on the CPU")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which to stop")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    session = args.inside or f"{time.time():.3f}"
    if args.inside:
        return inside(args.only, args.out, args.tiny, args.row, session)
    if args.tiny:
        status = inside(args.only, args.out, True, args.row, session)
    else:
        status = outside(args, session)
    rows = [row for row in read(args.out) if row["section"] in args.only]
    bad = [f"{row['section']}, {row['name']}" for row in rows if not good(row)]
    if bad:
        print(f"{len(bad)} of {len(rows)} rows have errors: {'; '.join(bad)}", flush=True)
    return status or bool(bad)


if __name__ == "__main__":
    sys.exit(main())
