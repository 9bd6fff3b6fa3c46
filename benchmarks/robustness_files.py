"""Damaged runs, and damaged or hostile files of data and weights."""

import gzip
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from outcomes import LOST, SILENT, WORKS, Case, attempt
from PIL import Image
from robustness_values import small
from tasks import ROOT

from mclr_jax import main, runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.files import read_lines
from mclr_jax.model import shapes_of
from mclr_jax.pretrained import tensors
from mclr_jax.representation import memorization

ODD = (None, True, -1, 0, 10**12, 1e400, math.nan, "", "x", [], [1], {}, {"a": 1}, "é")
LINES = ("[1]", "null", "3", '"step"', '{"step": null}', '{"step": "3", "icr": 1.0}', '{"step": 3',
         '{"step": true, "icr": 1}', '{"step": -5}', '{"step": 1e400}', '{"icr": 0.5}', "\0\0", "",
         '{"step": 6, "icr": [1]}', '{"step": 4, "loss": "low"}', "[" * 5000)  # fmt: skip


def damage(rng: random.Random, data: bytes, other: bytes = b"") -> tuple[str, bytes]:
    """What was done, and the damaged bytes, which differ from `data`."""
    at, size = rng.randrange(max(len(data), 1)), rng.randrange(1, 65)
    bit = 1 << rng.randrange(8)
    kinds = {
        "one flipped bit": data[:at] + bytes(b ^ bit for b in data[at : at + 1]) + data[at + 1 :],
        "truncated": data[:at],
        "emptied": b"",
        "overwritten": data[:at] + rng.randbytes(size) + data[at + size :],
        "a piece removed": data[:at] + data[at + size :],
        "a piece inserted": data[:at] + rng.randbytes(size) + data[at:],
        "zeros": bytes(len(data)),
        "appended": data + rng.randbytes(size),
        "another file": other or b"other",
    }  # fmt: skip
    kind = rng.choice([name for name, value in kinds.items() if value != data])
    return f"{kind} at {at} of {len(data)}", kinds[kind]


def edited(rng: random.Random, value: Any) -> tuple[str, Any]:
    """A JSON value with one part, at any depth, replaced or removed."""
    path, part = [], value
    while isinstance(part, dict | list) and part and (not path or rng.random() < 0.75):
        path.append(rng.choice([*part] if isinstance(part, dict) else range(len(part))))
        part = part[path[-1]]
    copy = here = json.loads(json.dumps(value))
    if not path:
        return "all", rng.choice(ODD)
    for key in path[:-1]:
        here = here[key]
    if rng.random() < 0.3:
        del here[path[-1]]
        return f"without {path}", copy
    here[path[-1]] = rng.choice(ODD)
    return f"{path} = {here[path[-1]]!r}", copy


# ---- runs ----------------------------------------------------------------------------------------


def spoil(rng: random.Random, run: pathlib.Path) -> str:
    """Damage a run in one place, and say how."""
    files = sorted(p for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts)
    file, other = rng.sample(files, 2)
    checkpoints, kind = run / "checkpoints", rng.random()
    if kind < 0.45:
        what, data = damage(rng, file.read_bytes(), other.read_bytes())
        file.write_bytes(data)
        return f"{file.relative_to(run)}: {what}"
    if kind < 0.55:
        file.unlink()
        return f"{file.relative_to(run)}: deleted"
    if kind < 0.7:
        path = run / "run.json"
        what, value = edited(rng, json.loads(path.read_text()))
        path.write_text(json.dumps(value))
        return f"run.json: {what}"
    if kind < 0.82:
        path, line = rng.choice((run, checkpoints)) / "metrics.jsonl", rng.choice(LINES)
        lines = path.read_text().splitlines()
        lines.insert(rng.randrange(len(lines) + 1), line)
        path.write_text("\n".join(lines) + "\n")
        return f"{path.relative_to(run)}: the line {line[:40]!r}"
    if kind < 0.9:
        name = rng.choice(("notes.txt", "latest", "7", "6.orbax-checkpoint-tmp", "-1", "x/y", "é"))
        path = checkpoints / name
        if rng.random() < 0.5:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text("stray")
        return f"checkpoints/{name}: stray {'folder' if path.is_dir() else 'file'}"
    first, second = rng.sample(("2", "4", "6"), 2)
    if kind < 0.94:
        for a, b in ((first, "x"), (second, first), ("x", second)):
            (checkpoints / a).rename(checkpoints / b)
        return f"checkpoints {first} and {second} swapped"
    if kind < 0.97:
        target = rng.choice((second, "9"))
        shutil.rmtree(checkpoints / target, ignore_errors=True)
        shutil.copytree(checkpoints / first, checkpoints / target)
        return f"checkpoint {first} copied to {target}"
    shutil.rmtree(checkpoints / first)
    return f"checkpoint {first} deleted"


