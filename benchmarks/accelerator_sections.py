"""What benchmarks/accelerator.py measures: the rows of its sections, as functions."""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import alternation as timing
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks
from alternation import SIGMA_DATA, Candidate, alternate, numbers, speed, timed

from mclr_jax import chips, generate, plan
from mclr_jax.config import OBJECTIVES, Training
from mclr_jax.files import digest
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.samplers import Sampler
from mclr_jax.task import Task
from mclr_jax.training.devices import replicated
from mclr_jax.training.step import TrainState, make_update

# Type, precision of products, and the largest relative errors (norm of the difference over norm)
# of output and gradient against float32 on the CPU. Products in float32 are in bfloat16 on TPUs and
# in TF32 on GPUs, unless the highest precision is asked for. A bfloat16 number has a relative error
# of up to 2^-9; on the CPU, the networks below have 0.007 and 0.014.
PARITY = {
    "float32": ("float32", "highest", 1e-4, 1e-4),
    "float32, default precision": ("float32", "default", 3e-2, 5e-2),
    "bfloat16": ("bfloat16", "default", 3e-2, 5e-2),
}
BY_XLA = "bfloat16, XLA's attention"  # of the DiT, on GPUs; the package takes that of cuDNN
STEP_TOLERANCE = 1e-3  # of the metrics and of the update of an objective in float32
OPTIONS: dict[str, dict[str, Any]] = {"mclr": {"negative_share": 0.5}}
RIVALS = ("mclr_null", "cca", "gft", "model_guidance", "contrastive_flow", "ddo", "dpo")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its data and its batch."""

    network: str
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    classes: int
    batch: int = 8
    flip: bool = False
    judge: tuple[str, Mapping[str, Any]] | None = None  # the classifier that MCLR reads
    torch: Mapping[str, Any] | None = None  # the options of the same network in PyTorch

    @property
    def data(self) -> DataInfo:
        return DataInfo(self.shape, self.classes, SIGMA_DATA, (1 / self.classes,) * self.classes)

    def training(self, objective: str = "dsm", **changes: Any) -> Training:
        """A training by Adam, with an average of the weights; `changes` of the network."""
        return Training.parse({
            "network": {"name": self.network, **self.options, **changes},
            "objective": {"name": objective, **OPTIONS.get(objective, {})},
            "posterior": {"name": "classifier"}, "noise": {"name": "lognormal"},
            "preconditioning": {"name": "edm"}, "data": {"flip": self.flip},
            "optimizer": {"learning_rate": 1e-4},
        })  # fmt: skip

    def model(self, **changes: Any) -> Model:
        return self.training(**changes).model(self.data)

    def task(self, objective: str, **changes: Any) -> Task:
        """A training by `objective`, with random frozen models of the same network."""
        model = self.model(**changes)
        companions = {"reference": model, "weak": model}
        if self.judge:
            judge = dataclasses.replace(self, network=self.judge[0], options=self.judge[1])
            companions["classifier"] = judge.model()
        return self.training(objective, **changes).task(self.data, companions)


JUDGE = {"channels": (128, 256, 256), "patch_size": 1, "dtype": "bfloat16"}
UNET = {"channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4, "attention_resolutions": (16,)}


def _latents(batch: int, torch: bool, **size: int) -> Case:
    """A DiT on 32x32x4 latents of 1,000 classes, with patches of 2x2."""
    options = {"patch_size": 2, "dtype": "bfloat16", **size}
    same = {**size, "patch": 2, "channels": 4, "num_classes": 1000} if torch else None
    judge = "conv_classifier", JUDGE
    return Case("dit", options, (32, 32, 4), 1000, batch, judge=judge, torch=same)


CASES = {
    "DiT-XL/2": _latents(64, True, width=1152, depth=28, heads=16),
    "CIFAR-10 U-Net": Case(
        "unet", {**UNET, "dropout": 0.13, "dtype": "bfloat16"}, (32, 32, 3), 10, 512, True,
        ("conv_classifier", JUDGE), UNET,
    ),
    "DiT-B/2": _latents(256, False, width=768, depth=12, heads=12),
}  # fmt: skip
DIGITS = Case("dit", {"patch_size": 2, "width": 96, "depth": 3, "heads": 3}, (8, 8, 1), 10, 64)
TINY_MLP = Case("mlp", {"width": 8, "depth": 1}, (2,), 3, 8,
                judge=("mlp_classifier", {"width": 8, "depth": 1}))  # fmt: skip
TINY_DIT = Case(
    "dit", {"patch_size": 2, "width": 16, "depth": 1, "heads": 2}, (4, 4, 4),
    5, 8, judge=("conv_classifier", {"channels": (8,)}),
    torch={"width": 16, "depth": 1, "heads": 2, "patch": 2, "channels": 4, "num_classes": 5,
           "resolution": 4},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    cases: Mapping[str, Case]
    small: Case  # the time of its step is that of the dispatch
    width: int  # of the networks that are compared with the CPU
    depth: int
    side: int  # of their images
    product: int  # rows of the matrices whose product gives the peak
    rounds: int  # repetitions, of which the median counts
    seconds: float  # of a repetition, at least
    dispatches: tuple[int, ...]  # steps in one
    sampling_steps: int
    rivals: tuple[str, ...]


FULL = Size(CASES, DIGITS, 128, 3, 16, 8192, 5, 0.5, (1, 4, 16), 18, RIVALS)
TINY = Size({"MLP": TINY_MLP, "DiT": TINY_DIT}, TINY_MLP, 8, 1, 4, 64, 2, 0.0, (1, 2), 2, ("cca",))


def error(found: Any, wanted: Any) -> float:
    """Norm of the difference of two trees over the norm of the second, in float64."""
    found, wanted = (np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])
                     for tree in (found, wanted))  # fmt: skip
    above, below = np.linalg.norm(found - wanted), np.linalg.norm(wanted)
    return float(above / below if below else above > 0)


# ---- against the CPU -----------------------------------------------------------------------------


def families(size: Size) -> dict[str, Case]:
    """A small network of each kind."""
    w, d, image = size.width, size.depth, (size.side, size.side, 3)
    heads = {"width": w, "depth": d, "heads": 2}
    unet = {"channels": w, "channel_mult": (1, 2), "num_blocks": d,
            "attention_resolutions": (size.side // 2,)}  # fmt: skip
    return {
        "mlp": Case("mlp", {"width": w, "depth": d}, (2,), 3),
        "dit": Case("dit", {**heads, "patch_size": 2}, image, 3),
        "unet ddpmpp": Case("unet", unet, image, 3),
        "unet ncsnpp": Case("unet", {**unet, "architecture": "ncsnpp"}, image, 3),
        "unet adm": Case("unet", {**unet, "architecture": "adm"}, image, 3),
        "edm2": Case("edm2", {**unet, "channels_per_head": w}, image, 3),
        "mlp_classifier": Case("mlp_classifier", {"width": w, "depth": d}, (2,), 3),
        "conv_classifier": Case("conv_classifier", {"channels": (w, w)}, image, 3),
        "trajectory": Case("trajectory", {**heads, "frames_per_token": 2}, (4, 3), 3),
        "frame_dit": Case("frame_dit", {**heads, "patch_size": 2}, (2, *image), 3),
    }


def parity(case: Case) -> dict[str, Any]:
    """Errors of a network's output and gradient on the device.

    The gradient is that of a random linear function of the output, in the parameters and the input.
    """
    reference, found, asked = _answers(case, *PARITY["float32"][:2]), {}, dict(PARITY)
    wanted = reference(jax.devices("cpu")[0])
    if jax.default_backend() == "gpu" and case.network == "dit":
        asked[BY_XLA] = PARITY["bfloat16"]
    for name, (dtype, precision, *limits) in asked.items():
        answers = reference if name == "float32" else _answers(case, dtype, precision)
        with timing.attention_of("xla" if name == BY_XLA else None):
            got = answers(jax.devices()[0])
        errors = {part: error(got[part], wanted[part]) for part in wanted}
        tolerances = dict(zip(wanted, limits, strict=True))
        passed = all(errors[part] <= tolerances[part] for part in wanted)
        found[name] = {**errors, "tolerances": tolerances, "passed": passed}
    return {**found, "passed": all(row["passed"] for row in found.values())}


def _answers(case: Case, dtype: str, precision: str) -> Callable[[jax.Device], dict[str, Any]]:
    """Device -> a network's output and gradient."""
    model = case.model(dtype=dtype)
    shapes = {"x": (case.batch, *case.shape), "c_noise": (case.batch, *model.frames)}
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    inputs = numbers(shapes, 1, scale=1.0)
    label = np.arange(case.batch, dtype=np.int32) % (case.classes + 1)

    def weighed(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        condition = model.complete(label, case.batch)
        output = model.network.apply({"params": params}, x, inputs["c_noise"], condition)
        return jnp.vdot(output, numbers(output, 2, scale=1.0)), output

    program = jax.jit(jax.grad(weighed, (0, 1), has_aux=True))
    arguments = numbers(shapes_of(model), scale=0.1), inputs["x"]

    def answers(device: jax.Device) -> dict[str, Any]:
        with jax.default_matmul_precision(precision):
            gradient, output = jax.device_get(program(*jax.device_put(arguments, device)))
        return {"output": output, "gradient": gradient}

    return answers


def objective_step(name: str, size: Size) -> dict[str, Any]:
    """Errors of an objective's metrics and of its update of the state, for one step of an MLP."""
    options = {"width": size.width, "depth": size.depth}
    case = Case("mlp", options, (2,), 3, judge=("mlp_classifier", options))
    if name == "classify":
        case = dataclasses.replace(case, network="mlp_classifier")
    # With a large eps Adam's first update is about the gradient, and not its sign.
    task = dataclasses.replace(case.task(name), optimizer=optax.adam(1e-2, eps=1e-2))
    if name == "dpo":  # its default, 5000, enlarges rounding errors of the answers
        task = dataclasses.replace(task, objective=dataclasses.replace(task.objective, beta=10.0))
    state = timing.state_of(task, 0.1)
    arguments = state, timing.frozen_of(task, 0.2), timing.rows(task, 16, 1), np.int32(1)
    update = jax.jit(make_update(task))

    def step(device: jax.Device) -> tuple[Any, Any]:
        with jax.default_matmul_precision("highest"):
            new, metrics = jax.device_get(update(*jax.device_put(arguments, device)))
        return jax.tree.map(np.subtract, new, state), metrics

    found = [step(devices[0]) for devices in (jax.devices(), jax.devices("cpu"))]
    changes, metrics = zip(*found, strict=True)
    both = zip(*map(jax.tree.leaves, metrics), strict=True)
    errors = {"update": error(*changes), "metrics": max(error(*pair) for pair in both)}
    passed = all(value <= STEP_TOLERANCE for value in errors.values())
    return {**errors, "tolerance": STEP_TOLERANCE, "passed": passed}


def resume(case: Case) -> dict[str, Any]:
    """Whether a training that stops and is restored from the host continues bit for bit.

    Where two uninterrupted trainings differ, the device's own operations are not deterministic.
    """
    task, length = case.task("dsm", dropout=0.1), 4
    step = timing.Step(Candidate(task, length=length), case.batch)

    def train(state: TrainState, first: int, last: int) -> TrainState:
        for number in range(first, last):
            data = step.devices.put_batches(timing.rows(task, case.batch, length, seed=number))
            state, _ = step.compiled(state, {}, data, step.count)
        return jax.tree.map(np.array, state)  # copies on the host

    start, put = timing.state_of(task), step.devices.put_state
    whole, again = (train(put(start), 0, 4) for _ in range(2))
    stopped = train(put(start), 0, 2)
    resumed = train(put(stopped), 2, 4)
    digests = {"uninterrupted": digest(whole), "again": digest(again), "resumed": digest(resumed)}
    return {
        "steps": 4 * length, "digests": digests,
        "deterministic": digests["again"] == digests["uninterrupted"],
        "difference": error(resumed.params, whole.params),
        "passed": digests["resumed"] == digests["uninterrupted"],
    }  # fmt: skip


# ---- the rows that are timed ---------------------------------------------------------------------


def throughput(case: Case, size: Size, objectives: Sequence[str]) -> dict[str, Any]:
    """Training steps by several objectives."""
    return timed({name: Candidate(case.task(name)) for name in objectives}, case.batch, size)


def layouts(case: Case, size: Size) -> dict[str, Any]:
    """A step of DSM on one device by layout, with recomputed blocks and with a loop over them.

    On GPUs also with the attention of XLA, where the package takes that of cuDNN.
    """
    kept = {"remat": True, "remat_policy": "weight_products"}
    task, changed = case.task("dsm"), {"recomputed": {"remat": True}, "weight products kept": kept}
    if case.network == "dit":
        changed["scanned"] = {"scan_blocks": True}
        changed["scanned, recomputed"] = {"scan_blocks": True, "remat": True}
    steps = {"data": Candidate(task), "pmap": Candidate(task, "pmap")}
    for name, changes in changed.items():
        steps[name] = Candidate(case.task("dsm", **changes), work=task)
    if jax.default_backend() == "gpu" and case.network == "dit":
        steps["XLA's attention"] = Candidate(task, attention="xla")
    return timed(steps, case.batch, size)


def dispatches(case: Case, size: Size) -> dict[str, Any]:
    """Steps of DSM, several in one dispatch."""
    lengths = {f"{n} steps": Candidate(case.task("dsm"), length=n) for n in size.dispatches}
    return timed(lengths, case.batch, size)


def sampling(case: Case, size: Size) -> dict[str, Any]:
    """Samples without guidance, as MCLR needs it, and with CFG."""
    model, sampler = case.model(dropout=0.0), Sampler(num_steps=size.sampling_steps)
    params = replicated(jax.device_put(numbers(shapes_of(model))))
    labels = np.arange(case.batch, dtype=np.int32) % case.classes
    kinds, found = {"unguided": generate.NONE, "CFG": generate.Guidance(2.0)}, {}

    def run(guided: generate.Guidance, calls: int) -> None:
        for _ in range(calls):
            generate.generate(model, params, labels, sampler, guided=guided, batch_size=case.batch)

    runs = {name: functools.partial(run, guided) for name, guided in kinds.items()}
    for name, guided in kinds.items():
        calls = guided.calls(model, sampler)
        found[name] = {
            "first_call_seconds": timing.seconds_of(runs[name], 1),
            "peak_bytes": timing.peak_bytes(), "network_calls": calls,
            "flops": plan.forward_flops(model) * calls * case.batch,
        }  # fmt: skip
    for name, seconds in alternate(runs, size.rounds, size.seconds).items():
        found[name] |= speed(seconds, case.batch, found[name]["flops"])
    return {"batch_size": case.batch, **found}


def peaks(size: Size) -> dict[str, float]:
    """FLOP/s of a product of bfloat16 matrices, and bytes/s read and written by a copy."""
    n = size.product
    shapes = [jax.ShapeDtypeStruct((n, n), jnp.bfloat16)] * 2
    a, b = jax.device_put(numbers(shapes, scale=1.0))
    x = jax.device_put(np.ones(4 * n * n, np.float32))  # many times the caches
    multiply, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x + 1)

    def repeated(program: Callable, *arguments: Any) -> Callable[[int], None]:
        def run(calls: int) -> None:
            for _ in range(calls):
                answer = program(*arguments)
            jax.block_until_ready(answer)

        run(2)
        return run

    runs = {"product": repeated(multiply, a, b), "copy": repeated(copy, x)}
    times = alternate(runs, size.rounds, size.seconds)
    return {
        "flops_per_second": 2 * n**3 / float(np.median(times["product"])),
        "bytes_per_second": 2 * x.nbytes / float(np.median(times["copy"])),
    }


