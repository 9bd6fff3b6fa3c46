"""Write the tables of README.md and docs/ from benchmarks/results.

  python benchmarks/tables.py

A table stands between the comments `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a
function below. The tests compare every table with its result file.
"""

import itertools
import json
import pathlib
import re
import statistics
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def load(name: str) -> Any:
    """benchmarks/results/NAME.json."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * lines[0].count(" | ") + "|---|", *lines[1:]]) + "\n"


def digits() -> str:
    names = {"base": "unguided", "CFG": "CFG, `guidance_scale=2`", "MCLR": "MCLR, unguided"}
    return table(
        ["10 digits, 8x8", "accuracy of 500 samples, %", "network calls"],
        (
            [names[row["name"]], f"{100 * row['accuracy']:.1f}", str(row["network_calls"])]
            for row in load("demo")["table"]
        ),
    )


# ---- the mixture ---------------------------------------------------------------------------------

MIXTURE = {
    "base": "base, unguided",
    "mclr": "MCLR, negatives from the posterior",
    "half of the negatives": "... contrast at every second row (`negative_share=0.5`)",
    "a quarter of the negatives": "... contrast at every fourth row (`negative_share=0.25`)",
    "posterior from a classifier": "... posterior from a trained classifier",
    "prior negatives, weighted": "prior negatives, weighted",
    "mismatched negatives, weighted": "mismatched negatives, weighted",
    "the reference as the target": "the frozen reference as the target",
    "plain": "plain",
    "plain, beta 0.2": "plain, beta 0.2",
    "plain, clip": "plain, `bound=clip`",
    "plain, logistic": "plain, `bound=logistic`",
    "plain, reference penalty 1": "plain, `reference_penalty=1`",
    "posterior from the denoiser": "posterior from the denoiser, 4 levels, 1,500 steps",
    "posterior from the denoiser, clip": "... `bound=clip`",
}


def mixture() -> str:
    found = load("mixture_mclr")["distance_to_cfg"]

    def outcome(value: Any) -> str:
        if isinstance(value, str):
            return "diverges" + re.search(r" in step \d+", value)[0]
        return f"{value:.4f}" if value < 1 else f"{value:.1f}"

    rows = ([words, outcome(found[name])] for name, words in MIXTURE.items())
    return table(["4,000 steps, beta 1", "distance to CFG"], rows)


def mixture_by_strength() -> str:
    found = load("mixture_mclr")["by_strength"]
    kinds = {"base": "base", "input": "MCLR, strength as an input",
             "share": "MCLR beta 1, interpolation = strength"}  # fmt: skip
    rows = ([words, *(f"{row[kind]:.3f}" for row in found.values())]
            for kind, words in kinds.items())  # fmt: skip
    return table(["strength", *found], rows)


# ---- Fashion-MNIST -------------------------------------------------------------------------------

QUALITY = {"frechet": ("FD", 1, 3), "accuracy": ("accuracy, %", 100, 1),
           "per_class_frechet": ("FD by class", 1, 2), "precision": ("precision", 1, 3),
           "recall": ("recall", 1, 3), "network_calls": ("network calls", 1, 0)}  # fmt: skip
MORE = {"density": ("density", 1, 2), "coverage": ("coverage", 1, 2)}  # in later rows
SPREAD = ("frechet", "accuracy")  # shown with their standard deviation over seeds
MODELS = {
    "base": "control, unguided",
    "cfg 0.2": "control, CFG gamma 0.2",
    "cfg 0.4": "control, CFG gamma 0.4 (the best FD of six gammas)",
    "cfg 0.6": "control, CFG gamma 0.6",
    "cfg 1": "control, CFG gamma 1",
    "mclr 0.4": "MCLR beta 0.4",
    "mclr 1": "MCLR beta 1",
    "mclr strength 0.2": "MCLR, strength as an input: 0.2",
    "mclr strength 0.4": "... 0.4",
    "mclr strength 0.6": "... 0.6",
    "mclr strength 1": "... 1",
    "mclr share 0.2": "MCLR beta 1, interpolation 0.2",
    "mclr share 0.4": "... 0.4",
    "mclr share 0.6": "... 0.6",
    "mclr data": "one seed: beta 0.4, target the data",
    "mclr prior_weighted": "... prior negatives, weighted",
    "mclr dsm_noise": "... noise levels of the base",
    "mclr plain_clip": "... plain form, `bound=clip`",
}


def quality(row: dict, keys: Iterable[str]) -> list[str]:
    """Cells of a row of results, with the standard deviation over seeds where it has one."""
    cells = []
    for key in keys:
        _, scale, digits = (QUALITY | MORE)[key]
        cell = f"{scale * row[key]:.{digits}f}" if key in row else ""
        if key in SPREAD and f"{key}_std" in row:
            cell += f" ± {scale * row[f'{key}_std']:.{digits}f}"
        cells.append(cell)
    return cells


def fashion() -> str:
    result = load("fashion_mnist_mclr")
    rows = [("real, held out: the floor", result["floor"])]
    rows += [(words, result["table"][name]) for name, words in MODELS.items()]
    head = ["", *(QUALITY[key][0] for key in QUALITY)]
    return table(head, ([words, *quality(row, QUALITY)] for words, row in rows))


EQUAL = [0.8, 1.5]  # noise levels of every method of the comparison at equal noise
SECOND = "efficientnet_lite0"  # key of what the second judge says
RATE = ", learning rate x "  # after it a factor, in names of methods


def _second(rows: list[dict]) -> str:
    """Mean FD of those rows that the second judge has seen."""
    found = [row[SECOND]["frechet"] for row in rows if SECOND in row]
    return f"{statistics.mean(found):.1f}" if found else ""


def _rival_rows(
    result: dict, methods: dict[str, list[dict]], keys: list[str], every: bool
) -> Iterable:
    """The floor, then each method at the strength of its best mean FD, or at every strength.

    Only strengths with as many seeds as any of the method have are compared.
    """
    floor = result["floor"]
    yield ["real, held out: the floor", "", *quality(floor, keys), "", "", _second([floor])]
    for method, found in methods.items():
        by_strength: dict[float, list[dict]] = {}
        for row in found:
            by_strength.setdefault(row["strength"], []).append(row)
        seeds = max(map(len, by_strength.values()))
        mean = {s: {k: statistics.mean(r[k] for r in rows) for k in keys}
                for s, rows in sorted(by_strength.items()) if len(rows) == seeds}  # fmt: skip
        best = min(mean, key=lambda strength: mean[strength]["frechet"])
        plain = not method.islower() or " " in method or method == "autoguidance"
        for strength in mean if every else [best]:
            rows = by_strength[strength]
            several = {k: [r[k] for r in rows] for k in keys if len(rows) > 1}
            spread = {f"{k}_std": statistics.stdev(values) for k, values in several.items()}
            costs = (
                [r[key] for r in rows if r.get(key)]
                for key in ("step_cost_relative_to_dsm", "step_flops_relative_to_dsm")
            )
            yield [
                method if plain else f"`{method}`", f"{strength:g}",
                *quality(mean[strength] | spread, keys),
                *(f"{statistics.mean(cost):.1f}" if cost else "" for cost in costs), _second(rows),
            ]  # fmt: skip


def _rivals(data: str, chosen: Iterable[str] = (), equal: bool = False, every: bool = False) -> str:
    result, methods = load(f"guidance_free_{data}"), {}
    for name in chosen or (name for name in result["methods"] if RATE not in name):
        if rows := [r for r in result["methods"][name] if (r["noise"] == EQUAL) == equal]:
            methods[name] = rows
    keys = [key for key in QUALITY if equal or key != "per_class_frechet"]
    keys += [key for key in MORE if all(key in row for rows in methods.values() for row in rows)]
    head = ["method", "strength", *((QUALITY | MORE)[k][0] for k in keys), "step cost",
            "step, FLOPs", "FD, ImageNet"]  # fmt: skip
    floor, *rows = _rival_rows(result, methods, keys, every)
    measured = [any(column) for column in zip(*rows, strict=True)]
    head, *lines = (list(itertools.compress(row, measured)) for row in (head, floor, *rows))
    return table(head, lines)


def rivals() -> str:
    return _rivals("fashion_mnist")


def rivals_digits() -> str:
    return _rivals("digits")


def equal_noise() -> str:
    return _rivals("fashion_mnist", equal=True)


def equal_noise_40000() -> str:
    return _rivals("fashion_mnist_40000", equal=True, every=True)


def equal_noise_digits() -> str:
    return _rivals("digits", equal=True)


def equal_noise_two_digits() -> str:
    return _rivals("two_digits", equal=True)


def equal_noise_6000() -> str:
    return _rivals("fashion_mnist_6000", equal=True, every=True)


def equal_noise_digits_1000() -> str:
    return _rivals("digits_1000", equal=True, every=True)


def learning_rates() -> str:
    """FD and FD by class at the strength of the best FD, by the learning rate; one seed."""
    methods = load("guidance_free_fashion_mnist_6000")["methods"]

    def cell(name: str) -> str:
        if name not in methods:
            return ""
        best = min(methods[name], key=lambda row: row["frechet"])
        return " / ".join([*quality(best, ("frechet", "per_class_frechet")),
                           f"{best['strength']:g}"])  # fmt: skip

    searched = dict.fromkeys(name.partition(RATE)[0] for name in methods if RATE in name)
    rates = ["", f"{RATE}2", f"{RATE}4"]
    head = ["FD / FD by class / strength", "the config's rate", "twice", "four times"]
    return table(head, ([name, *(cell(name + rate) for rate in rates)] for name in searched))


def comparison() -> str:
    chosen = ["DSM control", "CFG", "CFG in an interval", "model_guidance", "cca",
              "mclr null and wrong label, beta 0.5", "mclr null, beta 1"]  # fmt: skip
    return _rivals("fashion_mnist_40000", chosen, equal=True)


# ---- ICR -----------------------------------------------------------------------------------------


def icr() -> str:
    result = load("icr_fashion_mnist")
    noise, probe, rises, *training, cost = result["claims"].values()
    lowest = ", ".join(f"{value:.4f}" for value in rises["by_sigma"][:3])
    rows = [
        ["ICR is lowest at an intermediate noise level", "yes",
         f"{noise['minimum']:.3f} at sigma {noise['sigma_of_minimum']}; at the lowest level "
         f"{noise['at_lowest_sigma']:.3f}, at the highest {noise['at_highest_sigma']:.3f}"],
        ["a linear probe is best near that level", "yes",
         f"{100 * probe['peak']:.1f}% at sigma {probe['sigma_of_peak']}, "
         f"{100 * probe['accuracy_at_minimum_of_icr']:.1f}% at the minimum of ICR"],
        ["after memorization ICR rises from the lowest noise level", "no",
         f"256 images: {lowest} at the three lowest levels"],
    ]  # fmt: skip
    verdicts = {"images_256": "in part", "images_1024": "false alarm", "images_4096": "no",
                "images_all": "not tested"}  # fmt: skip
    for (name, verdict), found in zip(verdicts.items(), training, strict=True):
        count, steps = name.removeprefix("images_"), result["curves"][name][-1]["step"]
        copies = f"{100 * found['memorized_at_the_end']:.1f}% copies at the end"
        if first := found["first_step_with_memorized_samples"]:
            copies = f"first copies at {first:,}, " + copies
        warning = found["step_of_warning"]
        rows.append([
            f"ICR turns up before copies appear: {count} images" if count != "all" else
            "ICR does not turn up with many images: 60,000", verdict,
            f"lowest at step {found['step_of_minimum']:,} of {steps:,}, "
            f"{f'warning at {warning:,}' if warning else 'no warning'}, {copies}"
        ])  # fmt: skip
    share = (
        f"{100 * cost['share_of_training']:.1f}% with a reading every {cost['every_steps']:,} steps"
    )
    rows.append(["a monitor costs less than 3% of training", "yes", share])
    return table(["claim", "found", "numbers"], rows)


# ---- assimilation --------------------------------------------------------------------------------


def assimilation() -> str:
    """The trajectory model and the particle filter on Lorenz-63, test trajectories."""
    rows = [row for row in load("lorenz63")["rows"] if row["set"] == "test"]
    names = {"filter": "filter", "lag16": "fixed lag 16", "batch": "batch",
             "batch_norm": "batch, `norm`"}  # fmt: skip
    head = ["protocol", "regime", "RMSE", "particle filter", "ratio", "spread/skill", "CRPS",
            "ranks"]  # fmt: skip
    keys = ("rmse", "particle_filter_rmse", "ratio", "spread_skill", "crps")

    def line(row):
        inflation = row["plan"].get("inflation")
        name = names[row["regime"]] + (f", inflated by {inflation:.2f}" if inflation else "")
        uneven = sum(abs(share - 1 / len(row["ranks"])) for share in row["ranks"]) / 2
        return [row["protocol"], name, *(f"{row[key]:.2f}" for key in keys), f"{uneven:.2f}"]

    order = ["lo", "hi", "flowdas"], [*names]
    rows.sort(key=lambda r: (order[0].index(r["protocol"]), order[1].index(r["regime"])))
    return table(head, map(line, rows))


SYSTEMS = {"lorenz96": "Lorenz-96", "ks": "Kuramoto-Sivashinsky"}


def fields() -> str:
    """The trajectory model, and dapper's method of the lowest RMSE, on test trajectories."""
    result, baselines, lines = load("forcing_fields"), load("assimilation_baselines"), []
    for row in sorted(result["rows"], key=lambda row: row["system"], reverse=True):
        system, task = row["system"], row["task"]
        if row["set"] != "test" or task in ("forecast", "known"):
            continue
        rows = [r for r in baselines[f"dapper_{system}"]["rows"]
                if (r["set"], r["regime"]) == ("test", task)]  # fmt: skip
        best = min(rows, key=lambda r: r["rmse"], default={})
        key = {name: row[name] for name in ("system", "task", "trajectories")}
        same = [r for r in result["dapper"] if key.items() <= r.items()]
        theirs = same[0] if same else best
        numbers = [row["rmse"], theirs.get("rmse"), row["rmse_second_half"],
                   theirs.get("rmse_second_half"), row["spread_skill"], best.get("spread_skill"),
                   row["crps"]]  # fmt: skip
        seconds = f"{row['seconds'] / row['trajectories']:.0f}"
        if best:
            seconds += f" / {best['seconds'] / 16:.1f}"
        cells = ["" if x is None else f"{x:.2f}" for x in numbers]
        name = best["method"].split("(")[0] if best else ""
        lines.append([SYSTEMS[system], task, name, *cells, seconds])
    head = ["system", "regime", "dapper's method", "RMSE", "dapper", "second half", "dapper",
            "spread/skill", "dapper", "CRPS", "seconds a trajectory / dapper"]  # fmt: skip
    return table(head, lines)


