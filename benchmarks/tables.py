"""Write the tables of README.md and docs/ from benchmarks/results.

  python benchmarks/tables.py

A table stands between the comments `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is one
of tables.toml, which says what a table has. The tests compare every table with its result file.
"""

import itertools
import json
import pathlib
import re
import statistics
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
         *sorted((ROOT / "docs").rglob("*.md"))]  # fmt: skip
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
SPECIFIED = tomllib.loads((ROOT / "benchmarks" / "tables.toml").read_text())
Row = Mapping[str, Any]


def load(name: str) -> Any:
    """benchmarks/results/NAME.json."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * lines[0].count(" | ") + "|---|", *lines[1:]]) + "\n"


def specified(spec: Row) -> str:
    """A table of tables.toml, which explains the keys."""
    spec = {**SPECIFIED.get(spec.get("like"), {}), **spec}
    known = {**globals(), "d": load(spec["result"]), "words": spec.get("words", {})}
    columns = [line.split(" = ", 1) for line in spec["columns"].strip("\n").split("\n")]
    heads, cells = zip(*columns, strict=True)
    rows = eval(spec["rows"], known)
    lines = [[eval(f'f"""{cell}"""', known | {**row, "r": row}) for cell in cells] for row in rows]
    if spec.get("some"):
        used = [any(column) for column in zip(*lines[1:], strict=True)]
        heads, *lines = (list(itertools.compress(line, used)) for line in (heads, *lines))
    return table(heads, lines)


# ---- functions of tables.toml --------------------------------------------------------------------


def outcome(value: Any) -> str:
    """A distance, or when the training has diverged."""
    if isinstance(value, str):
        return "diverges" + re.search(r" in step \d+", value)[0]
    return f"{value:.4f}" if value < 1 else f"{value:.1f}"


def marked(row: Row) -> str:
    """A sign at rows that were made with uncommitted changes."""
    return " †" if "dirty" in row.get("revision", "") else ""


def of_test(result: Row) -> list[Row]:
    """The rows of the test set."""
    return [row for row in result["rows"] if row["set"] == "test"]


def beside_dapper(rows: Iterable[Row], on_few: Iterable[Row]) -> list[Row]:
    """Rows of regimes with texts of dapper's method of the lowest RMSE, and of it on as many."""
    found, baselines = [], load("assimilation_baselines")
    none = dict.fromkeys(("method", "rmse", "rmse_second_half", "spread_skill", "seconds"), "")
    for row in sorted(rows, key=lambda row: row["system"], reverse=True):
        if row["task"] not in ("forecast", "known") and "method" not in row:
            theirs = [r for r in baselines[f"dapper_{row['system']}"]["rows"]
                      if (r["set"], r["regime"]) == ("test", row["task"])]  # fmt: skip
            best = min(theirs, key=lambda r: r["rmse"], default=none)
            key = {name: row[name] for name in ("system", "task", "trajectories")}
            same = next((r for r in on_few if key.items() <= r.items()), best)
            two = lambda r: {k: f"{x:.2f}" if type(x) is float else x for k, x in r.items()}  # noqa: E731
            each = {"seconds": f" / {best['seconds'] / 16:.1f}" if theirs else ""}
            found.append({**row, "dapper": two(best) | each, "same": two(same)})
    return found


def against_torch(row: Row) -> str:
    speed = row["images_per_second"]
    torch = max(value for name, value in speed.items() if name.startswith("torch"))
    return f"{speed['ours']:.3g} / {torch:.3g} = {row['ours_over_torch']:.2f}x"


def transposed_speeds(rows: list[Row]) -> list[Row]:
    """A row for each candidate, with its speeds in all of the rows."""
    names = dict.fromkeys(name for row in rows for name in row["images_per_second"])
    speeds = {name: [row["images_per_second"].get(name) for row in rows] for name in names}
    return [{"name": name, "speeds": [f"{x:.3g}" if x else "" for x in values]}
            for name, values in speeds.items()]  # fmt: skip


