"""docs/howto.md: each question has one command, and all of them work, one after the other."""

import json
import re
import shutil

import commands
import numpy as np
import pytest
from PIL import Image

from mclr_jax import runs
from mclr_jax.data import sources

PAGE = (commands.ROOT / "docs" / "howto.md").read_text()
FILE = commands.ROOT / "tests" / "data" / "formats" / "sit" / "SiT-no-sigma.pt"
NAMES = ("cat", "dog", "fox")
STEPS = "--config.num_steps=2 --config.batch_size=8 --config.eval_examples=0"
SMALL = f"""{STEPS} --config.sample_every=0 --config.data.resolution=8
    --config.optimizer.warmup_steps=0 --config.checkpoint_every=2 --config.ema.power_stds=()
    --config.data.augment=0"""
LINEAR = f"{SMALL} --config.network.name=tiny:Linear"
MEASURED = "--features=classifier:runs/judge --resolution=8 --cache=cache"
# Behind the page's own flags, of which the last value counts; by the command's first words.
SMALLER = {
    "train mclr_null": STEPS,
    "train cifar10_classifier": f"{SMALL} --config.network.name=mlp_classifier "
    "--config.network.width=8 --config.network.depth=1",
    "train cifar10 --workdir=runs/logged": f"{LINEAR} --config.data.name=folder:photos "
    "--config.log.wandb=",
    "train --workdir=moved/photos": "--config.num_steps=4",
    "train cifar10 --workdir=runs/cifar10": f"{LINEAR} --config.data.name=folder:photos",
    "train cifar10": LINEAR,
    "train trajectories": f"{STEPS} --config.data.frames=12 --config.network.name=mlp "
    "--config.network.per_frame=True --config.network.width=8 --config.network.depth=1",
    "sample": "--num_samples=6 --steps=2",
    "calibrate": "--grid=2 --samples_per_class=2",
    "evaluate --samples": f"{MEASURED} --metrics=frechet",
    "evaluate": f"{MEASURED} --metrics=frechet --num_samples=6",
    "assimilate": "--ensemble=2 --scheme=steps=2,first_steps=2,guidance=norm",
    "convert --input": "--set=heads=3",
    "convert": "",
}


def smaller(words):
    line = " ".join(words)
    return next(more for start, more in SMALLER.items() if line.startswith(start)).split()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which all commands were run, and what they printed, by the question."""
    folder, logs = tmp_path_factory.mktemp("howto"), {}
    images, _ = sources.load("digits")[np.arange(60)]
    for place, count in (("photos", 60), ("generated", 30)):
        for number, image in enumerate(images[:count]):
            path = folder / place / NAMES[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    shutil.copy(FILE, folder / "SiT-XL-2-256x256.pt")
    walks = np.random.default_rng(0).normal(size=(20, 12, 2)).cumsum(1)
    np.save(folder / "recorded.npy", walks)
    np.savez(folder / "seen.npz", values=walks[0, :, :1], std=0.1, H=np.eye(1, 2))
    for section in re.split(r"(?m)^## ", PAGE)[1:]:
        question, _, text = section.partition("\n")
        ((_, module, *words),) = commands.lines(text)
        if words[0] == "--workdir=moved/photos":
            (folder / "moved").mkdir()
            shutil.move(folder / "runs" / "photos", folder / "moved" / "photos")
            shutil.move(folder / "photos", folder / "moved" / "images")
        more = smaller([module, *words])
        devices = 4 if "4 GPUs" in question else 1
        logs[question] = commands.call(module, *words, *more, folder=folder, devices=devices)
        for word in words:
            name, _, path = word.partition("=")
            if name in ("--out", "--workdir", "--to"):
                assert (folder / path).exists(), question
    return folder, logs


def test_every_question_has_one_command_that_works(done):
    folder, logs = done
    assert len(logs) >= 15
    told = {name: json.loads((folder / "runs" / name / "run.json").read_text())
            for name in ("unlabelled", "mclr", "strengths", "cifar10")}  # fmt: skip
    assert told["unlabelled"]["model"]["data"]["num_classes"] == 1
    assert told["mclr"]["config"]["objective"]["name"] == "mclr_null"
    assert runs.load(folder / "runs" / "strengths").model.strength == (0.0, 2.0)
    with np.load(folder / "pets.npz") as file:
        assert file["labels"].tolist() == [0, 1] * 3
    assert "4 device(s)" in logs["Train on 4 GPUs"]
    assert told["cifar10"]["config"]["parallel"] == "data"
    strengths = json.loads((folder / "strengths.json").read_text())
    assert len(strengths["class_strengths"]) == 3
    log = logs["Measure the FD of two folders"]
    assert "30 images of generated; reference: 60 images, photos." in log
    rows = json.loads((folder / "copies.json").read_text())
    assert 0 <= rows["rows"][0]["memorized"] <= 1
    assert "memorized" in rows["floor"]
    log = logs["Continue a run in another place"]
    assert "Resumed from the checkpoint of step 2" in log
    with np.load(folder / "analysis.npz") as file:
        assert file["members"].shape == (1, 2, 12, 2)
