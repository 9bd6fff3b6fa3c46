"""Costs against closed forms, and what XLA says for the CPU and, where libtpu is, for the TPU."""

import dataclasses
import importlib.util
import math
import pathlib

import cases
import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from mclr_jax import chips, plan
from mclr_jax.config import Training
from mclr_jax.configs import digits as digits_config
from mclr_jax.denoiser import Velocity
from mclr_jax.model import DataInfo, size_of
from mclr_jax.samplers import Sampler
from mclr_jax.training.devices import MODES, Devices, placed
from mclr_jax.training.step import make_evaluate

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = DataInfo((8, 8, 1), 10, 1.0)


# ---- FLOPs ---------------------------------------------------------------------------------------


def digits(**changes):
    return Training.parse(tiny.config("digits", **changes)).task(DIGITS, {})


def test_an_mlp_has_the_closed_form():
    """All but the first layers, whose inputs need no gradient, count three times in a step."""
    task, batch = cases.task("dsm"), 16
    width, depth = task.model.network.width, task.model.network.depth
    first = 2 * (32 * width + 2 * width)  # noise and data
    blocks = depth * (2 * width**2 + 2 * width**2)  # modulation, two layers
    forward = first + 2 * (width**2 + blocks + width * 2)
    assert plan.forward_flops(task.model) == forward
    assert plan.step_flops(task, batch) == batch * (3 * forward - first)


def test_a_dit_has_the_closed_form():
    """8x8 images in 4 patches of 4x4; loops over blocks or parts of the batch count all rounds."""
    task, batch, w, n, depth = digits(**{"network.depth": 3}), 16, 16, 4, 3
    first = 2 * (n * 16 * w + 256 * w)
    block = 2 * (6 * w * w + n * (4 + 8) * w * w + 2 * n * n * w)
    forward = first + 2 * w * w + depth * block + 2 * (2 * w * w + n * w * 16)
    assert plan.forward_flops(task.model) == forward
    step = batch * (3 * forward - first)
    in_parts = digits(**{"network.depth": 3, "grad_accumulation": 4, "network.scan_blocks": True})
    assert plan.step_flops(in_parts, batch) == plan.step_flops(task, batch) == step
    options = {"network.depth": 3, "network.scan_blocks": True, "network.remat": True}
    again = plan.step_flops(digits(**options), batch) - step
    assert again == batch * depth * block  # once more


def test_convolutions_and_branches_count_products_with_data():
    """The gradients of a strided convolution cost what the convolution costs."""
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 2, 3, 5))

    def loss(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        found = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=layout)
        return found.sum()

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def count(f, *arguments):
        return plan.flops(jax.make_jaxpr(f)(*arguments).jaxpr)

    forward = 2 * (2 * 4 * 4 * 5) * (2 * 2 * 3)
    assert count(loss, x, kernel) == forward
    assert count(jax.value_and_grad(loss, (0, 1)), x, kernel) == 3 * forward
    assert count(branch, jnp.zeros((4, 4))) == 2 * 2 * 4**3


def test_sampling_costs_its_network_calls(monkeypatch):
    """With CFG twice as many, of which the bound is twice as long where products set it."""
    chip = dataclasses.replace(chips.CHIPS["v5e"], flops=1.0)
    monkeypatch.setattr(chips, "topology", lambda name: (chip, tuple(jax.devices())))
    model, sampler = digits().model, Sampler("heun", 4)  # 7 calls
    for scale, calls in {1: 7, 2: 14}.items():
        cost = plan.sampling(model, "", sampler, batch_size=16, guidance_scale=scale)
        found = cost["thousand_samples"]
        assert found["network_calls"] == calls
        assert found["flops"] == 1000 * calls * plan.forward_flops(model)
        assert found["chip_seconds"] == found["flops"]
        exchanged = cost["collectives"]
        assert exchanged.pop("all-gather") == {"count": 1, "bytes": 16 * 64 * 4}  # the samples
        asked = {"all-reduce": {"count": 7, "bytes": 7}}  # whether any sample is guided
        assert exchanged == (asked if calls == 14 else {})
        assert cost["fits"]
        assert "16 at once" in plan.sampling_told(cost)
        moved, memory = cost["roofline"]["seconds"]["memory"], cost["memory_per_chip_bytes"]
        assert moved * chip.bandwidth > 7 * memory["arguments"]  # the parameters in each call
    flow = dataclasses.replace(model, preconditioning=Velocity())
    cost = plan.sampling(flow, "", Sampler("ode_heun", 4), batch_size=16)["thousand_samples"]
    assert (cost["network_calls"], cost["flops"]) == (7, 7000 * plan.forward_flops(model))
    with pytest.raises(ValueError, match="12 samples on 8 devices; expected a multiple"):
        plan.sampling(model, "", sampler, batch_size=12)
    judge = Training.parse(tiny.classifier()).model(DataInfo((2,), 3, 1.0))
    with pytest.raises(ValueError, match="is a classifier, which draws no samples"):
        plan.sampling(judge, "", sampler, batch_size=16)