def forecasts() -> str:
    """RMSE of forecasts of Lorenz-96 by frames after the last observation."""
    rows = [r for r in load("forcing_fields")["rows"]
            if r["set"] == "test" and r["task"] in ("forecast", "known")]  # fmt: skip
    leads = (1, 4, 8, 16, 32, 64)
    names = {2: "one step at a time", 32: "trajectories of 32 frames"}
    body = [
        [f"1 of {r['every']}" if r["task"] == "forecast" else "true state of one frame",
         names[r["frames"]], f"{r.get('observed_rmse', 0):.2f}",
         *(f"{r['rmse_by_frame'][lead - 69]:.2f}" for lead in leads), f"{r['climatology']:.2f}",
         f"{r['crps']:.2f}"]
        for r in rows
    ]  # fmt: skip
    head = ["observed", "model", "observed frames", *(f"{lead} ahead" for lead in leads),
            "no skill", "CRPS"]  # fmt: skip
    return table(head, body)


def linear_gaussian() -> str:
    """Exact denoiser and trained network on the linear-Gaussian process, against Kalman."""
    names = {"filter": "filter", "fixed_lag": "fixed lag 3", "batch": "batch"}
    head = ["regime", "denoiser", "distance of the mean", "spread ratio", "RMSE ratio"]
    body = ([names[r["regime"]], r["model"],
             *(f"{r[key]:.2f}" for key in ("error", "spread", "rmse_ratio"))]
            for r in load("linear_gaussian")["rows"])  # fmt: skip
    return table(head, body)


