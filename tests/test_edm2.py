"""EDM2's U-Net: reference outputs, a second implementation, magnitudes, and its training."""

import functools
import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import nvlabs
import optax
import pytest
import tiny
from flax import traverse_util
from nvlabs import error, loaded

from mclr_jax.denoiser import EDM, natural_weight
from mclr_jax.model import DataInfo, Model
from mclr_jax.networks import edm2
from mclr_jax.networks.edm2 import EDM2
from mclr_jax.noise import LogNormal
from mclr_jax.objectives.base import Batch, Problem
from mclr_jax.objectives.dsm import DSM
from mclr_jax.pretrained import edm, names
from mclr_jax.task import Task
from mclr_jax.training import ema, step
from mclr_jax.types import Condition

FORMATS = pathlib.Path(__file__).parent / "data" / "formats" / "edm2"


def test_latents_have_the_units_of_the_encoder():
    """FORMATS.md: raw means and deviations of the latents, which become 0 and 0.5."""
    data = loaded(FORMATS / "edm2-lat8-cond-0131072-0.075.pkl")[0].model.data
    np.testing.assert_allclose(data.offset, [5.81, 3.25, 0.12, -2.15], rtol=1e-6)
    np.testing.assert_allclose(np.array(data.scale) / 2, [4.17, 4.62, 3.71, 3.28], rtol=1e-6)
    assert not loaded(FORMATS / "edm2-img16-uncond-0131072-0.100.pkl")[0].model.data.offset


# ---- options that the snapshots do not vary ------------------------------------------------------

OPTIONS = {
    "balances": EDM2(3, 5, channels=8, channel_mult=(1, 2), num_blocks=1, channels_per_head=8,
                     attention_resolutions=(8,), label_balance=0.3, concat_balance=0.7,
                     res_balance=0.4, attn_balance=0.2, clip_act=0.6),
    "widths": EDM2(2, 0, channels=6, channel_mult=(2, 3, 1), num_blocks=1, channels_per_head=5,
                   attention_resolutions=(4, 2), channel_mult_noise=5, channel_mult_emb=2,
                   clip_act=0.0, logvar_channels=7),
    "filter": EDM2(3, 4, channels=4, channel_mult=(1, 1, 2), num_blocks=1, channels_per_head=64,
                   attention_resolutions=(8, 4), resample_filter=(1.0, 3.0, 3.0, 1.0), dropout=0.1),
}  # fmt: skip
# Of the official constructor.
ARGUMENTS = ("channel_mult", "channel_mult_noise", "channel_mult_emb", "num_blocks",
             "channels_per_head", "dropout", "label_balance", "concat_balance", "res_balance",
             "attn_balance", "clip_act", "resample_filter")  # fmt: skip
INPUTS = 3
SIGMA = np.float32([0.02, 0.7, 45.0])


def snapshot(net, state, shape):
    """The content of a file that the official code would write of such a network."""

    told = {name: getattr(net, name) or None for name in ARGUMENTS}  # None for 0
    told |= {"model_channels": net.channels, "attn_resolutions": [*net.attention_resolutions]}

    def classes(name):
        kind, out = "Module", name.rpartition(".")[2]
        if name == "unet":
            balances = {n: getattr(net, n) for n in ("label_balance", "concat_balance")}
            return "UNet", {"_init_kwargs": told, **balances}
        if name.count(".") == 2 and "_conv" not in out and out[0].isdigit():
            features = state[f"{name}.conv_res1.weight"].shape[0]
            height, attends = int(out.partition("x")[0]), "_block" in out
            attends = height in net.attention_resolutions if attends else "_in0" in out
            kind = "Block", {
                "out_channels": features,
                "num_heads": features // net.channels_per_head if attends else 0,
                "clip_act": net.clip_act or None, "resample_filter": list(net.resample_filter),
                **{n: getattr(net, n) for n in ("dropout", "res_balance", "attn_balance")},
            }  # fmt: skip
            return kind
        return kind, {}

    attributes = {"img_resolution": shape[0], "img_channels": shape[-1], "sigma_data": 0.5,
                  "label_dim": net.num_classes}  # fmt: skip
    return {"ema": nvlabs.module("Precond", state, classes, **attributes), "encoder": None}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_against_a_second_implementation(name):
    net = OPTIONS[name]
    shape = (8, 8, net.out_channels)
    x = np.random.default_rng(1).normal(size=(INPUTS, *shape)).astype(np.float32)
    inputs = x, np.log(SIGMA) / 4, Condition(np.arange(INPUTS))
    params = tiny.params(net, *inputs, size=1.0)
    params["out_gain"] = np.float32(0.8)
    state = names.to_state(params, edm.names(net))
    inner = {k.removeprefix("unet."): v for k, v in state.items()}
    options = {n: getattr(net, n) for n in (
        "label_balance", "concat_balance", "res_balance", "attn_balance", "channels_per_head",
        "resample_filter")} | {"clip_act": net.clip_act or None}  # fmt: skip
    one_hot = np.eye(INPUTS, net.num_classes or 1, dtype=np.float32)
    second = jax.jit(functools.partial(nvlabs.edm2, inner, options))
    expected = second(x.transpose(0, 3, 1, 2), inputs[1], one_hot)
    found = jax.jit(net.apply)({"params": params}, *inputs)
    assert error(found.transpose(0, 3, 1, 2), expected) < 1e-5

    content = snapshot(net, state, shape)
    again = edm.read(content)
    assert again.model.network == net
    back = names.to_state(again.params, edm.names(again.model.network))
    assert back.keys() == state.keys()
    assert all((back[k] == state[k]).all() for k in state)


