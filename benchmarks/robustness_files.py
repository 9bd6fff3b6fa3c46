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

import jax
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


def same(a: Any, b: Any) -> bool:
    """Whether two trees have equal arrays."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
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


# ---- files of data -------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
LABELS = np.arange(6) % 3


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


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return size + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def archive(files: dict[str, bytes], described: Any = ...) -> bytes:
    """A zip of these files and, unless `described` is None, a dataset.json of it."""
    file = io.BytesIO()
    if described is ...:
        described = {"labels": [[name, i % 3] for i, name in enumerate(files)]}
    with zipfile.ZipFile(file, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
        if described is not None:
            text = described if isinstance(described, bytes) else json.dumps(described)
            made.writestr("dataset.json", text)
    return file.getvalue()


def idx(array: np.ndarray, **changes: Any) -> bytes:
    magic, shape = changes.get("magic", 2048 + array.ndim), changes.get("shape", array.shape)
    return struct.pack(f">I{len(shape)}I", magic, *shape) + array.tobytes()


def claims(header: str) -> bytes:
    """An npz whose images have this .npy header, whatever follows it."""
    text = header.encode().ljust(117) + b"\n"
    images = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)
    return archive({"images.npy": images, "labels.npy": npy(LABELS)}, None)


def images(files: int = 6) -> dict[str, bytes]:
    return {f"{i}.png": png(PIXELS[i]) for i in range(files)}


def hostile_arrays() -> list[tuple[str, str, bytes]]:
    """(what, format, content) of npz files that are intact, but not what is wanted."""
    arrays: list[Any] = [
        PIXELS.astype(kind)
        for kind in ("?", "i8", "i1", "u2", "f2", "f8", ">f4", "c8", "S3", "U2", "M8[s]", "O")
    ]
    arrays += [np.float32(PIXELS / 127.5 - 1) * f for f in (np.nan, np.inf, 1e38, 0, -1, 0.1)]
    arrays += [PIXELS[:0], PIXELS[0], PIXELS[0, 0, 0, 0], PIXELS[:, :0], PIXELS[:5],
               PIXELS[..., None], PIXELS[..., :2], PIXELS.transpose(0, 3, 1, 2), PIXELS[:1],
               np.asfortranarray(PIXELS), np.zeros(6, [("a", "u1"), ("b", "f4")]),
               np.full((6, 8, 8, 3), 7, np.uint8)]  # fmt: skip
    found = [(f"images {a.dtype} {a.shape}", "npz", npz(images=a)) for a in arrays]
    labels: list[Any] = [LABELS.astype(k) for k in ("?", "f4", "u1", "i8", "c8", "U1", "O", "u8")]
    labels += [LABELS - 1, LABELS + 2**31, LABELS + 2**40, LABELS[:5], LABELS[:, None], np.eye(6),
               np.int64(3), LABELS * 10**6, LABELS * 0, LABELS * np.nan, LABELS[:0]]  # fmt: skip
    found += [(f"labels {a.dtype} {a.shape} {a!s:.30}", "npz", npz(labels=a)) for a in labels]
    evil = np.array([Evil()] * 6, dtype=object)
    made = {"evil images": npz(images=evil), "evil labels": npz(labels=evil), "an npy": npy(PIXELS),
            "evil pickle": pickle.dumps(Evil()), "no arrays": archive({}, None)}  # fmt: skip
    text = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}"
    for shape in ("10**13,", "1000000, 1000000", "-1, 8, 8, 3", "6, 8, 8, 3", "'a',", "6"):
        made[f"claims ({shape})"] = claims(text.format("|u1", f"({shape})"))
    made["claims 192 TB"] = claims(text.format("|u1", "(1000000000000, 8, 8, 3)"))
    made |= {"claims objects": claims(text.format("|O", "(6,)")), "code": claims("__import__")}
    return found + [(what, "npz", content) for what, content in made.items()]


def hostile_zips(rng: random.Random) -> list[tuple[str, str, bytes]]:
    """(what, format, content) of data sets in the format of EDM."""
    good, found = png(PIXELS[0]), [("evil pickle", "zip", pickle.dumps(Evil()))]
    sizes = (2**15, 2**15), (10**5, 10**5), (2**31 - 1, 2**31 - 1), (0, 8), (12_000, 9000)
    pictures = [*(bomb(*size) for size in sizes), b"", b"\x89PNG\r\n\x1a\n", good[:90],
                npy(PIXELS[0]), png(PIXELS[0, :4])]  # fmt: skip
    pictures += [png(PIXELS[0], mode) for mode in ("P", "RGBA", "LA", "1", "L")]
    for content in pictures:
        what = f"PNG of {len(content)} bytes {content[16:24].hex()}"
        found.append((f"second a {what}", "zip", archive({"0.png": good, "1.png": content})))
        found.append((f"first a {what}", "zip", archive({"0.png": content, "1.png": good})))
    evil = np.array([Evil()] * 6, dtype=object)
    for array in (*(PIXELS[0].astype(kind) for kind in ("O", "i8", "f8")), evil, PIXELS[0, 0],
                  PIXELS[0] * np.float32(np.nan), PIXELS[:0], np.uint8(3)):  # fmt: skip
        content = archive({"0.npy": npy(array)})
        found.append((f"an npy {array.dtype} {array.shape}", "zip", content))
    names = [*images()]
    pairs = [[name, i % 3] for i, name in enumerate(names)]
    odd = ("a", 0.5, None, [1], -1, 10**20, True)
    lists = [None, 3, [3], [["0.png"]], pairs[:3], dict(pairs), pairs * 2, [[names, 1]]]
    lists += [[[name, value] for name in names] for value in odd]
    texts = [None, b"", b"x", b"[]", b"\xff", b"[" * 10**5, b"3", {}]
    texts += [{"labels": labels} for labels in lists]
    for text in texts:
        found.append((f"dataset.json {text!s:.50}", "zip", archive(images(), text)))
    for what, value in (edited(rng, {"labels": pairs}) for _ in range(40)):
        found.append((f"dataset.json {what}", "zip", archive(images(), value)))
    return found


def hostile_idx() -> list[tuple[str, str, bytes]]:
    """(what, format, content) of files of images in MNIST's format."""
    grey = PIXELS[..., 0]
    found = []
    for what, content in {
        "plain": idx(grey), "magic": idx(grey, magic=7), "huge": idx(grey, shape=(2**31, 2**31, 9)),
        "longer": idx(grey) + b"x", "none": idx(grey[:0]), "labels": idx(LABELS.astype(np.uint8)),
        "short": idx(grey)[:9], "fewer": idx(grey[:3]), "flat": idx(grey, shape=(6, 0, 8)),
        "text": b"hello", "gz twice": gzip.compress(idx(grey)), "empty": b"",
    }.items():  # fmt: skip
        found.append((f"idx {what}", "idx", gzip.compress(content)))
        found.append((f"idx {what}, not compressed", "idx", content))
    return found


