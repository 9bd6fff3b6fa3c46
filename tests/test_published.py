"""Published files as runs and back: official outputs, and each tensor bit for bit.

Covers mclr_jax/pretrained/{published,checkpoint,dit}.py; EDM's files are in test_edm.py, folders of
diffusers in test_diffusers.py, and trajectories in test_official_samplers.py.
"""

import json
import shutil

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mclr_jax import parts, pretrained, runs
from mclr_jax.denoiser import Epsilon, Velocity
from mclr_jax.pretrained import dit, published, tensors
from mclr_jax.types import Condition

FORMATS = reference.DATA / "formats"
# file: (family where the file does not tell it, values that it does not hold)
FILES = {
    "dit/DiT-legacy-format.pt": ("dit", {"heads": 3}),
    "dit/DiT-train-0050000.pt": ("", {"heads": 2}),
    "sit/SiT-no-sigma.pt": ("sit", {"heads": 3}),
    "sit/SiT-train-0050000.pt": ("", {"heads": 4}),
    "repa/REPA-legacy-names.pt": ("", {"heads": 2}),
    "repa/REPA-qknorm.pt": ("", {}),
    "repa/REPA-train-0400000.pt": ("", {"heads": 3}),
}
PROCESS = {"dit": Epsilon(), "sit": Velocity(1), "repa": Velocity(0)}


def expected(name, average="ema"):
    """The reference's inputs, official output, and the arguments of the official network."""
    with np.load(FORMATS / f"{name}.reference.npz") as arrays:
        meta = json.loads(str(arrays["meta.json"]))
        folder = "output" if average == "ema" else "output_model"
        output = next(k for k in ("raw", "velocity") if f"{folder}/{k}" in arrays)
        found = [arrays["input/x"], arrays[f"{folder}/{output}"]]
        x, out = (np.moveaxis(images, 1, -1) for images in found)
        return x, np.float32(arrays["input/t"]), arrays["input/y"], out, meta["kwargs"]


def content(name, average="ema"):
    """The file's own tensors."""
    found = tensors.load(FORMATS / name)
    return found.get(average, found)


@pytest.mark.parametrize(
    ("name", "average"),
    [*((name, "ema") for name in FILES), *((name, "model") for name in FILES if "train" in name)],
)
def test_official_outputs_and_every_tensor_back(name, average):
    family, given = FILES[name]
    more = {"average": average} if average == "model" else {}
    found = pretrained.read(FORMATS / name, family, **given, **more)
    x, t, y, output, kwargs = expected(name, average)
    net, data = found.model.network, found.model.data
    sizes = (kwargs["depth"], kwargs["num_heads"], kwargs["hidden_size"], kwargs["patch_size"])
    assert (net.depth, net.heads, net.width, net.patch_size) == sizes
    assert (data.shape, data.num_classes) == (x.shape[1:], kwargs["num_classes"])
    assert found.model.preconditioning == PROCESS[found.family] == PROCESS[name.partition("/")[0]]
    got = jax.jit(net.apply)({"params": found.params}, x, t, Condition(jnp.int32(y)))
    got = np.asarray(got)[..., : output.shape[-1]]
    assert np.abs(got - output).max() < 1e-5 * np.abs(output).max()
    assert parts.model_of(json.loads(json.dumps(parts.describe(found.model)))) == found.model

    written, original = pretrained.state(found), content(name, average)
    assert written.keys() == original.keys()
    for key, value in original.items():
        assert written[key].dtype == value.dtype
        np.testing.assert_array_equal(written[key], value, key)


def test_every_tensor_is_used():
    """Another value of any tensor, one at a time, gives another output or is given back.

    The bias of the keys' norm adds the same number to all attention logits of a query.
    """
    name = "repa/REPA-qknorm.pt"
    state, (x, t, y, *_) = content(name), expected(name)

    @jax.jit
    def output(params):
        return net.apply({"params": params}, x, t, Condition(jnp.int32(y)))

    net = (first := dit.read("repa", state, {}, {})).model.network
    usual = output(first.params)
    for key, value in state.items():
        changed = state | {key: value + np.random.default_rng(0).normal(size=value.shape)}
        found = dit.read("repa", changed, {}, {})
        if key.startswith("projectors."):
            assert (found.rest[key] == changed[key]).all()
        elif not key.endswith("k_norm.bias"):
            assert np.abs(output(found.params) - usual).max() > 1e-4, key


