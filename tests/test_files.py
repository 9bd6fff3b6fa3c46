"""Files that are written whole or not at all, and read although damaged."""

import hashlib
import json
import pathlib
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax import __version__, files


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


def test_a_digest_tells_paths_shapes_types_and_values():
    """By its definition, and by a number that files of earlier versions have."""
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [np.array([3, 4], np.int32)]}
    told = hashlib.sha256()
    for path, leaf in {"['a']": tree["a"], "['b'][0]": tree["b"][0]}.items():
        told.update(f"{path}{np.shape(leaf)}{leaf.dtype}".encode() + leaf.tobytes())
    assert files.digest(tree) == told.hexdigest()[:16] == "14b5b88222a16890"
    a = tree["a"]
    on_a_device = {"b": [jnp.array([3, 4], jnp.int32)], "a": jnp.asarray(a)}
    assert files.digest(on_a_device) == files.digest(tree)
    others = [a.view(np.int32), a.reshape(3, 2), a + 1, a.T.reshape(2, 3), a.astype(np.float64)]
    trees = [{"a": other, "b": tree["b"]} for other in others] + [{"c": a, "b": tree["b"]}]
    assert len({files.digest(tree), *map(files.digest, trees)}) == 7


def test_a_revision_says_whether_files_have_changed(tmp_path, monkeypatch):
    """The hash of the commit, in spite of tags, and -dirty as long as a tracked file differs."""

    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        run = subprocess.run(["git", *name, *arguments], cwd=tmp_path, capture_output=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.decode().strip()

    module = tmp_path / "mclr_jax" / "files.py"
    module.parent.mkdir()
    shutil.copy(pathlib.Path(files.__file__), module)
    monkeypatch.setattr(files, "__file__", str(module))
    monkeypatch.delenv("MCLR_JAX_REVISION", raising=False)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    git("tag", "-a", "v1", "-m", "a tag")
    (tmp_path / "new").write_text("not tracked")
    commit = git("rev-parse", "HEAD")
    assert files.provenance()["revision"] == commit
    module.write_text(module.read_text() + "# changed")
    assert files.provenance()["revision"] == f"{commit}-dirty"
    git("checkout", "-q", ".")
    assert files.provenance()["revision"] == commit


def test_without_a_checkout_the_revision_is_the_version_or_that_of_the_environment(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("MCLR_JAX_REVISION", raising=False)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "mclr_jax" / "files.py"))
    assert files.provenance()["revision"] == f"version {__version__}"
    monkeypatch.setenv("MCLR_JAX_REVISION", "abc")
    assert files.provenance()["revision"] == "abc"


def test_made_folders_go_if_they_stay_empty(tmp_path):
    (tmp_path / "kept").mkdir()
    for content in (False, True):
        with files.made(folder := tmp_path / "kept" / "a" / "b", "inner"):
            (folder / "inner").mkdir()
            if content:
                (folder / "file").touch()
        names = ["kept", "a", "b", "file"]
        assert [path.name for path in tmp_path.rglob("*")] == (names if content else names[:1])
