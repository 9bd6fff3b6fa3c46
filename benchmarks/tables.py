"""Write the tables of README.md and docs/ from benchmarks/results.

  python benchmarks/tables.py

A table stands between the comments `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a
key of TABLES. The tests compare every table with its result file.
"""

import itertools
import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
Row = Mapping[str, Any]


def load(name: str) -> Any:
    """benchmarks/results/NAME.json."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * lines[0].count(" | ") + "|---|", *lines[1:]]) + "\n"


def of(rows: Iterable[Row], head: str, cells: str, **more: Callable[[Row], Any]) -> str:
    """A table with a line for each row: `cells` with the row's values, and with `more` of it."""
    values = ({**row, **{name: find(row) for name, find in more.items()}} for row in rows)
    return table(head.split(" | "), (cells.format(**row).split(" | ") for row in values))


def digits() -> str:
    names = {"base": "unguided", "CFG": "CFG, `guidance_scale=2`", "MCLR": "MCLR, unguided"}
    return of(
        load("demo")["table"],
        "10 digits, 8x8 | accuracy of 500 samples, % | network calls",
        "{words} | {percent:.1f} | {network_calls}",
        words=lambda row: names[row["name"]], percent=lambda row: 100 * row["accuracy"],
    )  # fmt: skip


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

    rows = ([text, outcome(found[name])] for name, text in MIXTURE.items())
    return table(["4,000 steps, beta 1", "distance to CFG"], rows)


def mixture_by_strength() -> str:
    found = load("mixture_mclr")["by_strength"]
    kinds = {"base": "base", "input": "MCLR, strength as an input",
             "share": "MCLR beta 1, interpolation = strength"}  # fmt: skip
    rows = ([text, *(f"{row[kind]:.3f}" for row in found.values())]
            for kind, text in kinds.items())  # fmt: skip
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
    rows += [(text, result["table"][name]) for name, text in MODELS.items()]
    head = ["", *(QUALITY[key][0] for key in QUALITY)]
    return table(head, ([text, *quality(row, QUALITY)] for text, row in rows))


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

REGIMES = {"frame": "one frame", "filter": "filter", "lag8": "fixed lag 8",
           "lag16": "fixed lag 16", "batch": "batch", "batch_norm": "batch, `norm`",
           "fixed_lag": "fixed lag 3"}  # fmt: skip
SYSTEMS = {"lorenz96": "Lorenz-96", "ks": "Kuramoto-Sivashinsky"}


def _regime(row: Row) -> str:
    inflation = row.get("plan", {}).get("inflation")
    return REGIMES[row["regime"]] + (f", inflated by {inflation:.2f}" if inflation else "")


def _test_rows(name: str) -> list[Row]:
    return [row for row in load(name)["rows"] if row["set"] == "test"]


def assimilation() -> str:
    """The trajectory model and the particle filter on Lorenz-63, test trajectories."""

    def uneven(row: Row) -> float:
        shares = row["ranks"]
        return sum(abs(share - 1 / len(shares)) for share in shares) / 2

    order, regimes = ["lo", "hi", "flowdas"], [*REGIMES]
    rows = sorted(
        _test_rows("lorenz63"),
        key=lambda r: (order.index(r["protocol"]), regimes.index(r["regime"])),
    )
    return of(
        rows,
        "protocol | regime | RMSE | particle filter | ratio | spread/skill | CRPS | ranks",
        "{protocol} | {name} | {rmse:.2f} | {particle_filter_rmse:.2f} | {ratio:.2f} | "
        "{spread_skill:.2f} | {crps:.2f} | {uneven:.2f}",
        name=_regime, uneven=uneven,
    )  # fmt: skip


def fields() -> str:
    """The trajectory model, and dapper's method of the lowest RMSE, on test trajectories."""
    result, baselines, lines = load("forcing_fields"), load("assimilation_baselines"), []
    for row in sorted(_test_rows("forcing_fields"), key=lambda row: row["system"], reverse=True):
        if row["task"] in ("forecast", "known"):
            continue
        rows = [r for r in baselines[f"dapper_{row['system']}"]["rows"]
                if (r["set"], r["regime"]) == ("test", row["task"])]  # fmt: skip
        best = min(rows, key=lambda r: r["rmse"], default={})
        key = {name: row[name] for name in ("system", "task", "trajectories")}
        same = next((r for r in result["dapper"] if key.items() <= r.items()), best)
        other = {"rmse": same, "rmse_second_half": same, "spread_skill": best}
        theirs = {k: f"{found[k]:.2f}" if k in found else "" for k, found in other.items()}
        seconds = f"{row['seconds'] / row['trajectories']:.0f}"
        seconds += f" / {best['seconds'] / 16:.1f}" if best else ""
        method = best.get("method", "").split("(")[0]
        lines.append({**row, "theirs": theirs, "seconds": seconds, "method": method,
                      "system": SYSTEMS[row["system"]]})  # fmt: skip
    return of(
        lines,
        "system | regime | dapper's method | RMSE | dapper | second half | dapper | spread/skill | "
        "dapper | CRPS | seconds a trajectory / dapper",
        "{system} | {task} | {method} | {rmse:.2f} | {theirs[rmse]} | {rmse_second_half:.2f} | "
        "{theirs[rmse_second_half]} | {spread_skill:.2f} | {theirs[spread_skill]} | {crps:.2f} | "
        "{seconds}",
    )