def calibration(name: str, stored: Sequence[dict]) -> dict[str, Any]:
    """What `plan` predicts for the steps of a row of `throughput`, beside what was measured.

    The lower bound of the seconds is that of the published peaks, where they are known, and that of
    the peaks measured by `peaks`.
    """
    measured = tasks.made(stored, {"section": "plan", "name": "peaks"})
    row = tasks.made(stored, {"section": "throughput", "name": name})
    if not measured or not row or "error" in {**measured, **row}:
        return {"skipped": "it needs the rows peaks of plan, and this one of throughput"}
    published, found = timing.chip_of_device(), {}
    own = chips.Chip(0, measured["flops_per_second"], measured["bytes_per_second"], 1.0, "measured")
    for objective in ("dsm", "mclr"):
        if "error" in (step := row[objective]):
            continue
        seconds, memory = step["seconds_per_step"], step["memory_bytes"]
        bounds = {
            kind: plan.roofline(chip, step["flops_per_step"], memory, {})["seconds"]
            for kind, chip in {"published": published, "measured": own}.items() if chip
        }  # fmt: skip
        planned, peak = memory["arguments"] + memory["temporaries"], step["peak_bytes"]
        over = {kind: seconds / max(parts.values()) for kind, parts in bounds.items()}
        found[objective] = {
            "seconds_per_step": seconds, "bounds": bounds, "over_bound": over,
            "planned_bytes": planned, "peak_over_planned": peak and peak / planned,
        }  # fmt: skip
    return found


