"""benchmarks/outside.py at a size of seconds, and without PyTorch."""

import json

import image_bench
import jax
import numpy as np
import outside
import pytest
import small_bench
import tables
from small_bench import MADE_BY

from mclr_jax.denoiser import Epsilon
from mclr_jax.model import DataInfo, Model
from mclr_jax.networks.dit import DiT
from mclr_jax.pretrained import diffusers, tensors
from mclr_jax.pretrained.names import to_state

SETTINGS = {"samples": 40, "judge_steps": {"features": 2, "accuracy": 2}}
JUDGE = {"network": {"name": "mlp_classifier", "width": 16, "depth": 1}, "weight_decay": 0.1}
CONFIG = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8,
    "in_channels": 1, "out_channels": 1, "num_layers": 1, "sample_size": 28, "patch_size": 4,
    "num_embeds_ada_norm": 10,
}  # fmt: skip


def folder(path):
    """What torch_dit.py writes, of a network of no size with random weights."""
    net = DiT(out_channels=1, patch_size=4, width=16, depth=1, heads=2, time_scale=1.0,
              time_endpoint=True, mlp_epsilon=1e-5)  # fmt: skip
    params = Model(net, Epsilon(), DataInfo((28, 28, 1), 10, 1.0)).init(jax.random.key(0))
    part = path / "transformer"
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(CONFIG))
    tensors.save(part / diffusers.WEIGHTS[0], to_state(params, diffusers.names(net)))
    (path / diffusers.INDEX).write_text("{}")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The benchmark in a folder of its own; PyTorch gives noise for samples."""

    def in_torch(self, do, out, images="", folder="", count=0, seed=0, scale=1.0):
        if do == "train":
            return globals()["folder"](self.root / "diffusers") or {"steps": 3}
        noise = np.random.default_rng(seed).normal(size=(count, 28, 28)).astype(np.float32)
        clipped = np.clip(noise, -1, 1)
        np.savez(out, images=clipped, noise=noise, labels=np.arange(count) % 10)
        return {"samples": count, "network_calls": 50 * (1 + (scale != 1)), "scale": scale}

    monkeypatch.setattr(outside.Outside, "root", tmp_path)
    monkeypatch.setattr(outside.Outside, "settings", SETTINGS)
    monkeypatch.setattr(outside.Outside, "in_torch", in_torch)
    return outside.Outside()


def test_every_task_has_what_it_needs(bench):
    listed = bench.tasks((0, 1))
    made = [task.output for task in listed]
    assert len(set(made)) == len(made) == len({task.name for task in listed})
    assert {need for task in listed for need in task.needs} <= set(made)


def test_the_strength_of_the_lowest_distance_is_chosen(bench):
    for strength, distance in zip(outside.GRIDS["scale"], (5.0, 4.0, 2.0, 3.0, 6.0), strict=True):
        name = outside.named("base, CFG", outside.VALIDATION, strength)
        bench.write(f"sets/{name}", {"frechet": distance})
    bench.choose("base, CFG")
    found = bench.read("chosen_scale")
    assert (found["best"], found["inside"]) == (outside.GRIDS["scale"][2], True)


@pytest.mark.slow
def test_from_a_folder_of_pytorch_to_the_rows_of_the_table(bench, monkeypatch):
    monkeypatch.setattr(image_bench, "config_of", small_bench.config)
    monkeypatch.setattr(image_bench, "JUDGES", dict.fromkeys(image_bench.JUDGES, JUDGE))
    monkeypatch.setattr(outside.Outside, "second", lambda self, name: self.write(
        f"second/{name}", {"frechet": 1.0}))  # fmt: skip
    monkeypatch.setattr(outside, "COUNT", 40)
    monkeypatch.setattr(outside, "COUNTS", {outside.VALIDATION: 30})
    grids = {kind: grid[:2] for kind, grid in outside.GRIDS.items()}
    monkeypatch.setattr(outside, "GRIDS", grids)
    few = {"num_steps": 2, "batch_size": 32, "checkpoint_every": 0, "steps_per_dispatch": 1}
    monkeypatch.setattr(outside, "TUNING", outside.TUNING | few)
    for task in bench.tasks((0, 1)):
        task.run()
        assert (bench.root / task.output).exists()
    result = json.loads(json.dumps(outside.collect(bench, (0, 1))))
    assert len(result["rows"]) == 2 * len(outside.METHODS)
    assert all(row.keys() >= MADE_BY | {"frechet", "accuracy_by_features"}
               for row in result["rows"])  # fmt: skip
    calls = {row["method"]: row["network_calls"] for row in result["rows"]}
    assert (
        calls["base"]
        == calls["MCLR"]
        == calls["MCLR, as fine-tuned"]
        == 50
        < calls["base, CFG in an interval"]
        < 100
    )
    assert result["parity"]["largest_difference"]["original"] == 0
    (floor, *methods) = tables.over_seeds(result)
    assert [row["method"] for row in methods] == [*outside.METHODS]
    assert floor["second"] == "1.0"