def memory(row: Row) -> str:
    """GiB that a compiled program needs, of those of the chip."""
    memory, chip = row["memory_per_chip_bytes"]["peak"], row["chip_memory_bytes"]
    needed = "more" if memory is None else f"{memory / 2**30:.2g}"
    return f"{needed} / {chip / 2**30:.4g}{'' if row['fits'] else ': does not fit'}"


def compiled_peak(row: Row) -> str:
    """GiB that the compiler needs on a chip, where the case was compiled."""
    key = {name: row[name] for name in ("name", "topology")}
    found = [r for r in load("compiled")["rows"] if key.items() <= r.items()]
    return f"{found[0]['memory_per_chip_bytes']['peak'] / 2**30:.2g}" if found else ""


def steps_on_a_card(rows: list[Row]) -> list[Row]:
    """Training steps, before and after what docs/devices.md says of them."""
    made = {(row["section"], row["name"]): row for row in rows}
    found: list[Row] = []
    for name in ("DiT-XL/2", "DiT-B/2", "CIFAR-10 U-Net"):
        before, after = made["throughput", name], made.get(("layouts", name), {})
        old = "scanned, XLA's attention, before" if after else "unchanged"
        steps = [(before, "dsm", f"{old}: DSM"), (before, "mclr", f"{old}: MCLR"),
                 (after, "ours", "now: DSM"), (after, "scanned", "scanned: DSM"),
                 (after, "XLA's attention", "XLA's attention: DSM")]  # fmt: skip
        found += [{**row, "step": row[k], "text": text} for row, k, text in steps if k in row]
    return found


# ---- methods on images ---------------------------------------------------------------------------

# Factor and digits of the numbers of a set of images
QUALITY = {"frechet": (1, 3), "accuracy": (100, 1), "per_class_frechet": (1, 2),
           "precision": (1, 3), "recall": (1, 3), "network_calls": (1, 0), "density": (1, 2),
           "coverage": (1, 2), "step_cost_relative_to_dsm": (1, 1),
           "step_flops_relative_to_dsm": (1, 1)}  # fmt: skip
SPREAD = ("frechet", "accuracy")  # shown with their standard deviation over seeds


def quality(row: Row, key: str) -> str:
    """A cell of a row of results, with the standard deviation over seeds where it has one."""
    scale, digits = QUALITY[key]
    cell = f"{scale * row[key]:.{digits}f}" if key in row else ""
    if key in SPREAD and f"{key}_std" in row:
        cell += f" ± {scale * row[f'{key}_std']:.{digits}f}"
    return cell


EQUAL = [0.8, 1.5]  # noise levels of every method of the comparison at equal noise
SECOND = "efficientnet_lite0"  # key of what the second judge says
RATE = ", learning rate x "  # after it a factor, in names of methods


def _second(rows: list[dict]) -> str:
    """Mean FD of those rows that the second judge has seen."""
    found = [row[SECOND]["frechet"] for row in rows if SECOND in row]
    return f"{statistics.mean(found):.1f}" if found else ""


def rivals(result: Row, chosen: Iterable = (), equal: bool = False, every: bool = False) -> list:
    """The floor, then each method at the strength of its best mean FD, or at every strength.

    `chosen` are methods, by default all; `equal` asks for the rows at equal noise. Only strengths
    with as many seeds as any of the method have are compared.
    """
    rows = [{"method": name, **row} for name in chosen or result["methods"] if RATE not in name
            for row in result["methods"][name] if (row["noise"] == EQUAL) == equal]  # fmt: skip
    floor, *means = over_seeds({"floor": result["floor"], "rows": rows}, "method", "strength")
    found = [{**floor, "method": "real, held out: the floor", "strength": ""}]
    for method in dict.fromkeys(row["method"] for row in means):
        own = [row for row in means if row["method"] == method]
        seeds = max(row["seeds"] for row in own)
        own = sorted((r for r in own if r["seeds"] == seeds), key=lambda r: r["strength"])
        found += own if every else [min(own, key=lambda row: row["frechet"])]
    return found


