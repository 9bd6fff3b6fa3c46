"""The samplers of published models against trajectories of the official code.

The references have the noise of the start and of the steps, and the states x. The network's inputs
are compared with these states, and so is the end.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from published import arrays_of, relative, sampled

from mclr_jax import flow, generate, pretrained, samplers
from mclr_jax.denoiser import Velocity
from mclr_jax.generate import Guidance
from mclr_jax.model import Model
from mclr_jax.samplers import Sampler

FORMATS = reference.DATA / "formats"
DIT = ("dit", "dit/DiT-train-0050000.pt")
SIT = ("sit", "sit/SiT-train-0050000.pt")
REPA = ("repa", "repa/REPA-train-0400000.pt")
EDM = ("edm", "edm/edm-img8-uncond-ncsnpp.pkl")
EDM2 = ("edm2", "edm2/edm2-lat8-cond-0131072-0.075.pkl")
DIFFUSERS = ("diffusers", "diffusers/DiT-pipeline")
LONG = pytest.mark.slow  # with guidance as in other cases, and without it as well
GIVEN = {DIT: {"heads": 2}, SIT: {"heads": 4}, REPA: {"heads": 3}}


@functools.cache
def published(family, file):
    """(checkpoint, arrays of the reference in our layout)."""
    found = pretrained.read(FORMATS / file, family, **GIVEN.get((family, file), {}))
    return found, arrays_of(FORMATS / f"{file}.reference.npz")


class Injected:
    """Reference noise in place of that of keys, and a list of the network's inputs."""

    def __init__(self, monkeypatch, start, steps, number, label):
        seen = self.seen = []
        apply = Model._apply

        def listened(model, params, x, c_noise, condition, **options):
            def listen(x, labels):
                seen.extend([x] if (labels == label).all() else [])

            jax.debug.callback(listen, x, condition.label, ordered=True)
            return apply(model, params, x, c_noise, condition, **options)

        def step_noise(keys, call, x):
            return jnp.asarray(steps, x.dtype)[jnp.asarray(number(len(steps)))[call]]

        monkeypatch.setattr(Model, "_apply", listened)
        monkeypatch.setattr(generate, "normal_like", lambda keys, x: jnp.asarray(start, x.dtype))
        monkeypatch.setattr(samplers, "step_noise", step_noise)
        monkeypatch.setattr(flow, "step_noise", step_noise)


def after(count):
    """Noise k comes before call k + 1."""
    return [0, *range(count)]


@pytest.mark.parametrize(
    ("name", "sampler", "channels"),
    [
        ("ddpm", Sampler("ddpm", 10, spacing="even"), None),
        ("ddpm_cfg", Sampler("ddpm", 10, spacing="even"), 3),
        ("ddim", Sampler("ddim", 10, spacing="even"), None),
        pytest.param("ddim_cfg", Sampler("ddim", 10, spacing="even"), 3, marks=LONG),
        ("ddim_ddim10", Sampler("ddim", 10, spacing="ddim"), None),
        ("ddim_eta0.7", Sampler("ddim", 10, spacing="even", eta=0.7), None),
    ],
)
def test_dit(monkeypatch, name, sampler, channels):
    found, arrays = published(*DIT)
    states, labels = arrays[f"sampler/{name}/x"], arrays["sampler/y"]
    noises = arrays.get(f"sampler/{name}/noises", np.zeros_like(states[1:]))
    scale = float(arrays["sampler/cfg_scale"]) if channels else 1.0
    injected = Injected(monkeypatch, states[0], noises, after, labels)
    guided = Guidance(scale, channels=channels)
    got = sampled(found, labels, sampler, guided)
    assert relative(got, states[-1]) < 2e-5
    jax.effects_barrier()
    assert relative(injected.seen, states[:-1]) < 2e-5
    assert guided.calls(found.model, sampler) == 10 * (1 + (scale > 1))


ODE = {"ode_euler": "ode_euler", "ode_heun": "ode_heun2", "ode_rk4": "ode_rk4"}


@pytest.mark.parametrize("name", [
    *ODE, "ode_euler_cfg", pytest.param("ode_heun_cfg", marks=LONG), "ode_dopri5",
])  # fmt: skip
def test_sit_odes(monkeypatch, name):
    """The reference of dopri5 has steps of its own, within its tolerance of 1e-3."""
    found, arrays = published(*SIT)
    states, labels = arrays[f"sampler/{name}/x"], arrays["sampler/y"]
    guided = "cfg" in name
    sampler = Sampler(ODE.get(name.removesuffix("_cfg"), name), len(states) - 1)
    injected = Injected(monkeypatch, states[0], states, after, labels)
    scale = float(arrays["sampler/cfg_scale"]) if guided else 1.0
    guidance = Guidance(scale, channels=3 if guided else None)
    got = sampled(found, labels, sampler, guidance)
    limit = 1e-3 if name == "ode_dopri5" else 2e-6
    assert relative(got, states[-1]) < limit
    jax.effects_barrier()
    stages = len(flow.METHODS[sampler.method].weights)
    assert relative(injected.seen[::stages], states[:-1]) < limit
    assert guidance.calls(found.model, sampler) == stages * (len(states) - 1) * (1 + guided)


