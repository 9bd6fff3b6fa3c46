"""Trajectory networks: against the definition in NumPy, what a frame sees, and what they learn."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import normal

from mclr_jax.networks.trajectory import FrameDiT, Trajectory
from mclr_jax.types import Condition

B, F, D = 2, 8, 3
STATES = Trajectory(
    width=8, depth=2, heads=2, frames_per_token=2, window=1, embedding_width=6, variance=True
)
RING = STATES.clone(patch=2, reach=1, out_channels=10)  # 5 patches
FIELDS = FrameDiT(width=8, depth=2, heads=2, patch_size=2, window=1, causal=False)
X = normal(0, B, F, D)
LEVELS = normal(1, B, F)
NONE = Condition(jnp.zeros(B, jnp.int32))
W = normal(2, B, 5, 4, 6, 1)
R = normal(3, B, F, 10)


@functools.cache
def drawn(network):
    """Random parameters, none of which is zero."""
    x = W if isinstance(network, FrameDiT) else R if network.patch else X
    return {"params": tiny.params(network, x, LEVELS[:, : x.shape[1]], NONE)}


# ---- the definition ------------------------------------------------------------------------------


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def attended(p, x, heads, window, prefix="", causal=False, ring=0):
    """Query by query and head by head, for x (N, D); `ring`: tokens on a ring, an odd number."""
    count, width = x.shape
    q, k, v = np.split(dense(p[f"{prefix}qkv"], x), 3, axis=-1)
    size, out = width // heads, np.zeros_like(x)

    def away(i, j):
        return min((j - i, j - i - ring, j - i + ring), key=abs)

    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(count):
            seen = [j for j in range(count) if window is None or abs(away(i, j)) <= window]
            seen = [j for j in seen if j <= i or not causal]
            logits = np.array([q[i, part] @ k[j, part] / math.sqrt(size) for j in seen])
            if window is not None:
                table = p[f"{prefix}distance"]["bias"]
                logits += [table[h, away(i, j) + window] for j in seen]
            weights = np.exp(logits - logits.max())
            out[i, part] = weights / weights.sum() @ v[seen][:, part]
    return dense(p[f"{prefix}proj"], out)


def embedded(p, levels, label):
    """Levels (N, p) of the frames of each token -> (N, E)."""
    frequencies = np.geomspace(0.5, 32, 16)
    angles = levels[..., None] * frequencies
    features = np.concatenate([np.cos(angles), np.sin(angles)], -1).reshape(len(levels), -1)
    told = dense(p["map_noise"], features) + p["map_label"]["embedding"][label]
    return silu(dense(p["map_layer"], silu(told)))


def mlp(p, h):
    return dense(p["fc2"], gelu(dense(p["fc1"], h)))


def last(p, h, embedding):
    shift, scale = np.split(dense(p["out_adaLN"], embedding), 2, -1)
    expand = (...,) if h.ndim == 2 else (slice(None), None)
    return dense(p["out_linear"], norm(h) * (1 + scale[expand]) + shift[expand])


def doubles(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])


def test_a_trajectory_network_is_its_definition():
    p = doubles(drawn(STATES))
    got = jax.jit(STATES.apply)(drawn(STATES), X, LEVELS, Condition(jnp.arange(B)))
    for row in range(B):  # the second has the null label
        embedding = embedded(p, np.asarray(LEVELS[row], np.float64).reshape(-1, 2), row)
        h = dense(p["in_linear"], np.asarray(X[row], np.float64).reshape(F // 2, 2 * D))
        for name in ("block0", "block1"):
            q = p[name]
            parts = np.split(dense(q["adaLN_modulation"], embedding), 6, -1)
            h_in = norm(h) * (1 + parts[1]) + parts[0]
            h = h + parts[2] * attended(q, h_in, 2, 1)
            h = h + parts[5] * mlp(q, norm(h) * (1 + parts[4]) + parts[3])
        expected = last(p, h, embedding).reshape(F, 2 * D)
        np.testing.assert_allclose(got[row], expected, rtol=1e-3, atol=1e-3)


def frame_block(q, h, embedding, space, **time):
    """A block for h (N, P, D); `space` and `time` are options of `attended`."""
    parts = np.split(dense(q["adaLN_modulation"], embedding)[:, None], 9, -1)
    for n in range(3):
        h_in = norm(h) * (1 + parts[3 * n + 1]) + parts[3 * n]
        if n == 0:
            new = np.stack([attended(q, frame, 2, prefix="space_", **space) for frame in h_in])
        elif n == 1:
            columns = [attended(q, h_in[:, i], 2, 1, "time_", **time) for i in range(h.shape[1])]
            new = np.stack(columns, axis=1)
        else:
            new = mlp(q, h_in)
        h = h + parts[3 * n + 2] * new
    return h


@pytest.mark.parametrize(("causal", "reach"), [(True, 0), (False, 1)])
def test_a_frame_dit_is_its_definition(causal, reach):
    network, levels = FIELDS.clone(causal=causal, reach=reach), LEVELS[:, :5]
    p = doubles(params := drawn(network))
    got = jax.jit(network.apply)(params, W, levels, NONE)
    around = np.pad(np.asarray(W, np.float64)[0, ..., 0], ((0, 0), *[(2, 2)] * 2), "wrap")
    order = (1, 0, -1) if reach else (0,)
    patches = np.stack([
        np.concatenate([
            around[:, 2 + 2 * (i + a) : 4 + 2 * (i + a), 2 + 2 * (j + b) : 4 + 2 * (j + b)]
            .reshape(5, 4) for a in order for b in order
        ], 1) for i in range(2) for j in range(3)
    ], 1)  # fmt: skip
    embedding = embedded(p, np.asarray(levels[0], np.float64)[:, None], 0)
    h = dense(p["in_linear"], patches) + p["place"].reshape(6, 8)
    for name in ("block0", "block1"):
        h = frame_block(p[name], h, embedding, {"window": None}, causal=causal)
    expected = last(p, h, embedding).reshape(5, 2, 3, 2, 2).swapaxes(2, 3).reshape(5, 4, 6, 1)
    np.testing.assert_allclose(got[0], expected, rtol=1e-3, atol=1e-3)


def test_a_network_of_patches_on_a_ring_is_its_definition():
    """The output of a frame is the means of all coordinates, then their variances."""
    p = doubles(drawn(RING))
    got = jax.jit(RING.apply)(drawn(RING), R, LEVELS, NONE)
    embedding = embedded(p, np.asarray(LEVELS[0], np.float64).reshape(-1, 2), 0)
    tokens = np.asarray(R, np.float64)[0].reshape(F // 2, 2, 5, 2).swapaxes(1, 2)
    h = dense(p["in_linear"], tokens.reshape(F // 2, 5, 4))
    for name in ("block0", "block1"):
        h = frame_block(p[name], h, embedding, {"window": 1, "ring": 5})
    parts = last(p, h, embedding).reshape(F // 2, 5, 2, 2, 2)  # patch, frame, kind, coordinate
    expected = parts.transpose(0, 2, 3, 1, 4).reshape(F, 20)
    np.testing.assert_allclose(got[0], expected, rtol=1e-3, atol=1e-3)


# ---- what a frame sees ---------------------------------------------------------------------------


def sees(network, params, x):
    """bool (2, F, F): whether the output of a frame depends on the input, the level of another."""
    frames, condition = x.shape[1], Condition(jnp.zeros(1, jnp.int32))

    def run(change):
        changed = x + change[0].reshape(-1, *[1] * (x.ndim - 2))
        return network.apply(params, changed, change[1][None], condition).reshape(frames, -1)

    slopes = jax.jit(jax.jacfwd(run))(jnp.zeros((2, frames)))
    return np.moveaxis(np.abs(slopes).max(1) > 0, 1, 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["states", "fields"])
def test_a_frame_sees_its_window_and_a_causal_one_no_future(kind, causal):
    """Two layers of windows of one token each reach two tokens."""
    network, params, x, p = {
        "states": (STATES, drawn(STATES), jnp.tile(X[:1], (1, 2, 1)), 2),
        "fields": (FIELDS, drawn(FIELDS), jnp.tile(W[:1], (1, 2, 1, 1, 1)), 1),
    }[kind]
    found = sees(network.clone(causal=causal), params, x)
    token = np.arange(x.shape[1]) // p
    distance = token - token[:, None]  # of what is seen after the frame itself
    expected = (np.abs(distance) <= 2) & ((distance <= 0) | (not causal))
    np.testing.assert_array_equal(found, [expected, expected])


def test_a_trajectory_may_be_longer_and_begin_anywhere():
    """Frames whose window is inside give the same, wherever they are."""
    x = jax.random.normal(jax.random.key(5), (B, 20, D))
    levels, run = jax.random.normal(jax.random.key(6), (B, 20)), jax.jit(STATES.apply)
    whole, part = (
        run(drawn(STATES), x, levels, NONE),
        run(drawn(STATES), x[:, 6:], levels[:, 6:], NONE),
    )
    np.testing.assert_allclose(part[:, 4:], whole[:, 10:], rtol=1e-4, atol=1e-4)
    assert np.abs(part[:, 0] - whole[:, 6]).max() > 1e-3


# ---- beginnings and mistakes ---------------------------------------------------------------------


def test_fresh_networks_give_zero_and_a_variance_doubles_the_channels():
    for network, x in [(STATES, X), (FIELDS.clone(variance=True), W)]:
        init = jax.jit(network.init_with_output)
        out, _ = init(jax.random.key(0), x, jnp.ones(x.shape[:2]), NONE)
        assert out.shape == (*x.shape[:-1], network.out_channels * (1 + network.variance))
        assert not np.asarray(out).any()


def test_optional_inputs_are_added_to_the_label():
    """By kernels that start at zero; as if the rows of the label's table were moved by them."""
    made, held = STATES.clone(takes_strength=True, augment_dim=3), drawn(STATES)["params"]
    condition = NONE.replace(strength=jnp.array([0.5, 2.0]), augment=jnp.eye(3)[:B])
    fresh = jax.jit(made.init)(jax.random.key(0), X, LEVELS, NONE)["params"]
    kernels = {name: fresh[name]["kernel"] for name in made.optional_inputs}
    assert not any(np.any(kernel) for kernel in kernels.values())
    moved = tiny.drawn(kernels, 4, 0.3)
    own = held | {name: {"kernel": kernel} for name, kernel in moved.items()}
    got = jax.jit(made.apply)({"params": own}, X, LEVELS, condition)
    angles = np.log1p([0.5, 2.0])[:, None] * [0.5, 1, 2, 4]
    features = 8 * np.concatenate([np.sin(angles), 1 - np.cos(angles)], axis=1)
    added = features @ np.asarray(moved["map_strength"]) + np.asarray(moved["map_augment"][:B])
    for row in range(B):
        table = held["map_label"]["embedding"] + added[row].astype(np.float32)
        shifted = {"params": held | {"map_label": {"embedding": table}}}
        expected = jax.jit(STATES.apply)(shifted, X, LEVELS, NONE)
        np.testing.assert_allclose(got[row], expected[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        (STATES, (B, 7, D), r"7 frames, not divisible by frames_per_token 2: add 1 frames of pure"),
        (STATES, (B, D), r"Trajectory expects x \(B, F, d\) and c_noise \(B, F\)"),
        (FIELDS, (B, F, D), r"FrameDiT expects x \(B, F, H, W, C\)"),
        (FIELDS, (B, 2, 5, 4, 1), "fields are 5x4, not divisible by patch_size 2"),
        (STATES.clone(heads=3), (B, F, D), "width is 8; 3 heads need a multiple of 3"),
        (RING, (B, F, 11), "11 coordinates, not divisible by patch 2"),
    ],
)
def test_wrong_shapes_are_refused(network, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny.params(network, np.zeros(shape), LEVELS[:, : shape[1]], NONE)


@pytest.mark.parametrize("option", ["window", "reach", "patch"])
def test_negative_options_are_refused(option):
    with pytest.raises(ValueError, match=rf"network\.{option} is -1"):
        RING.clone(**{option: -1})