# ---- magnitudes and training ---------------------------------------------------------------------


def test_sums_and_joins_keep_the_variance():
    """Var(mp_sum) = Var(mp_cat) = 1 for independent inputs of variance 1; shares are as asked."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 10**6, 1)).astype(np.float32)
    for balance in (0.0, 0.3, 0.5):
        total = edm2.mp_sum(a, b, balance)
        assert abs(total.var() - 1) < 5e-3
        assert abs((total * b).mean() - balance / np.hypot(balance, 1 - balance)) < 5e-3
    joined = edm2.mp_cat(np.ones((1, 6), np.float32), np.ones((1, 2), np.float32), 0.25)
    first, second = (joined[0, :6] ** 2).sum(), (joined[0, 6:] ** 2).sum()
    np.testing.assert_allclose([first + second, second / first], [8, 1 / 9], rtol=1e-6)
    assert abs(edm2.mp_silu(a[..., 0]).std() ** 2 + edm2.mp_silu(a[..., 0]).mean() ** 2 - 1) < 5e-3


NET = EDM2(3, 4, channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=(8,),
           channels_per_head=4)  # fmt: skip
SHAPE = (8, 8, 3)
X = np.random.default_rng(2).normal(size=(INPUTS, *SHAPE)).astype(np.float32)
NOISY = X, np.log(SIGMA) / 4, Condition(jnp.arange(INPUTS))
ANSWER = jax.jit(NET.apply)


def test_normalised_weights_have_unit_variance_and_give_the_same_answer():
    """The size of a weight has no effect, and the sizes after an update are those before it."""
    params = tiny.params(NET, *NOISY, size=1.0)
    scaled = jax.tree.map(lambda x: 7.0 * x if np.ndim(x) > 1 else x, params)
    normal = NET.normalised(scaled)
    for path, leaf in traverse_util.flatten_dict(normal).items():
        if path[-1] == "kernel":
            square = (leaf**2).mean(tuple(range(leaf.ndim - 1)))
            np.testing.assert_allclose(square, 1, rtol=1e-3)
        else:
            np.testing.assert_array_equal(leaf, traverse_util.flatten_dict(params)[path])
    answers = [ANSWER({"params": p}, *NOISY) for p in (params, scaled, normal)]
    assert error(answers[1], answers[0]) < 1e-3  # the epsilon of the normalisation
    assert error(answers[2], answers[0]) < 1e-3


def test_initial_values_and_gradients():
    """The output starts at zero, weights at variance 1; Fourier features are not trained."""
    params = jax.jit(NET.init)(jax.random.key(0), *NOISY)["params"]
    assert params["out_gain"] == params["enc_8x8_block0"]["emb_gain"] == 0
    kernel = np.asarray(params["enc_8x8_conv"]["kernel"])
    assert kernel.shape == (3, 3, 4, 8)
    assert abs(kernel.std() - 1) < 0.2
    assert 4 < np.asarray(params["logvar_fourier_freqs"]).std() < 9  # 2 pi
    phases = np.asarray(params["logvar_fourier_phases"])
    assert 0 <= phases.min() < 1 < 5 < phases.max() < 2 * np.pi
    params = tiny.params(NET, *NOISY, size=1.0)

    def loss(params):
        u = NET.apply({"params": params}, NOISY[1], method="log_variance")
        return (NET.apply({"params": params}, *NOISY) ** 2).mean() + (u**2).sum()

    gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params))
    for path, gradient in gradients.items():
        fixed = path[-1].endswith(("freqs", "phases"))
        assert np.isfinite(gradient).all()
        assert (np.abs(gradient).max() > 0) != fixed, path


def task_of(rate, levels=None):
    """DSM of NET, with Adam and a power-function average."""
    model = Model(NET, EDM(0.5), DataInfo(SHAPE, 4, 0.5))
    weight = functools.partial(natural_weight, model.preconditioning)
    problem = Problem(levels or LogNormal(-0.4, 1.0), weight, 4)
    averages = {"power_0.1": ema.power(0.1)}
    return Task(model, DSM(0.0), problem, optax.adam(rate), lambda step: rate, averages)


def batches(count, size, std):
    rng = np.random.default_rng(3)
    images = np.float32(std * rng.normal(size=(count, size, *SHAPE)))
    numbers = np.arange(count * size, dtype=np.int32).reshape(count, size)
    return {"image": images, "label": numbers % 4, "index": numbers}


def test_weights_are_normalised_after_each_update_and_in_the_start():
    """The update itself is the optimizer's; averages are of the normalised weights."""
    task = task_of(0.3)
    start = jax.tree.map(lambda x: 5 * x, tiny.params(NET, *NOISY, size=1.0))
    state = step.init_state(task, start)
    np.testing.assert_array_equal(jax.tree.leaves(state.params)[3],
                                  jax.tree.leaves(NET.normalised(start))[3])  # fmt: skip
    data = batches(1, 4, 0.5)
    after, _ = jax.jit(step.make_update(task))(state, {}, data, 1)
    moved = 0.0
    flat, before = (traverse_util.flatten_dict(s.params) for s in (after, state))
    for path, leaf in flat.items():
        if path[-1] == "kernel":
            size = jnp.sqrt((leaf**2).mean(tuple(range(leaf.ndim - 1))))
            np.testing.assert_allclose(size, 1, rtol=2e-3)
            moved = max(moved, float(np.abs(leaf - before[path]).max()))
    assert moved > 0.1
    for path, leaf in traverse_util.flatten_dict(after.ema["power_0.1"]).items():
        np.testing.assert_array_equal(leaf, flat[path])  # of the first step all