# ---- files of weights ----------------------------------------------------------------------------


def hostile_weights() -> list[tuple[str, str, bytes]]:
    """(what, format, content) of files that torch.save did not write."""
    intact = (ROOT / "tests/data/tensors.pt").read_bytes()
    legacy = (ROOT / "tests/data/tensors_legacy.pt").read_bytes()
    head = legacy[: legacy.index(b".", legacy.index(b".") + 1) + 1]
    evil, call = pickle.dumps(Evil(), 2), b"ctorch._utils\n_rebuild_tensor_v2\n"
    trees = {
        "evil": evil, "nothing": b"", "a number": pickle.dumps(3),
        "deep": b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
        "set": pickle.dumps({1}), "bytes": pickle.dumps(bytearray(9)), "class": b"cos\nsystem\n.",
    }  # fmt: skip
    for name, code in {
        "half": b"", "stack": b".", "memo": b"j\xff\xff\xff\x7f.", "persistent": b"K\x01Q.",
        "text id": b"X\x01\0\0\0aQ.", "huge": b"\x8e" + b"\xff" * 7 + b"\x7f.", "build": b"}}b.",
        "eval": b"cbuiltins\neval\nX\x01\0\0\0001\x85R.", "extension": b"\x82\x01.",
        "dict call": b"ccollections\nOrderedDict\nK\x01\x85R.", "tensor call": call + b")R.",
        "tensor of text": call + b"(X\x01\0\0\0aK\0))tR.", "long": b"\x8b\xff\xff\xff\x7f.",
        "type call": b"ctorch\nFloatStorage\nK\x01\x85R.",
    }.items():  # fmt: skip
        trees[name] = b"\x80\x02" + code
    made = {}
    for name, tree in trees.items():
        made |= {f"zip {name}": archive({"a/data.pkl": tree}, None), f"legacy {name}": tree}
        made[f"legacy, after its head: {name}"] = head + tree
    made |= {"two trees": archive({"a/data.pkl": evil, "b/data.pkl": evil}, None), "npz": npz(),
             "no tree": archive({"a/other.pkl": evil}, None), "empty zip": archive({}, None),
             "text": b"hello\n", "safetensors": struct.pack("<Q", 2) + b"{}",
             "a zip twice": intact * 2}  # fmt: skip
    return [(what, "torch", content) for what, content in made.items()]


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
    leaves = [] if "deep" in what else jax.tree.leaves(found)
    for x in (x for x in leaves if isinstance(x, np.ndarray | np.generic)):
        if x.dtype.kind in "OSUM" or not np.isfinite(np.float64(x)).all():
            return "no finite numbers"
    name = what.removeprefix("damaged ").partition(":")[0]
    checked = "damaged" in what and name != "torch legacy"
    if checked and not re.search("appended|another", what) and not same(found, wanted[name]):
        return "other numbers"
    return ""