def test_types_are_kept(tmp_path):
    """A file with tensors of three types."""
    state = dict(content("sit/SiT-no-sigma.pt"))
    state = {name: np.asarray(value).astype(np.float16) for name, value in state.items()}
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"].astype(jnp.bfloat16)
    state["pos_embed"] = state["pos_embed"].astype(np.float32)
    tensors.save(tmp_path / "mixed.safetensors", state)
    found = pretrained.read(tmp_path / "mixed.safetensors", "sit", heads=3)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.params)} == {"float32"}
    written = pretrained.state(found)
    for key, value in state.items():
        assert written[key].dtype == value.dtype
        np.testing.assert_array_equal(written[key], value)


MANIFEST = json.loads((FORMATS / "broken/MANIFEST.json").read_text())
FAMILY = {"DiT": "dit", "SiT": "sit", "REPA": "repa", "edm2": "edm2"}
# What errors say, of files that can be read; of others, that they are no files of tensors.
WORDS = {
    "edm2-missing-tensor.pkl": "'unet.enc.4x4_block0.emb_gain' is missing",
    "edm2-extra-tensor.pkl": "'unet.enc.4x4_block0.surprise'.* is unexpected",
    "edm2-misshapen-scalar.pkl": r"'unet.out_gain' is .*\(2,\)",
    "edm2-misshapen-tensor.pkl": r"'unet.out_conv.weight' is .*\(3, 3, 3, 3\).*\(3, 4, 3, 3\)",
    "edm2-no-ema.pkl": "no network .ema.",
}
UNREADABLE = ("truncated", "hostile", "complex", "short-storage", "safetensors")


@pytest.mark.parametrize("name", [name for name in MANIFEST if not name.endswith(".zip")])
def test_damaged_and_hostile_files_end_in_one_error(name, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"heads": 1} if name.endswith(".pt") else {}
    family = FAMILY.get(name.partition("-")[0], "")
    if MANIFEST[name]["expect"] == "loads" or "CANNOT be detected" in MANIFEST[name]["expect"]:
        pretrained.read(FORMATS / "broken" / name, family, **given)
    else:
        unreadable = any(word in name for word in UNREADABLE) and "module-src" not in name
        words = "is not a file of tensors" if unreadable else WORDS.get(name, "")
        with pytest.raises(ValueError, match=f"{name} .*{words}"):
            pretrained.convert(FORMATS / "broken" / name, tmp_path / "run", family, **given)
    output, errors = capfd.readouterr()
    assert "HOSTILE" not in output + errors
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "family", "given", "message"),
    [
        ("dit/DiT-legacy-format.pt", "", {}, "cannot be told apart: give --family=dit or"),
        ("dit/DiT-legacy-format.pt", "dit", {}, r"does not hold heads: give it, as --set=heads="),
        ("dit/DiT-train-0050000.pt", "sit", {"heads": 2}, "family 'dit', not 'sit'"),
        ("dit/DiT-train-0050000.pt", "dit", {"heads": 5}, "multiple of 5"),
        ("sit/SiT-no-sigma.pt", "sit", {"heads": 3, "classes": 5}, "classes is not used.*'num_cl"),
        ("sit/SiT-no-sigma.pt", "sit", {"heads": 3, "num_classes": 4}, "6 labels; .*num_classes=4"),
        (
            "sit/SiT-no-sigma.pt",
            "sit",
            {"heads": 3, "image_size": 16},
            r"'pos_embed' .*\(1, 16, 24",
        ),
        ("sit/SiT-no-sigma.pt", "sit", {"heads": 3, "path_type": "arc"}, "path_type is 'arc'"),
        ("sit/SiT-no-sigma.pt", "edm2", {}, "give --family=dit or --family=sit"),
        ("dit/DiT-legacy-format.pt", "diffusers", {}, "give --family=dit or --family=sit"),
        ("sit/SiT-no-sigma.pt", "dinov2", {}, "Unknown family 'dinov2'"),
        ("repa/REPA-qknorm.pt", "repa", {"average": "model"}, "average is not used"),
        ("dit/DiT-train-0050000.pt", "dit", {"average": "opt"}, "average is 'opt'.*'ema', 'model'"),
    ],
)
def test_what_a_file_does_not_tell_is_asked_for(name, family, given, message):
    with pytest.raises(ValueError, match=message):
        pretrained.read(FORMATS / name, family, **given)


def test_a_table_without_a_null_label():
    """All rows are classes: guidance has no second answer, and the row that is added goes."""
    found = pretrained.read(FORMATS / "sit/SiT-no-sigma.pt", "sit", heads=3, num_classes=6)
    assert (found.model.data.num_classes, found.model.data.has_null) == (6, False)
    written = pretrained.state(found)["y_embedder.embedding_table.weight"]
    original = content("sit/SiT-no-sigma.pt")["y_embedder.embedding_table.weight"]
    np.testing.assert_array_equal(written, original)
    assert parts.model_of(parts.describe(found.model)).data == found.model.data