# ---- PyTorch -------------------------------------------------------------------------------------

TORCH = {"compiled": "default", "CUDA graphs": "reduce-overhead", "eager": ""}  # in this order


def torch_training(case: Case, mode: str, size: Size) -> dict[str, Any]:
    """A step of DSM in turns with the same network in PyTorch, both without dropout."""
    on_cpu = jax.default_backend() == "cpu"
    if importlib.util.find_spec("torch") is None:
        return {"skipped": "torch cannot be imported"}
    if on_cpu and TORCH[mode]:
        return {"skipped": "PyTorch's compiler is for GPUs here"}
    settings = {"network": case.network, "options": case.torch, "shape": case.shape,
                "device": "cpu" if on_cpu else "cuda", "mode": TORCH[mode]}  # fmt: skip
    workers: list[timing.Worker] = []

    def others(batch: int) -> dict[str, Callable[[int], Any]]:
        workers.append(timing.Worker("torch_models.py", json.dumps({**settings, "batch": batch})))
        return {"torch": workers[0].run}

    try:
        found = timed({"ours": Candidate(case.task("dsm", dropout=0.0))}, case.batch, size, others)
        return {**found, "torch": {**found["torch"], **workers[0].origin}}
    finally:
        for worker in workers:
            worker.close()


# ---- all rows ------------------------------------------------------------------------------------

