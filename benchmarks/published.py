"""Published formats against the official code: outputs, trajectories, damaged files, and memory.

  python benchmarks/published.py --formats=FOLDER   # of files X, each with X.reference.npz
  python benchmarks/published.py --large=DiT-XL-2.pt [--large_family=dit]

Section `files` has the relative error of each output and of the end of each trajectory by file;
`large` seconds and peak memory of reading a file and of writing its run, in processes of their own.
Writes benchmarks/results/published.json.
"""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tasks import RESULTS, parameters, parsed

from mclr_jax import flow, generate, latents, pretrained, samplers
from mclr_jax.data import sources
from mclr_jax.data.protocol import for_training
from mclr_jax.denoiser import Velocity
from mclr_jax.files import provenance, write_json
from mclr_jax.generate import Guidance
from mclr_jax.pretrained import diffusers
from mclr_jax.pretrained.names import Checkpoint
from mclr_jax.samplers import Churn, Sampler
from mclr_jax.types import Condition

OUT = RESULTS / "published.json"
ODES = {"sit": {"ode_heun": "ode_heun2"}, "repa": {"ode": "ode_euler"}}
GUIDED = {"uncond_guidance", "autoguidance"}
# The names of outputs in references, and whether they are of the null label.
OUTPUTS = {"raw": 0, "velocity": 0, "diffusers": 0, "denoised": 0, "raw_null": 1,
           "velocity_null": 1, "diffusers_null": 1, "denoised_null": 1}  # fmt: skip
OF_DIT = {"official_dit": 0, "official_dit_null": 1}  # that diffusers' network does not have


