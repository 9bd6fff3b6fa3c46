import json
import os
import pty
import re
import sys

import pytest

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


def test_other_processes_write_nothing(tmp_path, capsys):
    with Writer(tmp_path, 0, 100, enabled=False) as writer:
        writer.progress(10)
        writer.scalars(10, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""
