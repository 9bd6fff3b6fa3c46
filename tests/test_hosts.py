"""Several hosts: the flags with which processes meet, and the example files of docs/hosts."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml
from commands import call

from configs import cifar10
from mclr_jax.files import flat

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "hosts"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])


def yaml_command():
    """The command line of the JobSet."""
    document = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    (job,) = document["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return document, job["template"]["spec"], container


def trainings():
    """The arguments of launch.train in each example file."""
    found = {"jobset.yaml": yaml_command()[2]["command"]}
    for path in SCRIPTS:
        text = path.read_text().replace("\\\n", " ")
        (line,) = re.findall(r"-m launch\.train [^\n\"|]*", text)
        found[path.name] = ["python", *shlex.split(line)]
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_run_one_command_with_flags_that_exist():
    commands = trainings()
    assert commands.keys() == {"jobset.yaml", "slurm.sbatch", "tpu_pod.sh"}
    keys = flat(cifar10.get_config().to_dict())
    text = call("train", "--helpfull", expect=1)
    flags = re.findall(r"^ +--(?:\[no\])?(\w+)", text, re.MULTILINE)
    for name, (python, dash, module, *arguments) in commands.items():
        assert (python, dash, module) == ("python", "-m", "launch.train")
        given = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
        assert given["coordinator"] == "auto", name
        assert given["config"] == "configs/cifar10.py"
        assert given["config.parallel"] in ("pmap", "data", "fsdp")
        for flag in given.keys() - {"config"}:
            assert flag.removeprefix("config.") in keys or flag in flags, f"{flag} in {name}"


def test_the_job_set_has_a_pod_for_each_host_of_the_slice():
    document, job, container = yaml_command()
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    pod = job["template"]["spec"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(rows) * int(columns)
    assert job["parallelism"] == job["completions"]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert cifar10.get_config().batch_size % chips == 0
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--num_processes=2"], r"--num_processes and --process_id need --coordinator"),
    (["--coordinator=host:1"], r"'host:1'; expected auto, or HOST:PORT together with"),
    (["--coordinator=host", "--num_processes=2", "--process_id=0"], "'host'; expected auto"),
    (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "2; expected 0 to 1 for 2"),
    (["--coordinator=auto"], r"auto found no TPU pod and no Slurm step; give --coordinator="),
])  # fmt: skip
def test_flags_that_do_not_fit_together_are_refused(arguments, message, tmp_path):
    status = 1 if arguments == ["--coordinator=auto"] else 2
    required = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    assert re.search(message, call("train", *required, *arguments, expect=status))
    assert not (tmp_path / "run").exists()