def test_a_published_model_is_sampled_trained_and_given_back(tmp_path):
    """The commands of docs/published.md; DiT's variance channels keep their kernels."""
    file, base, tuned = FORMATS / "dit/DiT-train-0050000.pt", tmp_path / "dit", tmp_path / "mclr"
    draw = np.random.default_rng(0).normal
    images = np.float32(draw(size=(48, 4, 4, 4)))
    np.savez(tmp_path / "latents.npz", images=images, labels=np.arange(48) % 6)
    data = f"--config.data.name=npz:{tmp_path}/latents.npz"

    output = commands.call("convert", f"--input={file}", "--set=heads=2", f"--out={base}")
    assert "31464 parameters for examples of shape (4, 4, 4) in 6 classes" in output
    sampling = ["--num_samples=6", "--sampler=euler", "--steps=3"]
    commands.call("sample", f"--workdir={base}", f"--out={tmp_path}/base.npz", *sampling)
    commands.call(
        "train", "--config=configs/finetune.py", f"--config.init_from={base}", data,
        "--config.num_steps=4", "--config.batch_size=8", "--config.eval_examples=0",
        "--config.optimizer.learning_rate=1e-3", "--config.optimizer.warmup_steps=0",
        f"--workdir={tuned}",
    )  # fmt: skip
    commands.call("sample", f"--workdir={tuned}", f"--out={tmp_path}/tuned.npz", *sampling)
    samples = [np.load(tmp_path / f"{name}.npz")["images"] for name in ("base", "tuned")]
    assert 1e-3 < np.abs(samples[0] - samples[1]).max() < np.inf

    original = content("dit/DiT-train-0050000.pt")
    for run in (base, tuned):
        out = tmp_path / f"{run.name}.safetensors"
        commands.call("convert", f"--workdir={run}", f"--to={out}", "--ema=none")
        written = tensors.load(out)
        same = {name for name, value in original.items() if np.array_equal(written[name], value)}
        assert written.keys() == original.keys()
        assert same == (original.keys() if run == base else {"pos_embed"})
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        changed = (written[name] != original[name]).reshape(8, -1).any(1)
        assert (changed == [True] * 4 + [False] * 4).all()
    with pytest.raises(ValueError, match=r"has a run already"):
        pretrained.convert(file, base, heads=2)
    loaded, _ = runs.load(base).weights()
    again = pretrained.read(file, heads=2).params
    jax.tree.map(np.testing.assert_array_equal, loaded, again)
    shutil.rmtree(base)  # what is needed of it is in the other run
    published.export(runs.load(tuned), loaded, tmp_path / "again.safetensors")
    assert tensors.load(tmp_path / "again.safetensors").keys() == original.keys()
    origin = json.loads((tuned / "run.json").read_text())["origin"]
    assert (origin["family"], origin["average"], origin["file"]) == ("dit", "ema", str(file))


def test_projectors_are_kept_beside_a_run(tmp_path, caplog):
    """In bfloat16, which npz files do not have; without the base they are left out, and told."""
    state = content("repa/REPA-qknorm.pt")
    state = {name: np.asarray(value).astype(jnp.bfloat16) for name, value in state.items()}
    tensors.save(tmp_path / "repa.safetensors", state)
    run = pretrained.convert(tmp_path / "repa.safetensors", tmp_path / "run")
    pretrained.export(run, run.weights()[0], tmp_path / "out.safetensors")
    written = tensors.load(tmp_path / "out.safetensors")
    assert written.keys() == state.keys()
    for name, value in state.items():
        assert written[name].dtype == value.dtype
        np.testing.assert_array_equal(written[name], value)
    (tmp_path / "run" / published.REST).unlink()
    pretrained.export(run, run.weights()[0], tmp_path / "less.safetensors")
    lost = {name for name in state if name.startswith("projectors.")}
    assert tensors.load(tmp_path / "less.safetensors").keys() == state.keys() - lost
    assert all(name in caplog.text for name in lost)


def test_the_name_of_an_edm2_file_tells_its_average():
    found = pretrained.read(FORMATS / "edm2/edm2-lat8-cond-0131072-0.075.pkl")
    assert (found.facts["kimg"], found.facts["average"]) == (131072, "power_0.075")


def test_only_what_comes_from_a_published_model_is_written(tmp_path):
    run = runs.Run(tmp_path, None, None)
    with pytest.raises(ValueError, match=r"comes from no published model"):
        published.export(run, {}, tmp_path / "out.safetensors")