def forecasts() -> str:
    """RMSE of forecasts of Lorenz-96 by frames after the last observation."""
    names = {2: "one step at a time", 32: "trajectories of 32 frames"}
    leads = (1, 4, 8, 16, 32, 64)
    rows = [row for row in _test_rows("forcing_fields") if row["task"] in ("forecast", "known")]
    return of(
        rows,
        f"observed | model | observed frames | {' | '.join(f'{n} ahead' for n in leads)} | "
        "no skill | CRPS",
        "{seen} | {model} | {before:.2f} | {ahead} | {climatology:.2f} | {crps:.2f}",
        seen=lambda row: f"1 of {row['every']}" if row["task"] == "forecast" else
        "true state of one frame",
        model=lambda row: names[row["frames"]],
        before=lambda row: row.get("observed_rmse", 0),
        ahead=lambda row: " | ".join(f"{row['rmse_by_frame'][n - 69]:.2f}" for n in leads),
    )  # fmt: skip


def linear_gaussian() -> str:
    """Exact denoiser and trained network on the linear-Gaussian process, against Kalman."""
    return of(
        load("linear_gaussian")["rows"],
        "regime | denoiser | distance of the mean | spread ratio | RMSE ratio",
        "{name} | {model} | {error:.2f} | {spread:.2f} | {rmse_ratio:.2f}", name=_regime,
    )  # fmt: skip


def navier_stokes() -> str:
    """The trajectory model and optimal interpolation on Navier-Stokes, test trajectories."""
    cells = {(r["operator"], r["regime"], r["method"]): r for r in _test_rows("navier_stokes")}
    methods = {"model": "model", "interpolation": "optimal interpolation"}
    found = (
        cells.get(key) for key in itertools.product(("random", "downsample"), REGIMES, methods)
        if key[2] == "model" or key[1] in ("frame", "batch")
    )  # fmt: skip
    return of(
        filter(None, found),
        "observations | regime | method | NRMSE | RMSE | CRPS | spread/skill | seconds",
        "{operator} | {name} | {words} | {nrmse:.2f} | {standardised:.2f} | {crps:.2f} | "
        "{spread_skill:.2f} | {seconds:.1f}",
        name=_regime, words=lambda row: methods[row["method"]],
    )  # fmt: skip


# ---- speed ---------------------------------------------------------------------------------------


def threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def throughput() -> str:
    cells: dict[tuple, str] = {}
    for row in load("throughput")["rows"]:
        speed = row["images_per_second"]
        torch = max(value for name, value in speed.items() if name.startswith("torch"))
        ratio = f"{speed['ours']:.3g} / {torch:.3g} = {row['ours_over_torch']:.2f}x"
        cells[row["task"], row["threads"], row["model"]] = ratio
    kinds = {"training": "training", "sampling": "18 Heun steps"}
    rows = ([f"{kinds[task]}, {threads(n)}", cells[task, n, "unet"], cells[task, n, "dit"]]
            for task in kinds for n in (1, 2))  # fmt: skip
    return table(["images/s, ours / PyTorch's best", "EDM U-Net, 1.75M", "DiT, 4.2M"], rows)


def settings() -> str:
    rows = [row for row in load("throughput")["rows"] if row["task"] == "training"]
    names = dict.fromkeys(name for row in rows for name in row["images_per_second"])
    models = {"unet": "U-Net", "dit": "DiT"}
    heads = (f"{models[row['model']]}, {threads(row['threads'])}" for row in rows)
    body = ([name, *(f"{v:.3g}" if (v := row["images_per_second"].get(name)) else ""
                     for row in rows)] for name in names)  # fmt: skip
    return table(["training, images/s", *heads], body)


def _memory(row: Row) -> str:
    """GiB that a compiled program needs, of those of the chip."""
    memory, chip = row["memory_per_chip_bytes"]["peak"], row["chip_memory_bytes"]
    needed = "more" if memory is None else f"{memory / 2**30:.2g}"
    return f"{needed} / {chip / 2**30:.4g}{'' if row['fits'] else ': does not fit'}"


def compiled() -> str:
    """The cost of steps on TPUs and GPUs, by their compilers."""
    return of(
        load("compiled")["rows"],
        "config | chips | parameters, M | memory / chip's, GiB | TFLOP | collectives, MiB | "
        "ms at least | chip-hours at least | compilation, s",
        "{name} | {topology}, `{parallel}` | {millions:.3g} | {memory} | {teraflops:.2g} | "
        "{exchanged:.3g} | {ms:.2g} | {device_hours:.2g} | {compile_seconds:.0f}",
        millions=lambda row: row["parameters"] / 1e6,
        memory=_memory,
        teraflops=lambda row: row["flops_per_step"] / 1e12,
        exchanged=lambda row: sum(x["bytes"] for x in row["collectives"].values()) / 2**20,
        ms=lambda row: 1000 * row["roofline"]["seconds_per_step"],
    )


