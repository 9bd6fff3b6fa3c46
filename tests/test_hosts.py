"""Several hosts: the flags with which processes meet, and the example files of docs/hosts."""

import pathlib
import re
import shlex
import socket
import subprocess
import threading
import types

import pytest
import yaml
from commands import call, fork, start

from mclr_jax import meeting
from mclr_jax.configs import cifar10
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
    assert re.search(message, fork("train", *required, *arguments, expect=status))
    assert not (tmp_path / "run").exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("fault", ["folders", "data"])
def test_an_error_of_one_process_ends_both_at_once_with_its_message(fault, tmp_path):
    port, processes = free_port(), []
    for number in (0, 1):
        folder = tmp_path / ("ab"[number] if fault == "folders" else "shared")
        given = ["--config=configs/digits.py", f"--workdir={folder}", "--num_processes=2",
                 f"--coordinator=127.0.0.1:{port}", f"--process_id={number}"]  # fmt: skip
        if fault == "data" and number:
            given.append("--config.data.name=npz:nowhere.npz")
        log = tmp_path / f"{number}.log"
        processes.append((start("launch.train", given, log), log))
    message = {
        "folders": f"RuntimeError: --workdir is {tmp_path / 'a'} on .* for process 0, and another "
        f"folder, {tmp_path / 'b'} on .* for process 1: name one on a disk that all hosts share",
        "data": r"FileNotFoundError: .*nowhere\.npz",
    }[fault]
    for process, log in processes:
        process.join(120)
        assert process.exitcode == 1
        assert re.search(message, log.read_text())
    prefix = "Process 0: " if fault == "folders" else "Process 1: "
    assert [prefix in log.read_text() for _, log in processes] == [fault == "data", fault != "data"]
    assert {path.name for path in tmp_path.iterdir()} <= {"0.log", "1.log", "shared"}


def test_a_process_does_not_read_its_own_message_as_that_of_another(monkeypatch):
    """It ends while it asks for messages: what it has told the others is in the answer."""
    ended, told = [], threading.Event()

    def ask(key):
        told.set()  # as `end` does before it tells
        return "Process 0: message"

    client = types.SimpleNamespace(key_value_try_get=ask)
    monkeypatch.setattr(meeting, "service", lambda: types.SimpleNamespace(client=client))
    monkeypatch.setattr(meeting, "_alone", told)
    monkeypatch.setattr(meeting, "_exit", ended.append)
    meeting._listen()
    assert told.is_set()
    assert not ended


@pytest.mark.parametrize("first", [True, False])
def test_the_error_that_came_first_is_the_message(first, monkeypatch):
    """The end of one process can fail what another does before that one has asked for messages."""
    store, ended = {} if first else {"mclr/error": "Process 1: the cause"}, []

    def tell(key, value):
        if key in store:
            raise RuntimeError(f"{key} is there")
        store[key] = value

    client = types.SimpleNamespace(key_value_try_get=store.get, key_value_set=tell)
    state = types.SimpleNamespace(client=client, process_id=0)
    monkeypatch.setattr(meeting, "service", lambda: state)
    monkeypatch.setattr(meeting, "_alone", threading.Event())
    monkeypatch.setattr(meeting, "_exit", ended.append)
    meeting.end("connection closed")
    assert ended == ["connection closed" if first else "Process 1: the cause"]
    assert store == {"mclr/error": "Process 0: connection closed" if first else ended[0]}


def alone(port):
    """In a new process, one of two, the other of which is never started."""
    meeting.PATIENCE, meeting.WAIT = 3.0, 1.0
    meeting.meet(f"127.0.0.1:{port}", 2, 0)


def test_a_process_that_is_alone_says_so_and_ends_with_an_error(tmp_path):
    process = start(alone, [free_port()], tmp_path / "log")
    process.join(120)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 1
    assert text.count("Waiting for the other processes of --coordinator=127.0.0.1") > 1
    assert re.search("RuntimeError: The processes of .* did not meet within 3 s. Start all", text)