@pytest.mark.parametrize("name", [
    "sde_euler_sigma", "sde_euler_linear", "sde_heun_sigma", "sde_euler_sigma_cfg",
])  # fmt: skip
def test_sit_sdes(monkeypatch, name):
    found, arrays = published(*SIT)
    states, labels = arrays[f"sampler/{name}/x"], arrays["sampler/y"]
    _, method, diffusion, *guided = name.split("_")

    def number(count):
        """Of the noise before each call: Heun's is that of its own step."""
        return after(count) if method == "euler" else [*np.repeat(range(count), 2), 0]

    sampler = Sampler(f"sde_{method}", len(states) - 1, diffusion=diffusion)
    injected = Injected(monkeypatch, states[0], arrays[f"sampler/{name}/noises"], number, labels)
    guidance = Guidance(float(arrays["sampler/cfg_scale"]) if guided else 1.0, channels=3)
    got = sampled(found, labels, sampler, guidance)
    assert relative(got, states[-1]) < 2e-6
    jax.effects_barrier()
    if method == "euler":  # the other one's inputs have the noise of their step
        assert relative(injected.seen, states[:-1]) < 2e-6
    calls = len(states) - 1 if method == "euler" else 2 * len(states) - 3
    assert guidance.calls(found.model, sampler) == calls * (1 + len(guided))


REPAS = {"ode": "ode_euler", "ode_heun": "ode_heun", "sde_linear": "sde_euler",
         "sde_cosine": "sde_euler"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(n, k, marks=[LONG] * (k == "_cfg" and n != "ode")) for n in REPAS
     for k in ("", "_cfg", "_cfg_interval") if n != "sde_cosine" or not k],
)  # fmt: skip
def test_repa(monkeypatch, name, kind):
    found, arrays = published(*REPA)
    key = f"sampler/{name}{kind}"
    states, end, labels = arrays[f"{key}/x"], arrays[f"{key}/sample"], arrays["sampler/y"]
    path = "cosine" if name == "sde_cosine" else "linear"
    model = dataclasses.replace(found.model, preconditioning=Velocity(data_at=0, path=path))
    sampler = Sampler(REPAS[name], len(states), diffusion="linear")
    low, high = (t / (1 - t) for t in arrays["sampler/guidance_interval"])
    guided = Guidance(
        float(arrays["sampler/cfg_scale"]) if kind else 1.0,
        interval=(low, high) if "interval" in kind else None,
    )
    noises = arrays.get(f"{key}/noises", states)
    injected = Injected(monkeypatch, states[0], noises, after, labels)
    got = sampled(dataclasses.replace(found, model=model), labels, sampler, guided)
    assert relative(got, end) < 2e-6
    jax.effects_barrier()
    assert relative(injected.seen[:: 1 + ("heun" in name)], states) < 2e-6
    calls = 19 if "heun" in name else 10
    times = arrays[f"{key}/t"].repeat(2)[:19] if "heun" in name else arrays[f"{key}/t"]
    guided_calls = (times <= (high / (1 + high) if "interval" in kind else 1)).sum()
    assert guided.calls(model, sampler) == calls + guided_calls * bool(kind)


@pytest.mark.parametrize(("kind", "name"), [(EDM, "heun"), (EDM, "churn"), (EDM2, "unguided")])
def test_edm(monkeypatch, kind, name):
    """Heun in float32; the references of EDM are in float64."""
    found, arrays = published(*kind)
    churned = name == "churn"
    model, start = found.model, arrays["sampler/latents" if kind == EDM else "sampler/noise"]
    labels = arrays.get("sampler/labels", np.full(len(start), model.null_label))
    states = arrays[f"sampler/{name}/{'x_hat' if churned else 'x'}"][:8]
    end = arrays["sampler/churn/sample"] if churned else arrays[f"sampler/{name}/x"][8]
    noises = arrays.get(f"sampler/{name}/noises", states)

    def number(count):
        return np.repeat(range(count), 2)

    injected = Injected(monkeypatch, start, noises, number, labels)
    churn = samplers.Churn(5.0) if churned else None
    got = sampled(found, labels, Sampler("heun", 8), churn=churn)
    assert relative(got, end) < 1e-5
    jax.effects_barrier()
    levels = arrays[f"sampler/{name}/{'sigma_hat' if churned else 'sigma'}"]
    inputs = states / np.sqrt(levels**2 + 0.25).reshape(8, 1, 1, 1, 1)
    assert relative(injected.seen[::2], inputs) < 1e-5


@pytest.mark.parametrize(("name", "scale"), [("pipeline", 1.0), ("pipeline_cfg", 4.0)])
def test_diffusers(monkeypatch, name, scale):
    """Its guidance is of all four channels."""
    found, arrays = published(*DIFFUSERS)
    states, labels = arrays[f"{name}/x_in"], arrays[f"{name}/labels"]
    injected = Injected(monkeypatch, states[0], states, after, labels)
    sampler = dataclasses.replace(found.sampler, num_steps=10)
    got = sampled(found, labels, sampler, Guidance(scale))
    latents = np.asarray(got) * found.model.data.scale + np.array(found.model.data.offset)
    assert relative(latents, arrays[f"{name}/latents_over_scale"]) < 2e-5
    jax.effects_barrier()
    assert relative(injected.seen, states) < 2e-5