def relative(got: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def arrays_of(path: pathlib.Path) -> dict[str, Any]:
    """The arrays of a reference, with channels last, and its `meta`."""
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    meta = json.loads(str(found.pop("meta.json")))
    images = {k: np.moveaxis(x, -3, -1) if x.ndim >= 4 else x for k, x in found.items()}
    return {**images, "meta": meta}


def read(path: pathlib.Path, family: str, meta: dict[str, Any], average: str) -> Checkpoint:
    kwargs, given = meta.get("kwargs", {}), {}
    if path.suffix == ".pt":
        given = {"heads": kwargs["num_heads"]} | ({"average": average} if "ema" != average else {})
    return pretrained.read(path, family, **given)


def outputs(found: Checkpoint, arrays: dict[str, Any], folder: str) -> dict[str, float]:
    """Errors of the network's outputs, or denoised images, by name."""
    model, errors, x = found.model, {}, jnp.asarray(arrays["input/x"])
    null = jnp.full(len(x), model.null_label, jnp.int32)
    label = jnp.asarray(arrays.get("input/labels", arrays.get("input/y", null)), jnp.int32)
    names = OUTPUTS if found.family == "diffusers" else OUTPUTS | OF_DIT
    for name, is_null in names.items():
        if f"{folder}/{name}" not in arrays:
            continue
        expected, condition = arrays[f"{folder}/{name}"], Condition(null if is_null else label)
        if "input/t" in arrays:
            level = jnp.float32(arrays["input/t"])
            got = model.network.apply({"params": found.params}, x, level, condition)
        elif "denoised" in name:
            got = model.denoise(found.params)(x, jnp.asarray(arrays["input/sigma"]), condition)
        else:
            scales = model.preconditioning.scales(jnp.asarray(arrays["input/sigma"]))
            inputs = scales.c_in[:, None, None, None] * x, scales.c_noise
            got = model.output(found.params)(*inputs, condition)
        errors[name] = relative(got[..., : expected.shape[-1]], expected)
    return errors


@contextlib.contextmanager
def injected(noise: np.ndarray, noises: np.ndarray, numbers: list[int]) -> Iterator[None]:
    """Samplers draw these noises: call k that of `numbers[k]`."""

    def step_noise(keys, call, x):
        return jnp.asarray(noises, x.dtype)[jnp.asarray(numbers)[call]]

    start = mock.patch.object(generate, "normal_like", lambda keys, x: jnp.asarray(noise, x.dtype))
    with start, mock.patch.object(samplers, "step_noise", step_noise):
        with mock.patch.object(flow, "step_noise", step_noise):
            yield


def sampled(
    found: Checkpoint, labels: Any, sampler: Sampler, guided: Guidance = generate.NONE,
    churn: Churn | None = None,
) -> jax.Array:  # fmt: skip
    """Samples as `generate.generate` draws them."""
    model, (weak, weak_params) = found.model, guided.weak or (None, {})
    run = generate.program(
        model, sampler.method, guided.is_second_call(model), churn is not None, weak,
        guided.channels,
    )  # fmt: skip
    scales = jnp.float32(guided.scales(model.null_label))
    return run(
        (found.params, weak_params), 0, jnp.arange(len(labels)), jnp.asarray(labels, jnp.int32),
        sampler.table(model.preconditioning), scales, guided.interval or (0.0, np.inf), churn,
    )  # fmt: skip


def of_time(found: Checkpoint, arrays: dict[str, Any], key: str) -> jax.Array:
    """The end of a trajectory of DiT, SiT or REPA."""
    name, states = key.removeprefix("sampler/"), arrays[f"{key}/x"]
    steps, is_guided = len(states) - (found.family != "repa"), "_cfg" in name
    word = name.replace("_cfg", "").replace("_interval", "")
    numbers = [0, *range(steps)]
    if found.family == "dit":
        method, eta = word.partition("_")[0], 0.7 if "eta" in word else 0.0
        spacing = "ddim" if "ddim10" in word else "even"
        sampler = Sampler(method, steps, spacing=spacing, eta=eta)
    elif word.startswith("ode"):
        sampler = Sampler(ODES[found.family].get(word, word), steps)
    else:
        _, *parts, diffusion = word.split("_")
        if diffusion == "cosine":
            process = Velocity(data_at=0, path="cosine")
            model = dataclasses.replace(found.model, preconditioning=process)
            found = dataclasses.replace(found, model=model)
        method = f"sde_{parts[0] if parts else 'euler'}"
        numbers = [*np.repeat(range(steps), 2), 0] if method == "sde_heun" else numbers
        sampler = Sampler(method, steps, diffusion=diffusion if parts else "linear")
    interval = None
    if "interval" in name:
        low, high = (t / (1 - t) for t in arrays["sampler/guidance_interval"])
        interval = low, high
    scale = float(arrays["sampler/cfg_scale"]) if is_guided else 1.0
    channels = 3 if is_guided and found.family != "repa" else None
    guided = Guidance(scale, interval=interval, channels=channels)
    with injected(states[0], arrays.get(f"{key}/noises", states), numbers):
        return sampled(found, arrays["sampler/y"], sampler, guided)


def of_sigma(found: Checkpoint, arrays: dict, key: str, folder: pathlib.Path) -> jax.Array:
    """The end of a trajectory of EDM or EDM2."""
    name = key.removeprefix("sampler/").removesuffix("_f64")
    noise = arrays.get("sampler/noise", arrays.get("sampler/latents"))
    labels = arrays.get("sampler/labels", np.zeros(len(noise)))
    about, scale, weak, churn = arrays["meta"].get("sampler", {}), 1.0, None, None
    noises, numbers = noise[None], [0] * 16
    if name in GUIDED:
        other = pretrained.read(folder / about[name]["gnet"])
        scale, weak = about[name]["guidance"], (other.model, other.params)
    if name == "churn":
        about = about.get(key.removeprefix("sampler/"), about.get(name))
        churn = Churn(*(about[k] for k in ("S_churn", "S_min", "S_max", "S_noise")))
        noises, drawn = arrays[f"{key}/noises"], 0
        for step, sigma in enumerate(Sampler(num_steps=8).grid()[:-1]):
            is_drawn = len(noises) == 8 or churn.sigma_min <= sigma <= churn.sigma_max
            numbers[2 * step], drawn = min(drawn, len(noises) - 1), drawn + is_drawn
    with injected(noise, noises, numbers):
        return sampled(found, labels, Sampler(num_steps=8), Guidance(scale, weak=weak), churn)


def checked(path: pathlib.Path, family: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """The relative errors of a file."""
    row: dict[str, Any] = {}
    for average, folder in (("ema", "output"), ("model", "output_model")):
        if any(name.startswith(f"{folder}/") for name in arrays):
            found = read(path, family, arrays["meta"], average)
            row |= {f"{folder}/{k}": e for k, e in outputs(found, arrays, folder).items()}
    found = read(path, family, arrays["meta"], "ema")
    keys = {name.rpartition("/")[0] for name in arrays if name.startswith("sampler/")}
    for key in sorted(key for key in keys - {"sampler"} if "reverse" not in key):
        end = arrays[f"{key}/sample"] if f"{key}/sample" in arrays else arrays[f"{key}/x"][-1]
        of_edm = found.family in ("edm", "edm2")
        got = of_sigma(found, arrays, key, path.parent) if of_edm else of_time(found, arrays, key)
        row[key] = relative(got, end)
    return row


def of_pipeline(path: pathlib.Path, arrays: dict[str, Any]) -> dict[str, float]:
    """The errors of an autoencoder, and of the images at the end of a pipeline's trajectories."""
    network, params = diffusers.autoencoder(path / "vae")
    run = jax.jit(lambda x, method: network.apply({"params": params}, x, method=method),
                  static_argnames="method")  # fmt: skip
    mean, std = run(arrays["vae/image"], "encode")
    found = {"mean": mean, "std": std, "decoded": run(arrays["vae/latent"], "decode")}
    rows = {f"vae/{name}": relative(got, arrays[f"vae/{name}"]) for name, got in found.items()}
    checkpoint = pretrained.read(path)
    for name, scale in (("pipeline", 1.0), ("pipeline_cfg", 4.0)):
        states = arrays[f"{name}/x_in"]
        sampler = Sampler("ddim", len(states), spacing="leading")
        with injected(states[0], states, [0] * len(states)):
            x = sampled(checkpoint, arrays[f"{name}/labels"], sampler, Guidance(scale))
        images = run(x * jnp.asarray(checkpoint.model.data.scale), "decode")
        got = jnp.clip(images / 2 + 0.5, 0, 1)
        rows[f"{name}/images"] = relative(got, arrays[f"{name}/images"])
    return rows


def of_data(path: pathlib.Path, arrays: dict[str, Any], vae: pathlib.Path) -> dict[str, float]:
    """The errors of a data set: images and labels, or latents of the same noise, decoded."""
    onehot = arrays["labels_onehot"]
    if "noise" not in arrays:
        source = sources.load(f"zip:{path}", unlabelled=not onehot.size)
        images, labels = source[np.arange(len(source))]
        rows = {"images": relative(images.astype(float), arrays["images"].astype(float))}
        return rows | {"labels": float((onehot.argmax(1) != labels).mean()) if onehot.size else 0.0}
    source = sources.load(f"zip:{path}", latents="edm2")
    moments, labels = for_training(source, np.arange(len(source)))
    mean, std = np.split(moments, 2, axis=-1)
    decode = latents.Decoder(str(vae), "edm2", source.offset, source.scale)
    shown = decode(mean, np.uint8).astype(float), arrays["decoded_of_final_mean_uint8"]
    return {
        "final_latents": relative(mean + std * arrays["noise"], arrays["final_latents"]),
        "labels": float((onehot.argmax(1) != labels).mean()),
        "levels_that_differ": float((shown[0] != shown[1]).mean()),
        "decoded": float(np.abs(shown[0] - shown[1]).max() / 255),
    }


def measured(path: pathlib.Path, family: str, writes: bool) -> None:
    """Print seconds and the peak of memory of reading a file, or of making its run, as JSON."""

    def status(name: str) -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

    before, start = status("VmHWM"), time.perf_counter()
    if writes:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            run = pretrained.convert(path, pathlib.Path(folder) / "run", family)
            seconds, model = time.perf_counter() - start, run.model
    else:
        model = pretrained.read(path, family).model
        seconds = time.perf_counter() - start
    count = parameters(model)
    print(json.dumps({
        "parameters": count, "parameter_bytes": 4 * count, "seconds": seconds,
        "file_bytes": path.stat().st_size, "peak_bytes": status("VmHWM") - before,
    }))  # fmt: skip


def main() -> None:
    flags = parsed(
        __doc__, formats=("", "folder of files and references"), large=("", "a large file"),
        large_family=("dit", "its family"), measure=("", "of a process", ("read", "convert")),
    )  # fmt: skip
    if flags.measure:
        return measured(pathlib.Path(flags.large), flags.large_family, flags.measure == "convert")
    result = json.loads(OUT.read_text()) if OUT.exists() else {}
    rows: dict[str, dict] = {"files": {}, "large": {}}
    formats = pathlib.Path(flags.formats)
    for file in sorted(formats.rglob("*.reference.npz")) if flags.formats else ():
        path, arrays = file.with_name(file.name.removesuffix(".reference.npz")), arrays_of(file)
        name = path.relative_to(formats)
        if name.parts[0] == "datasets":
            row = of_data(path, arrays, formats / "diffusers" / "DiT-pipeline" / "vae")
        elif path.is_dir():
            row = checked(path, "diffusers", arrays) | of_pipeline(path, arrays)
        else:
            row = checked(path, name.parts[0].replace("diffusers", "dit"), arrays)
        rows["files"][str(name)] = row
        print(path.name, max(row.values()), flush=True)
    for what in ("read", "convert") if flags.large else ():
        given = [f"--large={flags.large}", f"--large_family={flags.large_family}"]
        call = [sys.executable, __file__, *given, f"--measure={what}"]
        done = subprocess.run(call, check=True, capture_output=True, text=True)
        rows["large"][what] = json.loads(done.stdout.splitlines()[-1])
        print(what, rows["large"][what])
    made = {name: {**provenance(), "rows": some} for name, some in rows.items() if some}
    write_json(OUT, result | made)


if __name__ == "__main__":
    main()