def navier_stokes() -> str:
    """The trajectory model and optimal interpolation on Navier-Stokes, test trajectories."""
    rows = [row for row in load("navier_stokes")["rows"] if row["set"] == "test"]
    cells = {(r["operator"], r["regime"], r["method"]): r for r in rows}
    names = {"frame": "one frame", "filter": "filter", "lag8": "fixed lag 8", "batch": "batch"}
    words = {"model": "model", "interpolation": "optimal interpolation"}
    keys = ("nrmse", "standardised", "crps", "spread_skill")
    head = ["observations", "regime", "method", "NRMSE", "RMSE", "CRPS", "spread/skill", "seconds"]
    found = (
        [operator, names[regime], words[method], *(f"{row[key]:.2f}" for key in keys),
         f"{row['seconds']:.1f}"]
        for operator in ("random", "downsample") for regime in names for method in words
        if (row := cells.get((operator, regime, method)))
        and (method == "model" or regime in ("frame", "batch"))
    )  # fmt: skip
    return table(head, found)


# ---- speed ---------------------------------------------------------------------------------------


def throughput() -> str:
    cells: dict[tuple, str] = {}
    for row in load("throughput")["rows"]:
        speed = row["images_per_second"]
        torch = max(value for name, value in speed.items() if name.startswith("torch"))
        ratio = f"{speed['ours']:.3g} / {torch:.3g} = {row['ours_over_torch']:.2f}x"
        cells[row["task"], row["threads"], row["model"]] = ratio
    words = {"training": "training", "sampling": "18 Heun steps"}
    rows = ([f"{words[task]}, {threads} thread{'s'[: threads - 1]}",
             cells[task, threads, "unet"], cells[task, threads, "dit"]]
            for task in words for threads in (1, 2))  # fmt: skip
    return table(["images/s, ours / PyTorch's best", "EDM U-Net, 1.75M", "DiT, 4.2M"], rows)