def damaged_files(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """`count` files: hostile ones, and the rest intact files that are damaged at random."""
    rng, Evil.marker = random.Random(seed), str(folder / "marker")
    (folder / "t").mkdir()
    (folder / "t/train-labels-idx1-ubyte").write_bytes(idx(LABELS.astype(np.uint8)))
    intact = {
        "npz": npz(), "zip": archive(images()), "idx": gzip.compress(idx(PIXELS[..., 0])),
        "torch": (ROOT / "tests/data/tensors.pt").read_bytes(),
        "torch legacy": (ROOT / "tests/data/tensors_legacy.pt").read_bytes(),
    }  # fmt: skip
    names = {"idx": "t/train-images-idx3-ubyte.gz", "npz": "t/x.npz", "zip": "t/x.zip"}
    hostile = hostile_arrays() + hostile_zips(rng) + hostile_idx() + hostile_weights()
    some = rng.sample(hostile, min(len(hostile), count))
    for _ in range(count - len(some)):
        name = rng.choice([*intact])
        what, content = damage(rng, intact[name], rng.choice([*intact.values()]))
        some.append((f"damaged {name}: {what}", name.split()[0], content))
    wanted = {}
    for name, content in intact.items():
        path = folder / names.get(name, "t/x.pt")
        path.write_bytes(content)
        wanted[name] = load(name.split()[0], path)
    for what, kind, content in some:
        path = folder / names.get(kind, "t/x.pt")
        plain = path.with_suffix("") if "not compressed" in what else path
        for old in (folder / "t").glob("*"):
            old.unlink() if "labels" not in old.name else None
        plain.write_bytes(content)
        outcome, detail, found = attempt(lambda kind=kind, path=path: load(kind, path))
        if pathlib.Path(Evil.marker).exists():
            os.rmdir(Evil.marker)
            outcome, detail = SILENT, "code was executed"
        elif found is not None and (wrong := _wrong(what, found, wanted)):
            outcome, detail = SILENT, wrong
        yield Case(what, outcome, detail)
