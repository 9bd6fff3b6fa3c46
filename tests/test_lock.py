"""One process trains in a directory at a time."""

import json
import multiprocessing
import os
import pathlib
import socket

import pytest

from mclr_jax.training import lock


def hold(workdir, held, done):
    with lock.locked(pathlib.Path(workdir)):
        held.set()
        done.wait(60)


def test_a_second_trainer_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    context = multiprocessing.get_context("forkserver")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), held, done))
    process.start()
    assert held.wait(60)
    where = f"Process {process.pid} on {socket.gethostname()} has trained in .* since"
    with pytest.raises(RuntimeError, match=where), lock.locked(tmp_path):
        pass
    process.kill()
    process.join()
    assert (tmp_path / "lock").exists()
    with lock.locked(tmp_path), pytest.raises(RuntimeError, match=f"Process {os.getpid()} "):
        with lock.locked(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_a_lock_of_another_host_is_respected(tmp_path):
    holder = {"host": "elsewhere", "pid": 1, "since": "today", "born": "7"}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with pytest.raises(RuntimeError, match=r"on elsewhere .*delete .*lock"), lock.locked(tmp_path):
        pass
    assert json.loads((tmp_path / "lock").read_text()) == holder


def test_a_lock_of_another_host_is_taken_over_without_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "SILENCE", 0.3)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with lock.locked(tmp_path):
        held = (tmp_path / "lock").read_text()
        monkeypatch.setattr(socket, "gethostname", lambda: "here")
        with pytest.raises(RuntimeError, match="on elsewhere"), lock.locked(tmp_path):
            pass
    (tmp_path / "lock").write_text(held)  # as if that host had lost its power
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["host"] == "here"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[3]", "{}"])
def test_a_lock_that_nobody_can_read_is_respected(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with pytest.raises(RuntimeError, match=r"unknown .*delete .*lock"), lock.locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == content


def test_a_lock_needs_no_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    with lock.locked(tmp_path), pytest.raises(RuntimeError, match=f"Process {os.getpid()} "):
        with lock.locked(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_a_number_that_another_process_has_got_is_no_holder(tmp_path):
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": "then", "born": "7"}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["born"] != "7"