# ---- collectives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", MODES)
def test_replicated_layouts_exchange_the_gradient_and_fsdp_holds_a_share(parallel):
    """And sums of a few metrics, 4 bytes each."""
    config = tiny.config("mixture", **{"network.width": 64, "network.dropout": 0.0})
    arguments = plan.shapes(task := Training.parse(config).task(DataInfo((2,), 3, 1.0), {}), 16)
    parameters = size_of(arguments[0].params)
    state = 4 * 4 * parameters  # with Adam's moments and an average
    memory, exchanged = plan._compiled(plan.lowered(task, Devices(parallel), arguments), scale=1)
    if parallel == "fsdp":
        assert memory["arguments"] < state / 4
        assert exchanged["all-gather"]["bytes"] > 0
    else:
        assert memory["arguments"] > state
        assert exchanged.keys() == {"all-reduce"}
        assert 0 < exchanged["all-reduce"]["bytes"] - 4 * parameters < 100


@pytest.mark.parametrize("name", ["dsm", "mclr", "evaluation"])
def test_fsdp_gathers_kernels_and_moves_no_activations(name):
    """Left to itself XLA divides the features of a DiT, with 16 times as many bytes of these.

    MCLR joins rows with half as many negatives, of which XLA would make whole copies: 20 times as
    many bytes. Both of its models are gathered.
    """
    changes = {"network.width": 64, "network.depth": 4, "network.scan_blocks": True}
    if name == "mclr":
        changes |= {"objective.name": "mclr", "objective.negatives": "prior"}
        changes |= {"objective.negative_share": 0.5, "objective.target": "data"}
    config = tiny.config("digits", **changes)
    data = dataclasses.replace(DIGITS, class_prior=(0.1,) * 10)
    task = Training.parse(config).task(data, {"reference": Training.parse(config).model(data)})
    arguments = plan.shapes(task, 64)
    parameters = size_of(arguments[0].params)
    lowered, devices = plan.lowered(task, Devices("fsdp"), arguments), Devices("fsdp")
    if name == "evaluation":
        state, frozen, rows, _ = arguments
        params = placed(state.params, devices.state_shardings(state.params))
        spread = NamedSharding(devices.mesh, PartitionSpec(None, "data"))
        rows = placed(rows, jax.tree.map(lambda _: spread, rows))
        lowered = jax.jit(devices.in_mesh(make_evaluate(task))).lower(params, frozen, rows)
    exchanged = {"all-to-all": {"bytes": 0}} | plan._compiled(lowered, scale=1)[1]
    assert exchanged["all-to-all"]["bytes"] < 0.05 * 4 * parameters
    assert 1 < exchanged["all-gather"]["bytes"] / (4 * parameters) < 3 + len(task.frozen)


# ---- the chips -----------------------------------------------------------------------------------


def test_the_roofline_is_the_longest_part():
    chip = chips.Chip(100, flops=10.0, bandwidth=5.0, link=2.0, source="")
    memory = {"arguments": 4, "outputs": 6, "temporaries": 20, "peak": 24}
    exchanged = {"all-reduce": {"count": 1, "bytes": 6}, "all-gather": {"count": 2, "bytes": 8}}
    found = plan.roofline(chip, 30.0, memory, exchanged)
    assert found["seconds"] == {"compute": 3.0, "memory": 10.0, "links": 10.0}
    assert found["seconds_per_step"] == 10.0
    unknown = dict.fromkeys(memory)
    assert plan.roofline(chip, 30.0, unknown, {})["seconds_per_step"] == 3.0