def leaves(tree: Any) -> list[Any]:
    """As `jax.tree.leaves`, which does not look into classes of dictionaries."""
    if not isinstance(tree, dict | list | tuple):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in leaves(part)]


def same(a: Any, b: Any) -> bool:
    """Whether two trees have equal arrays."""
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def damaged_runs(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """`count` damages of a run of 3 checkpoints, which is then read, and one in 10 continued."""
    rng = random.Random(seed)
    changes = {"num_steps": 6, "checkpoint_every": 2, "keep_checkpoints": 3, "log_every": 2,
               "optimizer.schedule": "constant"}  # fmt: skip
    longer = small("digits", {**changes, "num_steps": 8})
    main.train(small("digits", changes), folder / "run")
    main.train(longer, folder / "whole")
    names = ("none", "halflife")
    intact = {n: {s: runs.load(folder / "run").weights(n, s)[0] for s in (2, 4, 6)} for n in names}
    final = runs.load(folder / "whole").weights()[0]
    for number in range(count):
        run = folder / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(folder / "run", run)
        what, name = spoil(rng, run), rng.choice(names)
        before = {path.name for path in (run / "checkpoints").iterdir()}

        def read(run: pathlib.Path = run, name: str = name) -> Any:
            list(read_lines(run / "metrics.jsonl"))
            memorization.past(run, 6)
            return runs.load(run).weights(name)

        outcome, detail, found = attempt(read)
        if found is not None:
            weights, step = found
            if not same(weights, intact[name].get(step)):
                outcome, detail = SILENT, f"other weights, called step {step}: {detail}"
            elif outcome == WORKS and step != 6 and (run / "checkpoints/6").exists():
                outcome, detail = SILENT, f"step {step} is read, and step 6 is not told of"
        yield Case(f"read {name}: {what}", outcome, detail)
        if number % 10 == 0:
            yield _continued(f"continued: {what}", longer, run, before, final)


def _continued(what: str, config: Any, run: pathlib.Path, before: set, final: Any) -> Case:
    outcome, detail, state = attempt(lambda: main.train(config, run), 60)
    found = {path.name for place in ("checkpoints", "broken") if (run / place).exists()
             for path in (run / place).iterdir()}  # fmt: skip
    if state is None:
        lost = before - found
        return Case(what, LOST if lost else outcome, f"{sorted(lost)} {detail}" if lost else detail)
    start = json.loads((run / "run.json").read_text())["history"][-1]["step"]
    if not same(state.ema["halflife"], final):
        return Case(what, SILENT, f"from step {start} to other weights: {detail}")
    if start == 0 and before & {"2", "4", "6"}:
        return Case(what, LOST, f"began anew beside checkpoints {sorted(before)}: {detail}")
    return Case(what, outcome, detail)


# ---- files of data and weights -------------------------------------------------------------------

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
LABELS = np.arange(6) % 3
TYPES = ("?", "i8", "i1", "u1", "u2", "f2", "f4", "f8", ">f4", "c8", "S3", "U2", "M8[s]", "O")
CHANGES = {
    "itself": lambda x: x, "first": lambda x: x[0], "none": lambda x: x[:0],
    "fewer": lambda x: x[:5], "one": lambda x: x[:1], "an axis more": lambda x: x[..., None],
    "turned": np.transpose, "a number": lambda x: x.ravel()[0],
    "negative": lambda x: -1 - x.astype(np.int64), "large": lambda x: x.astype(np.int64) + 2**40,
    "infinite": lambda x: x + np.float32(np.inf), "scaled": lambda x: np.float32(x / 127.5 - 1),
}  # fmt: skip
SIZES = ("10**13,", "1000000, 1000000", "-1, 8, 8, 3", "6, 8, 8, 3", "'a',", "6",
         "1000000000000, 8, 8, 3")  # fmt: skip
# Pieces of a pickle: names, calls, numbers, texts, lengths that nothing has, containers.
PIECES = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n",
          b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"R", b"\x85R", b")R",
          b"(K\0K\0tR", b"Q", b"b", b"}", b"]", b"a", b"K\x01", b"X\x01\0\0\0a", b"\x82\x01",
          b"j\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f",
          b"\x8e" + b"\xff" * 7 + b"\x7f")  # fmt: skip