def named(method: str) -> str:
    """A method's name, as code if it is the name of an objective."""
    is_plain = not method.islower() or " " in method or method == "autoguidance"
    return method if is_plain else f"`{method}`"


def at_best(rows: list[Row]) -> str:
    """FD, FD by class and strength of the row of the lowest FD; empty without rows."""
    best = min(rows, key=lambda row: row["frechet"], default={})
    distances = (quality(best, key) for key in ("frechet", "per_class_frechet"))
    return " / ".join([*distances, f"{best['strength']:g}"]) if best else ""


def over_seeds(result: Row, *by: str) -> list[Row]:
    """The floor, and the means with their standard deviations over seeds, by default by method."""
    floor = result["floor"]
    found: list[Row] = [{**floor, "method": "floor", "second": _second([floor])}]
    by = by or ("method",)
    for same in dict.fromkeys(tuple(row[key] for key in by) for row in result["rows"]):
        rows = [row for row in result["rows"] if tuple(row[key] for key in by) == same]
        several = {k: [r[k] for r in rows] for k, x in rows[0].items() if type(x) in (int, float)}
        mean = {k: statistics.mean(values) for k, values in several.items()}
        spread = {f"{k}_std": statistics.stdev(v) for k, v in several.items() if len(rows) > 1}
        found.append({**mean, **spread, **dict(zip(by, same, strict=True)), "seeds": len(rows),
                      "second": _second(rows)})  # fmt: skip
    return found


def transferred(found: Row, of: Callable) -> list[Row]:
    """The floor, the images of training, and means over seeds, at a strength of each method.

    `of` is min for that of the lowest FD, max for the one that was chosen by its accuracy, if
    another. `beyond` is the difference of the FD from that of plain fine-tuning of the same seed.
    """
    floor, subset, *rows = found["rows"]
    rows = [row for row in rows if row["seed"] in found["seeds"]]
    plain = {row["seed"]: row for row in rows if row["method"] == "plain"}
    rows = [{**row, "beyond": row["frechet"] - plain[row["seed"]]["frechet"]} for row in rows]
    means = over_seeds({"floor": floor, "rows": rows}, "method", "strength")
    strengths: dict[str, set[float]] = {}
    for row in means[1:]:
        strengths.setdefault(row["method"], set()).add(row["strength"])
    kept = [row for row in means[1:] if row["strength"] == of(strengths[row["method"]])]
    if of is max:
        several = {method for method, own in strengths.items() if len(own) > 1} | {"plain"}
        kept = [row for row in kept if row["method"] in several]
    return [means[0], {**subset, "second": _second([subset])}, *kept]


def along_training(result: Row, name: str) -> str:
    """The readings of ICR in a training on a number of images, and its copies."""
    (found,) = (claim for text, claim in result["claims"].items() if f"with {name}" in text)
    rows = result["curves"][f"images_{name.split()[0]}"]
    copies = f"{100 * found['memorized_at_the_end']:.1f}% copies at the end"
    if first := found["first_step_with_memorized_samples"]:
        seen = next(row for row in rows if row["memorized"])
        copies = (f"{seen['memorized']:.1%} copies at {seen['step']:,}, 1% or more from {first:,} "
                  f"on, {copies}")  # fmt: skip
    warning = f"warning at {step:,}" if (step := found["step_of_warning"]) else "no warning"
    steps = rows[-1]["step"]
    return f"lowest at step {found['step_of_minimum']:,} of {steps:,}, {warning}, {copies}"


def beside_control(row: Row, key: str, scale: float, digits: int) -> str:
    """The control's mean over seeds, or the difference from it, with its standard error."""
    name, sign = (key, "") if row["method"] == "DSM control" else (f"{key}_difference", "+")
    return f"{scale * row[name]:{sign}.{digits}f} ± {scale * row[f'{name}_error']:.{digits}f}"


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return TABLE.sub(lambda match: match[1] + specified(SPECIFIED[match[2]]), text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
