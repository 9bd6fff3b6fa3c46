"""NVlabs' networks by their tensors: forward passes in NCHW, and snapshots made of tensors.

A second implementation, written after training/networks.py of NVlabs/edm and networks_edm2.py of
NVlabs/edm2: it follows the names of the tensors from block to block, as their code does.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax import pretrained
from mclr_jax.model import Model
from mclr_jax.pretrained.tensors import Module


def error(found, expected):
    """The largest error of an example relative to the largest number of its reference."""
    found, expected = (np.asarray(a).reshape(len(a), -1) for a in (found, expected))
    return float((np.abs(found - expected).max(1) / np.abs(expected).max(1)).max())


@functools.cache
def loaded(path):
    return pretrained.read(path), dict(np.load(f"{path}.reference.npz"))


def answers(model, params, *inputs):
    """The denoised images and the network's own output, by one call of the network."""
    seen, apply = [], Model._apply

    def kept(*arguments, **options):
        seen.append(apply(*arguments, **options))
        return seen[-1]

    with mock.patch.object(Model, "_apply", kept):
        return jax.jit(lambda params: (model.denoise(params)(*inputs), seen[-1]))(params)


def convolve(x, weight, padding=0, stride=1, groups=1, dilation=1):
    return jax.lax.conv_general_dilated(
        x, jnp.asarray(weight), (stride, stride), [(padding, padding)] * 2, (dilation, dilation),
        feature_group_count=groups,
    )  # fmt: skip


def resampled(x, taps, mode):
    """Filter and halve, or double and filter, as conv2d and conv_transpose2d of PyTorch."""
    if not mode:
        return x
    taps = np.float32(taps) / sum(taps)
    weight, pad = np.outer(taps, taps)[None, None], (len(taps) - 1) // 2
    weight = np.tile(weight, (x.shape[1], 1, 1, 1))
    if mode == "down":
        return convolve(x, weight, pad, 2, x.shape[1])
    weight = 4 * weight[..., ::-1, ::-1]
    return convolve(x, weight, len(taps) - 1 - pad, 1, x.shape[1], dilation=2)