class Evil:
    """Unpickling it makes the folder MARKER."""

    marker = ""

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def npz(**arrays: Any) -> bytes:
    np.savez(file := io.BytesIO(), **{"images": PIXELS, "labels": LABELS} | arrays)
    return file.getvalue()


def npy(array: Any) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    Image.fromarray(array).convert(mode).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def archive(files: dict[str, bytes], described: Any = ...) -> bytes:
    """A zip of these files and, unless `described` is None, a dataset.json of it."""
    file = io.BytesIO()
    if described is ...:
        described = {"labels": [[name, i % 3] for i, name in enumerate(files)]}
    with zipfile.ZipFile(file, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
        if described is not None:
            made.writestr("dataset.json", json.dumps(described))
    return file.getvalue()


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">I{array.ndim}I", 2048 + array.ndim, *array.shape)
    return header + array.tobytes()


def claims(shape: str, kind: str) -> bytes:
    """An npz whose images have an .npy header of this shape, whatever follows it."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({shape}), }}"
    text = text.encode().ljust(117) + b"\n"
    images = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)
    return archive({"images.npy": images, "labels.npy": npy(LABELS)}, None)


def images() -> dict[str, bytes]:
    return {f"{i}.png": png(pixels) for i, pixels in enumerate(PIXELS)}


def odd(rng: random.Random, array: np.ndarray) -> tuple[str, np.ndarray]:
    """What was changed, and an array of another type, with other values or another shape."""
    if rng.random() < 0.1:
        return "evil objects", np.array([Evil()] * 6, dtype=object)
    name = rng.choice([*CHANGES])
    changed = CHANGES[name](array)
    kind = rng.choice(TYPES) if rng.random() < 0.5 else changed.dtype
    with np.errstate(invalid="ignore"):
        return f"{name}, {kind}", changed.astype(kind)


def hostile(rng: random.Random) -> tuple[str, str, bytes]:
    """(what, format, content) of a file that is intact, but not what is wanted."""
    kind = rng.choice(("images", "labels", "header", "picture", "array", "labels of a zip", "tree"))
    if kind in ("images", "labels"):
        what, array = odd(rng, PIXELS if kind == "images" else LABELS)
        return f"{kind}: {what}", "npz", npz(**{kind: array})
    if kind == "header":
        size, type_ = rng.choice(SIZES), rng.choice(("|u1", "|O"))
        return f"an npz that claims ({size}) {type_}", "npz", claims(size, type_)
    if kind == "labels of a zip":
        what, value = edited(rng, {"labels": [[name, i % 3] for i, name in enumerate(images())]})
        return f"dataset.json {what}", "zip", archive(images(), value)
    if kind == "array":
        what, array = odd(rng, PIXELS[0])
        return f"an npy of a zip: {what}", "zip", archive({"0.npy": npy(array)})
    if kind == "picture":
        good, mode = png(PIXELS[0]), rng.choice(("P", "RGBA", "LA", "1", "L"))
        width, height = rng.choice(((2**15, 2**15), (10**5, 10**5), (2**31 - 1, 1), (0, 8)))
        sized = good[:16] + struct.pack(">II", width, height) + good[24:]
        sized = sized[:29] + struct.pack(">I", zlib.crc32(sized[12:29])) + sized[33:]
        other = {"sized": sized, "cut": good[:90], "none": b"", "smaller": png(PIXELS[0, :4]),
                 f"mode {mode}": png(PIXELS[0], mode)}  # fmt: skip
        name = rng.choice([*other])
        pair = (good, other[name]) if rng.random() < 0.5 else (other[name], good)
        files = dict(zip(("0.png", "1.png"), pair, strict=True))
        return f"a PNG of a zip: {name}", "zip", archive(files)
    tree = b"\x80\x02" + b"".join(rng.choices(PIECES, k=rng.randrange(1, 6))) + b"."
    tree = pickle.dumps(Evil(), 2) if rng.random() < 0.2 else tree
    content = archive({"a/data.pkl": tree}, None) if rng.random() < 0.5 else tree
    return f"a tree {tree[:80]!r}", "torch", content


def load(kind: str, path: pathlib.Path) -> Any:
    """What a file of this format holds, as a training reads it."""
    if kind == "torch":
        return tensors.load(path)
    if kind == "idx":
        source = sources.load("fashion_mnist", path=str(path.parent))
    else:
        source = sources.load(f"{kind}:{path}")
    rows = source[np.arange(len(source))]
    training = Training.parse(small("digits", {}))
    shapes_of(training.model(training.data_info(source)))
    return rows


def _wrong(what: str, found: Any, wanted: dict[str, Any]) -> str:
    """What is wrong with numbers that were read without an error, or nothing.

    The older format of PyTorch has no checksum, and zip and gzip files may have more at their ends.
    """
    for x in (x for x in leaves(found) if isinstance(x, np.ndarray | np.generic)):
        if x.dtype.kind in "OSUM" or not np.isfinite(np.float64(x)).all():
            return "no finite numbers"
    name = what.removeprefix("damaged ").partition(":")[0]
    checked = "damaged" in what and name != "torch legacy"
    if checked and not re.search("appended|another", what) and not same(found, wanted[name]):
        return "other numbers"
    return ""


def damaged_files(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """`count` files: half are hostile, and half intact files that are damaged at random."""
    rng, Evil.marker = random.Random(seed), str(folder / "marker")
    (folder / "t").mkdir()
    (folder / "t/train-labels-idx1-ubyte").write_bytes(idx(LABELS.astype(np.uint8)))
    intact = {
        "npz": npz(), "zip": archive(images()), "idx": gzip.compress(idx(PIXELS[..., 0])),
        "torch": (ROOT / "tests/data/tensors.pt").read_bytes(),
        "torch legacy": (ROOT / "tests/data/tensors_legacy.pt").read_bytes(),
    }  # fmt: skip
    names = {"idx": "t/train-images-idx3-ubyte.gz", "npz": "t/x.npz", "zip": "t/x.zip"}
    some = [hostile(rng) for _ in range(count // 2)]
    for _ in range(count - len(some)):
        name = rng.choice([*intact])
        what, content = damage(rng, intact[name], rng.choice([*intact.values()]))
        some.append((f"damaged {name}: {what}", name.split()[0], content))

    def read(kind: str, content: bytes) -> Any:
        path = folder / names.get(kind, "t/x.pt")
        path.unlink(missing_ok=True)  # what was read is mapped from the old file
        path.write_bytes(content)
        return load(kind, path)

    wanted = {name: read(name.split()[0], content) for name, content in intact.items()}
    for what, kind, content in some:
        outcome, detail, found = attempt(lambda kind=kind, content=content: read(kind, content))
        if pathlib.Path(Evil.marker).exists():
            os.rmdir(Evil.marker)
            outcome, detail = SILENT, "code was executed"
        elif found is not None and (wrong := _wrong(what, found, wanted)):
            outcome, detail = SILENT, wrong
        yield Case(what, outcome, detail)