Row = Callable[[Sequence[dict]], dict[str, Any]]  # the rows that are stored -> a new one


def all_rows(size: Size) -> dict[str, dict[str, Row]]:
    """Section -> name -> what makes that row. The most valuable ones are first."""

    def made(function: Callable, *arguments: Any) -> Row:
        return lambda stored: function(*arguments)

    cases = size.cases
    torch = {f"{n}, {m}": (c, m, size) for m in TORCH for n, c in cases.items() if c.torch}
    return {
        "parity": {name: made(parity, case) for name, case in families(size).items()},
        "throughput": {n: made(throughput, c, size, ("dsm", "mclr")) for n, c in cases.items()},
        "plan": {"peaks": made(peaks, size),
                 **{name: functools.partial(calibration, name) for name in cases}},
        "torch": {name: made(torch_training, *arguments) for name, arguments in torch.items()},
        "sampling": {name: made(sampling, case, size) for name, case in cases.items()},
        "resume": {"small": made(resume, size.small)},
        "objectives": {n: made(objective_step, n, size) for n in OBJECTIVES},
        "layouts": {
            "small, dispatches": made(dispatches, size.small, size),
            **{name: made(layouts, case, size) for name, case in cases.items()},
        },
        "rivals": {n: made(throughput, c, size, ("dsm", *size.rivals)) for n, c in cases.items()},
    }  # fmt: skip