def sampled() -> str:
    """The cost of samples on TPUs and GPUs, by their compilers."""

    def guidance(row: Row) -> str:
        return "none" if row["guidance_scale"] == 1 else f"CFG, {row['guidance_scale']:g}"

    return of(
        load("compiled")["sampling"],
        "config | chips | at once | guidance | network calls | memory / chip's, GiB | "
        "PFLOP / 1,000 | chip-seconds / 1,000, at least | compilation, s",
        "{name} | {topology} | {batch_size} | {guidance} | {thousand_samples[network_calls]} | "
        "{memory} | {petaflops:.2g} | {thousand_samples[chip_seconds]:.2g} | {compile_seconds:.0f}",
        guidance=guidance, memory=_memory,
        petaflops=lambda row: row["thousand_samples"]["flops"] / 1e15,
    )  # fmt: skip


def accelerator() -> str:
    """Training steps on a card, before and after what docs/devices.md says of them."""
    made = {(row["section"], row["name"]): row for row in load("accelerator_h200")["rows"]}
    rows: list[Row] = []
    for name in ("DiT-XL/2", "DiT-B/2", "CIFAR-10 U-Net"):
        before, after = made["throughput", name], made.get(("layouts", name), {})
        old = "scanned, XLA's attention, before" if after else "unchanged"
        steps = [(before, "dsm", f"{old}: DSM"), (before, "mclr", f"{old}: MCLR"),
                 (after, "ours", "now: DSM"), (after, "scanned", "scanned: DSM"),
                 (after, "XLA's attention", "XLA's attention: DSM")]  # fmt: skip
        rows += [{**row[key], "text": text, "row": row} for row, key, text in steps if key in row]
    return of(
        rows,
        "network | step | batch | examples/s | share of the peak | ms | memory, GiB | "
        "compilation, s | revision",
        "{row[name]} | {text} | {row[batch_size]} | {examples_per_second:.0f} | {utilisation:.1%} "
        "| {ms:.1f} | {peak:.0f} | {compile_seconds:.0f} | {row[revision]:.7}",
        ms=lambda row: 1000 * row["seconds_per_step"],
        peak=lambda row: row["peak_bytes"] / 2**30,
    )


def mclr_over_dsm() -> str:
    found = load("compiled")["mclr_over_dsm"]
    return table(["config", *found], [["MCLR / DSM", *(f"{x:.2f}" for x in found.values())]])


def hosts() -> str:
    """Four processes on this machine of which one is killed; the run continued by fewer."""

    def apart(count: str) -> Callable[[Row], str]:
        key = "relative_difference_by_processes"
        return lambda row: f"{row[key][count]:.1e}" if row[key][count] else "0"

    return of(
        [row for row in load("hosts")["rows"] if row["name"].startswith("kill")],
        "layout | four again: same bits | two continue: difference | one: difference | "
        "checkpoint / state, kB | seconds until the others ended",
        "`{parallel}` | {same} | {two} | {one} | {kilobytes} | {seconds_to_end:.0f}",
        same=lambda row: "yes" if row["same_bits"] else "no", two=apart("2"), one=apart("1"),
        kilobytes=lambda row: " / ".join(
            f"{row[f'{part}_bytes'] / 1000:.0f}" for part in ("checkpoint", "state")
        ),
    )  # fmt: skip


def feed() -> str:
    """What one host reads, and what four chips of TPU v5e can train on at most."""
    return of(
        [row for row in load("hosts")["rows"] if row["name"].startswith("input")],
        "data, on one core | read per second | trained on per second | ratio",
        "{data} | {read_per_second:,.0f} | {trained_per_second_at_most:,.0f} | {ratio:.1f}",
        data=lambda row: row["name"].removeprefix("input, "),
    )


# ---- pages ---------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (digits, mixture, mixture_by_strength, fashion, learning_rates, comparison, icr,
                 assimilation, fields, forecasts, linear_gaussian, navier_stokes, throughput,
                 settings, compiled, sampled, accelerator, mclr_over_dsm, hosts, feed)
} | {
    "rivals": lambda: _rivals("fashion_mnist"),
    "rivals_digits": lambda: _rivals("digits"),
    "equal_noise": lambda: _rivals("fashion_mnist", equal=True),
    "equal_noise_40000": lambda: _rivals("fashion_mnist_40000", equal=True, every=True),
    "equal_noise_6000": lambda: _rivals("fashion_mnist_6000", equal=True, every=True),
    "equal_noise_digits": lambda: _rivals("digits", equal=True),
    "equal_noise_digits_1000": lambda: _rivals("digits_1000", equal=True, every=True),
    "equal_noise_two_digits": lambda: _rivals("two_digits", equal=True),
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return TABLE.sub(lambda match: match[1] + TABLES[match[2]](), text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