@dataclasses.dataclass
class Full:
    """A program that does not fit."""

    message: str

    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError(self.message)


def test_what_does_not_fit_is_an_answer():
    message = "RESOURCE_EXHAUSTED: Ran out of memory: {} exceeds available HBM (15.75G)."
    memory, _ = plan._compiled(Full(message.format("HLO temporaries (209.50G)")), scale=2)
    assert memory["arguments"] is None
    assert memory["peak"] == 2 * 209.5 * 2**30
    memory, _ = plan._compiled(Full(message.format("Used 20.25M of 15.75G hbm.")), scale=1)
    assert memory["peak"] == 20.25 * 2**20
    with pytest.raises(RuntimeError, match="INTERNAL"):
        plan._compiled(Full("INTERNAL: Used 2G"), scale=1)


def test_what_exceeds_the_memory_of_a_gpu_does_not_fit(monkeypatch):
    """Its compiler only logs an error: the program is compared with the card."""
    keys = {"parallel": "data", "batch_size": 8, "steps_per_dispatch": 1, "num_steps": 1}
    training, fits = Training.parse(tiny.config("mixture", **tiny.LINEAR, **keys)), []
    for memory in (2**30, 2**8):
        chip = dataclasses.replace(chips.CHIPS["v5e"], memory=memory)
        monkeypatch.setattr(chips, "topology", lambda name, chip=chip: (chip, (jax.devices()[0],)))
        cost = plan.planned(training, DataInfo((2,), 3, 1.0), "cuda:h100x1")
        fits.append((cost["fits"], "DOES NOT FIT" in plan.told(cost)))
    assert fits == [(True, False), (False, True)]


def test_a_chip_may_have_several_devices(monkeypatch):
    """A v4 has two, with half of its batch and of its FLOP/s each, and copies of the parameters."""
    keys = {"parallel": "data", "batch_size": 32, "steps_per_dispatch": 1, "num_steps": 7200,
            "sampler.num_steps": 3}  # fmt: skip
    training = Training.parse(tiny.config("mixture", **tiny.LINEAR, **keys))
    task, found = training.task(DataInfo((2,), 3, 1.0), {}), {}
    for devices in (1, 2):
        chip = dataclasses.replace(chips.CHIPS["v4"], devices=devices, flops=1e3)
        all_devices = tuple(jax.devices()[: 4 * devices])
        monkeypatch.setattr(chips, "topology", lambda name, c=chip, d=all_devices: (c, d))
        found[devices] = plan.planned(training, DataInfo((2,), 3, 1.0), "")
    for each in found.values():
        seconds = plan.step_flops(task, 32) / 4 / 1e3
        assert (each["chips"], each["roofline"]["seconds"]["compute"]) == (4, seconds)
        assert each["roofline"]["seconds_per_step"] == seconds
        assert each["device_hours"] == pytest.approx(2 * 4 * seconds)  # 7,200 steps
        sampling = 1000 * 5 * plan.forward_flops(task.model)
        assert each["thousand_samples"]["flops"] == sampling
        assert each["thousand_samples"]["chip_seconds"] == sampling / 1e3
        assert each["flops_per_example"]["step"] == plan.step_flops(task, 32) / 32
    text = plan.told(found[1])
    for part in ("all-reduce", " chip-hours", "5 network calls each", " TFLOP/s"):
        assert part in text
    one, two = (each["memory_per_chip_bytes"]["arguments"] for each in found.values())
    assert one < two < 2 * one + 100  # the batch is the same


# ---- the command ---------------------------------------------------------------------------------


def test_a_shape_replaces_the_data(tmp_path):
    config = tiny.config("digits", **{"data.name": "zip:missing.zip"})
    with pytest.raises(FileNotFoundError, match=r"missing.*--shape=32,32,3 --num_classes=10"):
        plan.data_info(Training.parse(config), None, 0)
    with pytest.raises(ValueError, match="--num_classes"):
        plan.data_info(Training.parse(config), [8, 8, 1], 0)
    with pytest.raises(ValueError, match="positive"):
        plan.data_info(Training.parse(config), [8, 0, 1], 4)
    found = plan.data_info(Training.parse(config), [8, 8, 1], 4)
    assert (found.shape, found.num_classes) == ((8, 8, 1), 4)
    assert math.isclose(sum(found.class_prior), 1)


