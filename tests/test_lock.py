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


ELSEWHERE = {"host": "elsewhere", "pid": 1, "since": "today", "born": "7"}


@pytest.mark.parametrize("content", ["", "{", "[3]", "{}", json.dumps(ELSEWHERE)])
def test_a_lock_of_another_host_or_that_nobody_can_read_is_respected(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    message = r"on (unknown|elsewhere) .*delete .*lock"
    with pytest.raises(RuntimeError, match=message), lock.locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == content


def test_a_lock_needs_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: os.stat("/nowhere"))  # raises an OSError
    with lock.locked(tmp_path), pytest.raises(RuntimeError, match=f"Process {os.getpid()} "):
        with lock.locked(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_a_number_that_another_process_has_got_is_no_holder(tmp_path):
    holder = ELSEWHERE | {"host": socket.gethostname(), "pid": os.getpid()}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["born"] != "7"