def settings() -> str:
    rows = [row for row in load("throughput")["rows"] if row["task"] == "training"]
    names = dict.fromkeys(name for row in rows for name in row["images_per_second"])
    heads = ({"unet": "U-Net", "dit": "DiT"}[row["model"]] + f", {row['threads']} thread"
             + "s"[: row["threads"] - 1] for row in rows)  # fmt: skip
    body = ([name, *(f"{v:.3g}" if (v := row["images_per_second"].get(name)) else ""
                     for row in rows)] for name in names)  # fmt: skip
    return table(["training, images/s", *heads], body)


def _memory(row: dict) -> str:
    """GiB that a compiled program needs, of those of the chip."""
    memory, chip = row["memory_per_chip_bytes"]["peak"], row["chip_memory_bytes"]
    needed = "more" if memory is None else f"{memory / 2**30:.2g}"
    return f"{needed} / {chip / 2**30:.4g}{'' if row['fits'] else ': does not fit'}"


def compiled() -> str:
    """What steps cost on TPUs and GPUs, by their compilers."""

    def line(row: dict) -> list[str]:
        exchanged = sum(each["bytes"] for each in row["collectives"].values())
        return [
            row["name"], f"{row['topology']}, `{row['parallel']}`",
            f"{row['parameters'] / 1e6:.3g}", _memory(row),
            f"{row['flops_per_step'] / 1e12:.2g}", f"{exchanged / 2**20:.3g}",
            f"{1000 * row['roofline']['seconds_per_step']:.2g}", f"{row['device_hours']:.2g}",
            f"{row['compile_seconds']:.0f}",
        ]  # fmt: skip

    head = ["config", "chips", "parameters, M", "memory / chip's, GiB", "TFLOP", "collectives, MiB",
            "ms at least", "chip-hours at least", "compilation, s"]  # fmt: skip
    return table(head, map(line, load("compiled")["rows"]))