class Song:
    """SongUNet: `options` has taps, embedding, channels (model_channels), classes."""

    def __init__(self, state, options):
        self.state, self.options = state, options

    def linear(self, x, name):
        y = x @ self.state[f"{name}.weight"].T
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def conv(self, x, name, pad=None):
        weight = self.state[f"{name}.weight"]
        y = convolve(x, weight, weight.shape[-1] // 2 if pad is None else pad)
        return y + self.state[f"{name}.bias"][:, None, None]

    def norm(self, x, name):
        groups = min(32, x.shape[1] // 4)
        y = x.reshape(len(x), groups, -1)
        y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
        scale, bias = (self.state[f"{name}.{n}"][:, None, None] for n in ("weight", "bias"))
        return y.reshape(x.shape) * scale + bias

    def block(self, x, embedding, name):
        mode = "down" if name.endswith("_down") else "up" if name.endswith("_up") else ""
        h = jax.nn.silu(self.norm(x, f"{name}.norm0"))
        h = self.conv(resampled(h, self.options["taps"], mode), f"{name}.conv0")
        h = h + self.linear(embedding, f"{name}.affine")[:, :, None, None]
        h = self.conv(jax.nn.silu(self.norm(h, f"{name}.norm1")), f"{name}.conv1")
        x = resampled(x, self.options["taps"], mode)
        x = self.conv(x, f"{name}.skip") if f"{name}.skip.weight" in self.state else x
        x = (h + x) * np.sqrt(0.5)
        if f"{name}.qkv.weight" in self.state:
            qkv = self.conv(self.norm(x, f"{name}.norm2"), f"{name}.qkv")
            q, k, v = jnp.moveaxis(qkv.reshape(len(x), x.shape[1], 3, -1), 2, 0)
            weights = jax.nn.softmax(jnp.einsum("ncq,nck->nqk", q, k) / np.sqrt(x.shape[1]))
            h = jnp.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)
            x = (self.conv(h, f"{name}.proj") + x) * np.sqrt(0.5)
        return x

    def embedding(self, clock, one_hot):
        size = self.state["map_layer0.weight"].shape[1]
        if self.options["embedding"] == "fourier":
            angles = jnp.outer(clock, 2 * np.pi * self.state["map_noise.freqs"])
        else:
            angles = jnp.outer(clock, 1e-4 ** (np.arange(size // 2) / (size // 2 - 1)))
        y = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
        if "map_label.weight" in self.state:
            y = y + self.linear(one_hot * np.sqrt(one_hot.shape[1]), "map_label")
        y = jax.nn.silu(self.linear(y, "map_layer0"))
        return jax.nn.silu(self.linear(y, "map_layer1"))

    def blocks(self, part):
        """Names of the blocks in their order: sizes fall in the encoder and rise in the decoder."""
        found = dict.fromkeys(".".join(k.split(".")[:2]) for k in self.state if part in k)
        kinds = ("conv", "in0", "in1", "down", "up", "aux_down", "aux_skip", "aux_residual",
                 *(f"block{i}" for i in range(9)), "aux_up", "aux_norm", "aux_conv")  # fmt: skip

        def place(name):
            size, _, kind = name.partition(".")[2].partition("_")
            height = int(size.partition("x")[0])
            return (-height if part == "enc." else height), kinds.index(kind)

        return sorted(found, key=place)

    def __call__(self, x, clock, one_hot):
        embedding = self.embedding(clock, one_hot)
        skips, image, taps = [], x, self.options["taps"]
        for name in self.blocks("enc."):
            if "aux_skip" in name:
                image = resampled(image, taps, "down")
                x = skips[-1] = x + self.conv(image, name)
            elif "aux_residual" in name:  # convolution, then the filter with stride 2
                pad = 1 + (len(taps) - 1) // 2
                y = convolve(image, self.state[f"{name}.weight"], pad)
                flat = np.outer(taps, taps)[None, None] / np.sum(taps) ** 2
                y = convolve(y, np.tile(flat, (y.shape[1], 1, 1, 1)), 0, 2, y.shape[1])
                y = y + self.state[f"{name}.bias"][:, None, None]
                x = skips[-1] = image = (x + y) / np.sqrt(2)
            else:
                x = self.conv(x, name) if "conv" in name else self.block(x, embedding, name)
                skips.append(x)
        output = y = None
        for name in self.blocks("dec."):
            if "aux_norm" in name:
                y = self.norm(x, name)
            elif "aux_conv" in name:
                up = 0 if output is None else resampled(output, taps, "up")
                output = self.conv(jax.nn.silu(y), name) + up
            else:
                if "_block" in name:
                    x = jnp.concatenate([x, skips.pop()], 1)
                x = self.block(x, embedding, name)
        return output


def normalised(x, axes):
    """networks_edm2.normalize."""
    norm = jnp.sqrt((x**2).sum(axes, keepdims=True))
    return x / (1e-4 + norm * np.sqrt(norm.size / x.size))


def mp_sum(a, b, t):
    return (a + t * (b - a)) / np.sqrt((1 - t) ** 2 + t**2)


def silu(x):
    return jax.nn.silu(x) / 0.596


def edm2(state, options, x, clock, one_hot):
    """UNet of networks_edm2: `options` are the arguments of its blocks, and heads by name."""

    def conv(x, name, gain=1.0):
        w = jnp.asarray(state[f"{name}.weight"])
        w = normalised(w, tuple(range(1, w.ndim))) * (gain / np.sqrt(w[0].size))
        return x @ w.T if w.ndim == 2 else convolve(x, w, w.shape[-1] // 2)

    def fourier(x, name):
        angles = jnp.outer(x, state[f"{name}.freqs"]) + state[f"{name}.phases"]
        return jnp.cos(angles) * np.sqrt(2)

    def skip(x, name):
        return conv(x, f"{name}.conv_skip") if f"{name}.conv_skip.weight" in state else x

    def block(x, name):
        mode = "down" if name.endswith("_down") else "up" if name.endswith("_up") else ""
        x = resampled(x, options["resample_filter"], mode)
        if name.startswith("enc"):
            x = normalised(skip(x, name), 1)
        y = conv(silu(x), f"{name}.conv_res0")
        c = conv(embedding, f"{name}.emb_linear", state[f"{name}.emb_gain"]) + 1
        y = conv(silu(y * c[:, :, None, None]), f"{name}.conv_res1")
        x = mp_sum(x if name.startswith("enc") else skip(x, name), y, options["res_balance"])
        if f"{name}.attn_qkv.weight" in state:
            heads = x.shape[1] // options["channels_per_head"]
            y = conv(x, f"{name}.attn_qkv").reshape(len(x), heads, -1, 3, x[0, 0].size)
            q, k, v = jnp.moveaxis(normalised(y, 2), 3, 0)
            w = jax.nn.softmax(jnp.einsum("nhcq,nhck->nhqk", q, k / np.sqrt(q.shape[2])))
            y = jnp.einsum("nhqk,nhck->nhcq", w, v).reshape(x.shape)
            x = mp_sum(x, conv(y, f"{name}.attn_proj"), options["attn_balance"])
        limit = options["clip_act"]
        return x if limit is None else jnp.clip(x, -limit, limit)

    embedding = conv(fourier(clock, "emb_fourier"), "emb_noise")
    if "emb_label.weight" in state:
        label = conv(one_hot * np.sqrt(one_hot.shape[1]), "emb_label")
        embedding = mp_sum(embedding, label, options["label_balance"])
    embedding = silu(embedding)
    x, skips, t = jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1), [], options["concat_balance"]
    order = Song(state, {}).blocks
    for name in order("enc."):
        x = conv(x, name) if name.endswith("_conv") else block(x, name)
        skips.append(x)
    for name in order("dec."):
        if "_block" in name:
            a, b = x, skips.pop()
            c = np.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
            x = [c / np.sqrt(a.shape[1]) * (1 - t) * a, c / np.sqrt(b.shape[1]) * t * b]
            x = jnp.concatenate(x, 1)
        x = block(x, name)
    return conv(x, "out_conv", state["out_gain"])


def module(class_name, tensors, classes=None, **attributes):
    """A placeholder with these tensors, by dotted names, and attributes.

    `classes` maps a dotted name to the class name and the attributes of the module there.
    """
    made = Module()
    made.class_name, inner = class_name, {}
    for name, value in tensors.items():
        first, dot, rest = name.partition(".")
        inner.setdefault(first, {})[rest if dot else ""] = value
    parts, classes = {}, classes or (lambda name: ("Module", {}))

    def below(name):
        return lambda rest: classes(f"{name}.{rest}")

    for name, found in inner.items():
        if "" not in found:
            kind, own = classes(name)
            parts[name] = module(kind, found, below(name), **own)
    own = {name: found[""] for name, found in inner.items() if "" in found}
    made.__setstate__({"_parameters": own, "_buffers": {}, "_modules": parts, **attributes})
    return made
