"""Files that are written whole or not at all, and read although damaged."""

import json

import numpy as np
import pytest

from mclr_jax import files


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    files.write_atomically(tmp_path / "a", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match=r"disk full.*/a'"):
        files.write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_what_cannot_be_added_names_the_file(tmp_path):
    files.append(tmp_path / "a", "one\n")
    files.append(str(tmp_path / "a"), "two\n")
    assert (tmp_path / "a").read_text() == "one\ntwo\n"
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        files.append("/dev/full", "x" * 10_000)


def test_the_folder_is_made_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "b" / "c" / "a.bin"
    files.write_atomically(str(path), b"\x00\xff")
    files.write_atomically(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_json_and_arrays_come_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "d"}}
    files.write_json(tmp_path / "x" / "a.json", value)
    text = (tmp_path / "x" / "a.json").read_text()
    assert json.loads(text) == value
    assert text.count("\n") > 5  # to be read by people
    images = np.arange(6, dtype=np.uint8).reshape(2, 3)
    files.save_arrays(tmp_path / "y" / "a.npz", images=images, labels=[0, 1])
    with np.load(tmp_path / "y" / "a.npz") as stored:
        assert sorted(stored) == ["images", "labels"]
        np.testing.assert_array_equal(stored["images"], images)
        assert stored["images"].dtype == np.uint8
        np.testing.assert_array_equal(stored["labels"], [0, 1])


def test_lines_that_are_no_records_are_left_out(tmp_path):
    assert list(files.read_lines(tmp_path / "none.jsonl")) == []
    path = tmp_path / "a.jsonl"
    good = [b'{"step": 1, "loss": 0.5}', b'{"loss": 2.0, "step": 2}']
    bad = [b"3", b'"step"', b"[1]", b"null", b'{"a": 1}', b'{"step": "3"}', b'{"step": 1.5}', b"",
           b"\xff\xfe\x00", b"[" * 100_000, b'{"step": 4, "lo']  # fmt: skip
    path.write_bytes(b"\n".join([*bad[:5], good[0], *bad[5:], good[1], bad[-1]]))
    assert list(files.read_lines(path)) == [json.loads(line) for line in good]


def test_flat():
    assert files.flat({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}