def sampled() -> str:
    """What drawing samples costs on TPUs and GPUs, by their compilers."""

    def line(row: dict) -> list[str]:
        each, scale = row["thousand_samples"], row["guidance_scale"]
        return [
            row["name"], row["topology"], str(row["batch_size"]),
            "none" if scale == 1 else f"CFG, {scale:g}", str(each["network_calls"]),
            _memory(row), f"{each['flops'] / 1e15:.2g}", f"{each['chip_seconds']:.2g}",
            f"{row['compile_seconds']:.0f}",
        ]  # fmt: skip

    head = ["config", "chips", "at once", "guidance", "network calls", "memory / chip's, GiB",
            "PFLOP / 1,000", "chip-seconds / 1,000, at least", "compilation, s"]  # fmt: skip
    return table(head, map(line, load("compiled")["sampling"]))


def accelerator() -> str:
    """Training steps on a card, before and after what docs/devices.md says of them."""
    made = {(row["section"], row["name"]): row for row in load("accelerator_h200")["rows"]}

    def line(name: str, words: str, row: dict, step: dict) -> list[str]:
        return [
            name, words, str(row["batch_size"]), f"{step['examples_per_second']:.0f}",
            f"{100 * step['utilisation']:.1f}%", f"{1000 * step['seconds_per_step']:.1f}",
            f"{step['peak_bytes'] / 2**30:.0f}", f"{step['compile_seconds']:.0f}",
            row["revision"][:7],
        ]  # fmt: skip

    lines = []
    for name in ("DiT-XL/2", "DiT-B/2", "CIFAR-10 U-Net"):
        before, after = made["throughput", name], made.get(("layouts", name), {})
        old = "unchanged" if not after else "scanned, XLA's attention, before"
        lines += [line(name, f"{old}: {o}", before, before[k])
                  for k, o in (("dsm", "DSM"), ("mclr", "MCLR"))]  # fmt: skip
        for key, words in (("ours", "now"), ("scanned", "scanned"), ("XLA's attention",) * 2):
            if key in after:
                lines.append(line(name, f"{words}: DSM", after, after[key]))
    head = ["network", "step", "batch", "examples/s", "share of the peak", "ms", "memory, GiB",
            "compilation, s", "revision"]  # fmt: skip
    return table(head, lines)


