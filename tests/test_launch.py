"""The command lines, as a user types them."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from commands import call
from PIL import Image

from mclr_jax import generate, images

ROOT = pathlib.Path(__file__).parent.parent
SMALL = """
    --config.num_steps=4 --config.batch_size=8 --config.eval_examples=8 --config.sample_every=0
    --config.checkpoint_every=2 --config.network.name=tiny:Linear
    --config.optimizer.learning_rate=0.03 --config.optimizer.warmup_steps=0
    --config.noise.name=loguniform --config.noise.sigma_min=0.02
""".split()


def test_a_module_runs_as_a_process_of_its_own():
    command = [sys.executable, "-m", "launch.sample", "--workdir=nowhere", "--out=x.npz"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "nowhere is not the directory of a run" in result.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("launch") / "run"
    log = call("train", "digits", f"--workdir={path}", *SMALL)
    assert "jax" in log  # the banner
    assert "1 device(s)" in log
    assert "config.noise is now loguniform, without mean, std" in log
    return path


def test_a_name_on_the_command_line_brings_its_options(workdir):
    noise = json.loads((workdir / "run.json").read_text())["config"]["noise"]
    assert noise == {"name": "loguniform", "sigma_min": 0.02, "sigma_max": 80.0}


def test_sample_writes_arrays_and_a_picture(workdir, tmp_path):
    out = tmp_path / "deep" / "x.npz"
    arguments = [f"--workdir={workdir}", "--num_samples=7", "--seed=3", "--sampler=heun",
                 "--steps=3", "--labels=0,1,2"]  # fmt: skip
    guidance = ["--guidance_scale=2.0", "--guidance_interval=0.1,5.0"]
    call("sample", *arguments, *guidance, f"--out={out}")
    with np.load(out) as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (7, 8, 8, 1)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert Image.open(out.with_suffix(".png")).size[1] > 3 * 40
    # Fewer samples of the same seed are the first ones; another guidance scale changes them.
    call("sample", *arguments, "--num_samples=2", f"--out={tmp_path / 'plain.npz'}")
    assert np.abs(images[:2] - np.load(tmp_path / "plain.npz")["images"]).max() > 1e-4


def test_compare_draws_several_runs_from_the_same_noise(workdir, tmp_path):
    """Of directories, or of names beside --workdir; the samples are those of single calls."""
    shutil.copytree(workdir, tmp_path / "base")
    given = ["--num_samples=4", "--labels=7,3", "--steps=2", "--seed=5"]
    expected = {}
    for name, scale in {"base, scale 2": "2", f"{workdir}": "1"}.items():
        out = tmp_path / "x.npz"
        call("sample", f"--workdir={workdir}", *given, f"--guidance_scale={scale}", f"--out={out}")
        with np.load(out) as file:
            expected[name], labels = file["images"], file["labels"]
    picture, beside = tmp_path / "c.png", f"--workdir={tmp_path / 'any'}"
    log = call("sample", f"--compare=base:2,{workdir}", beside, *given, f"--out={picture}")
    assert f"Wrote {picture}." in log
    assert [path.name for path in tmp_path.glob("c.*")] == ["c.png"]
    np.testing.assert_array_equal(Image.open(picture), images.side_by_side(expected, labels))
    assert np.abs(expected["base, scale 2"] - expected[f"{workdir}"]).max() > 1e-3
    for arguments, status, message in [
        (
            ["--compare=base:x", beside, "--out=c.png"],
            1,
            "has 'base:x'; expected RUN, or RUN:SCALE",
        ),
        (["--compare=bas", beside, "--out=c.png"], 1, "bas is not the directory of a run"),
        (["--compare=base", beside, "--out=c.npz"], 2, "expected a name that ends in .png"),
        (["--out=c.npz"], 2, "Name a run by --workdir, or several by --compare"),
    ]:
        assert message in call("sample", *arguments, expect=status)


@pytest.mark.parametrize(("text", "message"), [
    ("[1, 1, 1]", "x.json: expected the --out of mclr calibrate"),
    ('{"rows": []}', r"the --out of mclr calibrate \('class_strengths'\)"),
    ("PK\x03", "the --out of mclr calibrate"),
    ('{"class_strengths": [1, 1]}', "x.json has 2 values; expected 3, one per class"),
    ('{"class_strengths": [1, 1, NaN]}', r"x.json\[2\] is nan; expected a number of at least 0"),
    ('{"class_strengths": "abc"}', "x.json is 'abc'; expected any number of values"),
])  # fmt: skip
def test_a_file_without_strengths_for_these_classes_is_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        generate.class_strengths(str(path), 3)
    path.write_text('{"class_strengths": [1, 0.5, 0]}')
    assert generate.class_strengths(str(path), 3) == [1, 0.5, 0]


CONFIG = "--config=configs/digits.py"


@pytest.mark.parametrize(("module", "arguments", "message"), [
    ("train", [CONFIG, "--config.num_stpes=3"], "Did you mean 'num_steps'?"),
    ("train", [CONFIG, "--config.data.nmae=x"], "Did you mean 'name'"),
    ("train", [CONFIG, "--config.optimizer.lr=1"], "config.optimizer has no key 'lr'. Known: b1"),
    ("train", [CONFIG, "--config.seed.x=1"], "--config.seed.x: config.seed has no key 'x'"),
    ("train", [CONFIG, "--config.num_steps=1e3"], "num_steps=1e3: expected an integer."),
    ("train", [CONFIG, "--config.objective=mclr"], "--config.objective is a section; set its"),
    ("train", [CONFIG, "--config.noise.name=logunifrm"], "Did you mean 'loguniform'"),
    ("train", [CONFIG, "--config.noise.name", "loguniform", "--config.noise.std=1"],
     "config.noise has no key 'std'. Known: name, sigma_max, sigma_min"),
    ("train", ["--config.num_steps=3"], "--config.num_steps needs --config=NAME"),
    ("train", ["--config=configs/digit.py"], "Did you mean 'configs/digits.py'"),
    ("train", [CONFIG + ":x"], "digits.py:x cannot be loaded: TypeError: get_config() takes"),
    ("train", ["--config=digit"], "Did you mean 'digits'"),
    ("train", ["mine/digits.py"], "Did you mean 'digits', of the package?"),
    ("train", ["digits", "oops", "--workdir=x"], "Unexpected argument 'oops'"),
    ("train", [CONFIG, "--wrkdir=x"], "Did you mean: workdir"),
    ("train", [CONFIG], "--workdir"),
    ("sample", ["--workdir=x", "--out=y.npz", "oops"], "Unexpected argument 'oops'"),
    ("sample", ["--workdir=x", "--out=y.npz", "--num_sample=3"], "Did you mean: num_samples"),
    ("sample", ["--workdir=x", "--out=y.npz", "--sampler=huen"], "dpmpp_2m|euler|heun"),
])  # fmt: skip
def test_a_mistake_stops_at_once_and_names_the_nearest(module, arguments, message):
    log = call(module, *arguments, expect=2)
    assert message in log
    assert "Traceback" not in log


def test_a_config_file_that_fails_is_named_with_its_error(tmp_path):
    path = tmp_path / "mine.py"
    for text, message in {"x = (": "SyntaxError: .*line 1", "import nothing_here": "ModuleNot",
                          "x = 1 / 0": "ZeroDivision", "x = 1": "get_config"}.items():  # fmt: skip
        path.write_text(text)
        log = call("train", f"--config={path}", f"--workdir={tmp_path}", expect=2)
        assert re.fullmatch(rf"--config=.*mine\.py cannot be loaded: .*{message}.*\n", log)


def test_values_that_make_no_sense_are_explained(workdir, tmp_path):
    train = [CONFIG, f"--workdir={tmp_path / 'w'}", *SMALL]
    sample = [f"--workdir={workdir}", "--out=x.npz"]
    for module, arguments, status, message in [
        ("train", [*train, "--config.parallel=pmpa"], 1, "parallel is 'pmpa'. Did you mean 'pmap'"),
        ("train", [*train, "--config.require_accelerator"], 1, "no accelerator"),
        ("plan", [CONFIG, "--topology=v5e:1x1", "--guidance_scale=2"], 1, "set --sample_batch"),
        ("sample", [f"--workdir={tmp_path}", "--out=x.npz"], 1, "not the directory of a run"),
        ("sample", [*sample, "--labels=0,11"], 1, "Labels must lie in 0..10"),
        ("sample", [*sample, f"--labels={10**20}"], 1, "Got labels of object; expected integers"),
        ("sample", [*sample, "--guidance_interval=1"], 2, "interval is '1'; expected 2 numbers"),
    ]:
        assert message in call(module, *arguments, expect=status)
    assert not (ROOT / "x.npz").exists()
    (tmp_path / "file").touch()
    log = call("sample", f"--workdir={workdir}", f"--out={tmp_path / 'file' / 'x.npz'}", expect=2)
    assert "where no file can be written (File exists)" in log


MODULES = "train", "plan", "sample", "evaluate", "icr", "report", "demo", "assimilate", "calibrate"


@pytest.mark.parametrize("module", MODULES)
def test_help_is_worth_reading(module):
    text = call(module, "--help", expect=1)  # absl exits with 1 after help
    assert f"\n  mclr {module} " in text
    assert "--workdir" in text or "--out" in text
    rate = "optimizer.learning_rate=0.001: after the warm-up; at least 0 and at most 1000000\n"
    beta = "objective.negative_weight=1000.0: lambda; at least 0 and at most 1000000000 [cca]\n"
    assert (rate in text and beta in text) == (module in ("train", "plan"))


@pytest.mark.parametrize(("module", "arguments", "flag"), [
    ("train", [CONFIG, "--workdir=gs://bucket/run"], "--workdir is 'gs://bucket/run'"),
    ("train", [CONFIG, "--workdir=W", "--config.data.path=s3://b"], "--config.data.path is 's3"),
    ("train", [CONFIG, "--workdir=W", "--config.data.name=zip:gs://b/a.zip"], "--config.data.name"),
    ("sample", ["--workdir=W", "--out=gs://bucket/a.npz"], "--out is 'gs://bucket/a.npz', a URL"),
    ("evaluate", ["--workdir=W", "--features=classifier:hf://a/b", "--out=W"], "--features is"),
    ("evaluate", ["--workdir=W", "--features=x", "--out=W", "--emas=,http://x"], "--emas is 'http"),
    ("report", ["file:///runs/a", "--out=W/a.html"], "--argument is 'file:///runs/a', a URL"),
])  # fmt: skip
def test_urls_are_no_paths(module, arguments, flag, tmp_path):
    arguments = [argument.replace("=W", f"={tmp_path / 'w'}") for argument in arguments]
    log = call(module, *arguments, expect=2)
    assert flag in log
    assert "Copy the files here, or mount the bucket" in log
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "keys"), [
    (["--config.learning_rate=1"], "--config.optimizer.learning_rate?"),
    (["--config.optimizer.num_steps=1"], "--config.num_steps or --config.sampler.num_steps or"),
    (["--config.beta=1"], "--config.objective.beta?"),  # of objectives that are not this one
    (["--steps=1"], "--config.num_steps or"),
    (["--learning_rate=1"], "--config.optimizer.learning_rate?"),
])  # fmt: skip
def test_a_key_in_the_wrong_place_is_told_its_own(arguments, keys):
    log = call("train", CONFIG, "--workdir=x", *arguments, expect=2)
    assert f"Did you mean {keys}" in log


def test_the_word_null_draws_samples_of_no_class(workdir, tmp_path):
    arguments = [f"--workdir={workdir}", "--num_samples=3", "--steps=1"]
    call("sample", *arguments, "--labels=null,2", f"--out={tmp_path / 'x.npz'}")
    with np.load(tmp_path / "x.npz") as file:
        assert file["labels"].tolist() == [10, 2, 10]
    out = tmp_path / "new" / "deep" / "y.npz"
    log = call("sample", *arguments, "--labels=10,2", f"--out={out}", expect=1)
    assert "--labels has 10, which is no class; for samples of none write null" in log
    log = call("sample", *arguments, "--labels=11", f"--out={out}", expect=1)
    assert "Labels must lie in 0..10" in log
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # none was left


def test_autoguidance_by_a_run_of_other_classes_is_refused(workdir, tmp_path):
    source = {"images": np.zeros((9, 8, 8, 1), np.uint8), "labels": np.arange(9) % 3}
    np.savez(tmp_path / "three.npz", **source)
    tiny.describe(tmp_path / "weak", given=tiny.config(
        "digits", sigma_data=1.0, **{"data.name": f"npz:{tmp_path / 'three.npz'}"}
    ))  # fmt: skip
    given = [f"--workdir={workdir}", f"--autoguidance={tmp_path / 'weak'}"]
    log = call("sample", *given, "--guidance_scale=2", f"--out={tmp_path / 'x.npz'}", expect=1)
    assert re.search(r"'autoguidance' in '.*weak': .* \(8, 8, 1\), 10, .* of \(.*\), 3\.", log)


def test_guidance_of_a_model_that_never_saw_the_null_label_is_warned_of(workdir, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    told = json.loads((run / "run.json").read_text())
    told["config"]["objective"]["label_dropout"] = 0.0
    (run / "run.json").write_text(json.dumps(told))
    given = [f"--workdir={run}", "--num_samples=1", "--steps=1", f"--out={tmp_path / 'x.npz'}"]
    warning = "was trained with objective.label_dropout=0.0, and so was not shown the null label"
    assert warning in call("sample", *given, "--guidance_scale=3")
    assert warning not in call("sample", *given)


def test_a_folder_of_images_becomes_samples_by_names_of_classes(tmp_path, monkeypatch):
    """And with one key, without labels, an unconditional model."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    for index, name in enumerate(["cat", "dog", "ox"] * 10):
        (file := tmp_path / "set" / name / f"{index}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 9 + index % 2, 3), np.uint8)).save(file)
    log = call("inspect", str(tmp_path / "set"), f"--out={tmp_path / 'set.png'}")
    assert re.search(r"9 x 12 to 10 x 12 pixels.*\ncat +9 +1\n", log, re.DOTALL)
    assert Image.open(tmp_path / "set.png").size[1] == 3 * 68 + 4
    out = tmp_path / "set.zip"
    assert "30 images" in call("data", str(tmp_path / "set"), "--resolution=8", f"--out={out}")
    part = call("data", str(out), "--split=train", f"--out={tmp_path / 'part.zip'}")
    assert "30 images of (8, 8, 3) in 3 classes" in part
    images = [f"--config.data.name=folder:{tmp_path / 'set'}", "--config.data.resolution=8"]
    run = f"--workdir={tmp_path / 'run'}"
    log = call("train", "digits", run, *SMALL, *images, "--config.sample_every=2")
    assert "3 of 30 examples are held out" in log
    call(
        "sample",
        run,
        "--num_samples=3",
        "--steps=1",
        "--labels=ox,1",
        f"--out={tmp_path / 'x.npz'}",
    )
    with np.load(tmp_path / "x.npz") as file:
        assert file["labels"].tolist() == [2, 1, 2]
    log = call("sample", run, "--labels=oks", f"--out={tmp_path / 'x.npz'}", expect=1)
    assert "'oks', which is no class" in log
    free = f"--workdir={tmp_path / 'free'}"
    call("train", "digits", free, *SMALL, *images, "--config.data.unconditional=True")
    call("sample", free, "--num_samples=2", "--steps=1", f"--out={tmp_path / 'y.npz'}")
    with np.load(tmp_path / "y.npz") as file:
        assert file["labels"].tolist() == [0, 0]
