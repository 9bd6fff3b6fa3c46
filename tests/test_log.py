import datetime
import json
import os
import pathlib
import pty
import re
import struct
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from mclr_jax.training import log
from mclr_jax.training.log import Progress, Writer


def test_records_are_json_lines_and_each_step_stands_once(tmp_path):
    with Writer(tmp_path, 0, 100) as writer:
        for step in (10, 20, 30):
            writer.progress(step)
            writer.scalars(step, {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('3\n"x"\n{"a": 1}\n{"step": "15"}\n\n')  # no records
        file.write('{"step": 35, "lo')  # killed while writing
    with Writer(tmp_path, 20, 100) as writer:  # resumed from a checkpoint of step 20
        writer.scalars(30, {"loss": 3.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [(record["step"], record["loss"]) for record in map(json.loads, lines)]
    assert steps == [(10, 1.0), (20, 2.0), (30, 3.5)]
    assert not list(tmp_path.glob("*.tmp"))
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_without_a_terminal_each_report_is_a_plain_line(tmp_path, capsys):
    with Writer(tmp_path, 0, 100) as writer:
        assert "Compiling" in capsys.readouterr().err
        writer.progress(1)
        assert "Compiled in" in capsys.readouterr().err
        writer.progress(50)
        writer.scalars(50, {"loss": 0.25})
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 50/100 \(.* it/s, 00:00 left\): loss 0.25", line)


def test_a_long_silence_is_broken_and_the_rate_leaves_compilation_out(
    tmp_path, capsys, monkeypatch
):
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with Writer(tmp_path, 20, 100) as writer:
        now[0] += 60
        writer.progress(21)
        assert "Compiled in 60.0 s" in capsys.readouterr().err
        for step in range(22, 41):  # a second each
            now[0] += 1
            writer.progress(step)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" step 36/100 (1 it/s, 01:04 left)")


def test_progress_without_a_total(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with Progress(None, "image") as progress:
        for _ in range(4):
            now[0] += 10
            progress.update(20)
    lines = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["image 40 (2 it/s)", "image 80 (2 it/s)"]


@pytest.mark.parametrize(("columns", "expected"), [(0, False), (80, True)])
def test_a_terminal_without_width_gets_lines(monkeypatch, columns, expected):
    outer, inner = pty.openpty()
    with os.fdopen(outer, "rb"), os.fdopen(inner, "w") as terminal:
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(os, "get_terminal_size", lambda number: size)
        assert log._on_a_terminal() == expected


def test_other_processes_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "is_first", lambda: False)
    with Writer(tmp_path, 0, 100) as writer:
        writer.progress(10)
        writer.scalars(10, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def events(folder):
    """tag -> [(step, value)], in the format of TFRecord: length, its checksum, event, checksum."""
    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
    return found


def leveldb(content):
    """The records of a log in LevelDB's format: checksum, length and type, in blocks of 32 KiB."""
    at, whole = 7, b""  # the file has a header of its own
    content = bytes(at) + content
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def test_each_record_has_its_time_and_old_ones_are_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n')
    with Writer(tmp_path, 5, 100) as writer:
        writer.scalars(10, {"loss": 1.0})
    old, new = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert old == {"step": 5, "loss": 2.0}
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(new.pop("time"))
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    assert new == {"step": 10, "loss": 1.0}


def test_tensorboard_has_the_config_the_device_and_what_a_step_costs(tmp_path, monkeypatch):
    """128 examples a step, two steps a second, after a compilation that is not counted."""
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(log, "peak_memory", lambda: 3 * 2**29)
    config = {"seed": 3, "network": {"name": "dit", "heads": 2}, "ema": [0.05, 0.1]}
    given = {"config": config, "device": "jax on tpu", "batch_size": 128}
    with Writer(tmp_path, 0, 100, **given) as writer:
        now[0] += 60
        writer.progress(1)
        now[0] += 4.5
        writer.progress(10)
        writer.scalars(10, {"loss": 0.5})
        writer.scalars(10, {"eval_loss": 0.25})  # of a hook: no second rate
        now[0] += 5
        writer.scalars(20, {"loss": 0.25})
    found = events(tmp_path / "tensorboard")

    def scalars(tag):
        return [(step, value.simple_value) for step, value in found[tag]]

    assert scalars("loss") == [(10, 0.5), (20, 0.25)]
    assert scalars("images_per_second") == [(10, 256), (20, 256)]
    assert scalars("peak_memory_gib") == [(10, 1.5), (20, 1.5)]
    (_, text), (_, device) = found["config/text_summary"][0], found["device/text_summary"][0]
    assert text.tensor.string_val[0].decode().splitlines() == [
        "    seed = 3", "    network.name = dit", "    network.heads = 2", "    ema = [0.05, 0.1]"
    ]  # fmt: skip
    assert device.tensor.string_val[0] == b"jax on tpu"
    session = found["_hparams_/session_start_info"][0][1].metadata.plugin_data.content
    for word in (b"network.heads", b"[0.05, 0.1]", b"dit"):
        assert word in session
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert record.keys() == {"step", "loss", "time"}  # equal for equal trainings, but for the time


def test_memory_is_that_of_this_process_on_the_cpu():
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("Linux tells the peak of a process there")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    assert log.peak_memory() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_weights_and_biases_gets_all_offline_and_a_resumed_training_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    given = {"wandb": "mine", "config": {"network": {"heads": 2}}, "device": "jax on tpu"}
    for start, steps in (0, (10, 20, 30)), (20, (30, 40)):  # killed after the checkpoint of step 20
        with Writer(tmp_path / "run", start, 100, **given) as writer:
            for step in steps:
                writer.scalars(step, {"loss": step / 10})
            writer.image(step, "samples", np.zeros((4, 5, 3), np.uint8))
        time.sleep(1.1)  # the folder of a part has the second of its start as its name
    runs, history, metrics = [], [], []
    for path in sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb")):
        for data in leveldb(path.read_bytes()[7:]):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                items = record.history.item
                history.append({
                    item.key or item.nested_key[0]: json.loads(item.value_json) for item in items
                })  # fmt: skip
            if record.HasField("metric"):
                metrics.append((record.metric.glob_name, record.metric.step_metric))
    assert {(run.project, run.display_name) for run in runs} == {("mine", "run")}
    assert len({run.run_id for run in runs}) == 1
    config = {x.key: json.loads(x.value_json) for x in runs[0].config.update if x.key[0] != "_"}
    assert config == {"network": {"heads": 2}, "device": "jax on tpu"}
    assert [(row["step"], row["loss"]) for row in history if "loss" in row] == [
        (10, 1.0), (20, 2.0), (30, 3.0), (30, 3.0), (40, 4.0)
    ]  # fmt: skip
    assert [row["step"] for row in history if "samples" in row] == [30, 40]
    assert ("*", "step") in metrics


def test_without_the_library_or_a_login_a_project_is_an_error_before_the_first_step(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ImportError, match=r"expected the extra wandb: pip install"):
            Writer(tmp_path, 0, 9, wandb="mine").__enter__()
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # of the test before: what follows reads the environment anew
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc with a key
    with pytest.raises(RuntimeError, match="run wandb login, set WANDB_MODE=offline, or leave"):
        Writer(tmp_path, 0, 9, wandb="mine").__enter__()