def mclr_over_dsm() -> str:
    found = load("compiled")["mclr_over_dsm"]
    return table(["config", *found], [["MCLR / DSM", *(f"{x:.2f}" for x in found.values())]])


def hosts() -> str:
    """Four processes on this machine of which one is killed; the run continued by fewer."""

    def line(row: dict) -> list[str]:
        apart = row["relative_difference_by_processes"]
        kilobytes = (f"{row[key] / 1000:.0f}" for key in ("checkpoint_bytes", "state_bytes"))
        return [
            f"`{row['parallel']}`", "yes" if row["same_bits"] else "no",
            *(f"{apart[count]:.1e}" if apart[count] else "0" for count in ("2", "1")),
            " / ".join(kilobytes), f"{row['seconds_to_end']:.0f}",
        ]  # fmt: skip

    rows = [row for row in load("hosts")["rows"] if row["name"].startswith("kill")]
    head = ["layout", "four again: same bits", "two continue: difference", "one: difference",
            "checkpoint / state, kB", "seconds until the others ended"]  # fmt: skip
    return table(head, map(line, rows))


def feed() -> str:
    """What one host reads, and what four chips of TPU v5e can train on at most."""
    rows = [row for row in load("hosts")["rows"] if row["name"].startswith("input")]
    body = ([row["name"].removeprefix("input, "), f"{row['read_per_second']:,.0f}",
             f"{row['trained_per_second_at_most']:,.0f}", f"{row['ratio']:.1f}"]
            for row in rows)  # fmt: skip
    return table(["data, on one core", "read per second", "trained on per second", "ratio"],
                 body)  # fmt: skip


# ---- pages ---------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return TABLE.sub(lambda match: match[1] + globals()[match[2]](), text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