def test_companions_without_a_run_are_those_of_their_configs(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = tiny.config("digits", **{"objective.name": "mclr", "posterior.name": "classifier"})
    config.companions.classifier = "elsewhere/digits_classifier"
    models = plan.companions(Training.parse(config), DIGITS)
    assert models.keys() == {"classifier"}
    assert models["classifier"].is_classifier
    config.companions.classifier = "runs/nothing"
    with pytest.raises(FileNotFoundError, match=r"'classifier'.*configs/nothing.py"):
        plan.companions(Training.parse(config), DIGITS)


def test_what_saves_memory_is_tried_alone_and_together(monkeypatch):
    """A step of 48 GiB, which each change halves; four parts alone are refused."""
    config = tiny.config("digits", parallel="fsdp")

    def planned(changed, data, topology):
        network = changed.network.values
        halves = network["remat"] + (network["dtype"] == "bfloat16")
        if changed.grad_accumulation == 4 and not halves:
            raise ValueError("grad_accumulation is 4")
        return {"fits": halves == 2, "memory_per_chip_bytes": {"peak": 48 * 2**30 >> halves}}

    monkeypatch.setattr(plan, "planned", planned)
    said: list[str] = []
    found = plan.suggestions(Training.parse(config), DIGITS, "v5e:1x1", said.append)
    remat, dtype, parts = "network.remat=True", "network.dtype=bfloat16", "grad_accumulation=4"
    fits = {name: each["fits"] for name, each in found.items()}
    kept = f"{remat}, network.remat_policy=weight_products"
    assert fits == {remat: False, dtype: False, kept: False, f"{parts}, {remat}, {dtype}": True}
    assert said[0] == f"{parts}: not possible (grad_accumulation is 4)"
    assert said[1] == f"{remat}: peak 24 GiB: DOES NOT FIT"


# ---- the compilers of TPUs and GPUs --------------------------------------------------------------


def on(compiler, target, *places):
    missing = importlib.util.find_spec(compiler) is None
    skip = pytest.mark.skipif(missing, reason=f"needs {compiler}: make {target}")
    return [pytest.param(*place, marks=skip) for place in places]


@pytest.mark.parametrize(
    ("topology", "parallel", "chips"),
    on("libtpu", "tpu", ("v5e:1x1", "pmap", 1), *(("v5e:2x2", each, 4) for each in MODES),
       ("v5e:2x2*2", "pmap", 8), ("v6e:2x2", "data", 4))
    + on("jax_cuda12_plugin", "gpu", *(("cuda:h100x4", each, 4) for each in MODES),
         ("cuda:a100x16", "data", 16)),
)  # fmt: skip
def test_digits_compile_for_chips(topology, parallel, chips):
    """Ten seconds each, with one program for all blocks."""
    config = digits_config.get_config()
    config.update({"parallel": parallel, "network": {"scan_blocks": True}})
    cost = plan.planned(Training.parse(config), DIGITS, topology, {})
    memory, state = cost["memory_per_chip_bytes"], 4 * 4 * cost["parameters"]
    share = cost["chips"] if parallel == "fsdp" else 1
    assert cost["fits"]
    assert cost["chips"] == chips
    assert state / share < memory["arguments"] < 1.5 * state / share
    assert memory["arguments"] < memory["peak"] < 2**28
    if not topology.startswith("cuda"):  # of a GPU the peak is less than their sum
        assert memory["arguments"] + memory["temporaries"] <= memory["peak"]
    gradient = 4 * cost["parameters"] * (cost["chips"] > 1)
    if parallel != "fsdp":
        reduced = cost["collectives"].get("all-reduce", {"bytes": 0})["bytes"]
        assert 0 <= reduced - gradient < 100
    assert cost["flops_per_step"] == 64 * (3 * 11_372_544 - 2 * (16 * 4 * 96 + 256 * 96))
    assert 0 < cost["roofline"]["seconds_per_step"] < 1e-3
    if parallel == "data":
        model, sampler = Training.parse(config).model(DIGITS), Sampler(num_steps=3)
        drawn = plan.sampling(model, topology, sampler, batch_size=64, guidance_scale=2.0)
        assert drawn["thousand_samples"]["flops"] == 1000 * 10 * 11_372_544
        assert drawn["memory_per_chip_bytes"]["peak"] < 2**28