@pytest.mark.slow
def test_the_head_learns_the_logarithm_of_the_weighted_error():
    """For D = c_skip x and data N(0, s^2) the error at each level is known:

    E[weight |D - x0|^2] = ((1 - c_skip)^2 s^2 + c_skip^2 sigma^2) / c_out^2.
    """
    std, task = 1.1, task_of(0.1, LogNormal(-0.4, 1.2))
    scales = task.model.preconditioning.scales
    params = tiny.params(NET, *NOISY, size=1.0)
    params["logvar_fourier_freqs"] *= 2 * np.pi

    def denoise(x, sigma, condition):
        return scales(sigma).c_skip[:, None] * x

    def loss(head, key):
        u = task.model.log_variance(params | {"logvar_linear": head})
        models = cases.models(denoise)._replace(log_variance=u)
        k_data, k_loss = jax.random.split(key)
        x0 = std * jax.random.normal(k_data, (256, 64))
        batch = Batch(x0, Condition(jnp.zeros(256, jnp.int32)))
        return DSM(0.0)(models, task.problem, batch, jax.random.split(k_loss, 256))[0].mean()

    steps = 1500
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    @jax.jit
    def trained(head):
        def one(carry, number):
            head, state = carry
            gradient = jax.grad(loss)(head, jax.random.fold_in(jax.random.key(0), number))
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(head, updates), state), None

        return jax.lax.scan(one, (head, optimizer.init(head)), jnp.arange(steps))[0][0]

    sigma = jnp.exp(jnp.linspace(-2.0, 1.2, 9))
    head = trained(params["logvar_linear"])
    u = task.model.log_variance(params | {"logvar_linear": head})(sigma)
    found = scales(sigma)
    error = (1 - found.c_skip) ** 2 * std**2 + found.c_skip**2 * sigma**2
    expected = jnp.log(error / found.c_out**2)
    np.testing.assert_allclose(u, expected, atol=0.05)
    assert np.ptp(expected) > 0.5
