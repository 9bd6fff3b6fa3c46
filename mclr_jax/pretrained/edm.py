"""Published EDM and EDM2 snapshots: their hyper-parameters, and the names of their tensors.

Sources: NVlabs/edm and NVlabs/edm2, training/networks*.py. A snapshot holds modules with their
attributes; shapes and names tell what these do not. The official qkv convolutions order the output
channels (head, channel, q/k/v); ours order them (head, q/k/v, channel).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mclr_jax.denoiser import EDM, IDDPM, VE, VP
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.edm2 import EDM2
from mclr_jax.networks.unet import UNet
from mclr_jax.pretrained.checkpoint import Checkpoint
from mclr_jax.pretrained.names import Names, Path, to_params
from mclr_jax.pretrained.tensors import Module
from mclr_jax.samplers import Sampler

State = Mapping[str, np.ndarray]
# Class name -> preconditioning, and its fields by their attributes in the file.
PRECONDITIONINGS: dict[str, tuple[Any, dict[str, str]]] = {
    "EDMPrecond": (EDM, {"sigma_data": "sigma_data"}),
    "VPPrecond": (VP, {"beta_d": "beta_d", "beta_min": "beta_min", "steps": "M",
                       "first": "epsilon_t"}),
    "VEPrecond": (VE, {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "iDDPMPrecond": (IDDPM, {"offset": "C_2", "least_alpha": "C_1", "steps": "M"}),
    "Precond": (EDM, {"sigma_data": "sigma_data"}),
}  # fmt: skip


def family_of(module: Module) -> str:
    return "edm2" if module.class_name == "Precond" else "edm"


def names(net: UNet | EDM2) -> Names:
    """The official names of the parameters of `networks.unet.UNet` and `networks.edm2.EDM2`."""
    prefix, qkv = ("unet.", "attn_qkv") if isinstance(net, EDM2) else ("model.", "qkv")

    def name(path: Path) -> str | None:
        if path[0] in net.optional_inputs and (isinstance(net, EDM2) or path[0] == "map_strength"):
            return None
        found = ".".join(path).replace("kernel", "weight").replace("scale", "weight")
        for part in ("enc", "dec", "map_noise", "fourier"):
            found = found.replace(f"{part}_", f"{part}.")
        return found if found.startswith("logvar") else prefix + found

    def window(path: Path) -> tuple[int, ...]:
        convolutions = ("skip", "qkv", "proj")
        return (1, 1) if path[-2].endswith(convolutions) else ()

    def turn(path: Path, value: np.ndarray, back: bool) -> np.ndarray:
        if path[-2:-1] != (qkv,):
            return value
        return reorder_qkv(value, net.heads(value.shape[-1] // 3), back)

    return Names(name, window, turn)


def reorder_qkv(value: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """Last axis (..., 3 D) from official order (head, channel, q/k/v) to (head, q/k/v, channel)."""
    split = value.reshape(*value.shape[:-1], heads, *((3, -1) if back else (-1, 3)))
    return split.swapaxes(-1, -2).reshape(value.shape)


def read(content: Mapping[str, Any], given: dict[str, Any]) -> Checkpoint:
    """The model in the "ema" of a snapshot, which tells all: no key of `given` is used.

    ValueError: its classes are not those of EDM or EDM2, a tensor is missing, unexpected or
    misshapen, or an attribute has a value that the official networks do not have.
    """
    module = content["ema"]
    if module.class_name not in PRECONDITIONINGS:
        raise ValueError(
            f"its network is a {module.class_name}; expected one of {', '.join(PRECONDITIONINGS)}."
        )
    state, modules = module.tensors(), module.modules()
    cls, keys = PRECONDITIONINGS[module.class_name]
    net = (_edm2 if family_of(module) == "edm2" else _edm)(state, modules)
    values = {field: _attribute(module, name) for field, name in keys.items()}
    size, channels, classes = (
        int(_attribute(module, name)) for name in ("img_resolution", "img_channels", "label_dim")
    )
    twice = 2 if module.class_name == "iDDPMPrecond" else 1  # the variance
    net = net.clone(out_channels=twice * channels, num_classes=classes)
    preconditioning = cls(**{k: type(getattr(cls(), k))(v) for k, v in values.items()})
    dropped = modules.get("model", module).state.get("label_dropout", 0)
    units, facts = _units(content.get("encoder"))
    data = DataInfo(
        (size, size, channels), classes, getattr(preconditioning, "sigma_data", 0.5),
        has_null=not classes or dropped > 0, **units,
    )  # fmt: skip
    model = Model(net, preconditioning, data)
    rest = {k: v for k, v in state.items() if k == "u" or k.endswith(".resample_filter")}
    if "u" in rest:
        _check("u", rest["u"][-2::-1], preconditioning.table, 0.01)
    state = {name: value for name, value in state.items() if name not in rest}
    params = to_params(state, shapes_of(model), names(net), net.optional_inputs)
    sampler = Sampler(num_steps=32 if isinstance(net, EDM2) else 18)
    return Checkpoint(family_of(module), model, params, sampler, rest, facts)


def _edm(state: State, modules: Mapping[str, Module]) -> UNet:
    """The network of EDMPrecond and those of the baselines, with attributes that were checked."""
    kind = modules["model"].class_name if "model" in modules else "missing"
    if kind not in ("SongUNet", "DhariwalUNet"):
        raise ValueError(f"its inner network is {kind}; expected a SongUNet or DhariwalUNet.")
    adm = kind == "DhariwalUNet"
    channels, widths, blocks, attention = _levels(state, "model.enc.", "conv1", "qkv")
    width, noise = _shape(state, "model.map_layer0.weight")
    channels = noise if adm else channels
    filters = [v for k, v in state.items() if k.endswith(".resample_filter")]
    taps = _taps(filters) if filters else ()
    own: dict[str, Any] = {"channels_per_head": 64}
    if not adm:
        found = [n for n in ("residual", "skip") if any(f"_aux_{n}." in k for k in state)]
        outputs = sum(k.endswith("_aux_conv.weight") for k in state)
        own = {
            "embedding": "fourier" if "model.map_noise.freqs" in state else "positional",
            "encoder": found[0] if found else "standard",
            "decoder": "skip" if outputs > 1 else "standard",
            "resample_filter": taps, "channel_mult_noise": _whole(noise, channels),
        }  # fmt: skip
    augment = state.get("model.map_augment.weight", np.zeros((0, 0)))
    net = UNet(
        "adm" if adm else ("ncsnpp" if own["embedding"] == "fourier" else "ddpmpp"),
        channels=channels, channel_mult=tuple(_whole(w, channels) for w in widths),
        num_blocks=blocks, attention_resolutions=attention, augment_dim=augment.shape[-1],
        channel_mult_emb=_whole(width, channels), dropout=_of_blocks(modules, "dropout", 0.0),
        **own,
    )  # fmt: skip
    for name, module in modules.items():
        outputs = int(module.state.get("out_channels", 0))
        wanted: dict[str, dict[str, Any]] = {
            "UNetBlock": {"skip_scale": 1.0 if adm else np.sqrt(0.5), "adaptive_scale": adm,
                          "num_heads": net.heads(outputs) if f"{name}.qkv" in modules else 0},
            "GroupNorm": {"eps": 1e-5 if adm else 1e-6},
            "PositionalEmbedding": {"endpoint": not adm, "max_positions": 10000},
            "Conv2d": {"fused_resample": name.endswith("_aux_residual")},
        }  # fmt: skip
        for key, value in wanted.get(module.class_name, {}).items():
            _check(f"{name}.{key}", module.state.get(key, value), value)
    return net


def _edm2(state: State, modules: Mapping[str, Module]) -> EDM2:
    """The network of EDM2's Precond."""
    _, widths, blocks, attention = _levels(state, "unet.enc.", "conv_res1", "attn_qkv")
    width, noise = _shape(state, "unet.emb_noise.weight")
    channels = math.gcd(*widths, width, noise)
    most, least = 2**16, 1  # channels of a head that give the number of heads of every block
    for name, module in modules.items():
        if module.class_name == "Block" and (f"{name}.attn_qkv" in modules or "_in0" in name):
            features, heads = _attribute(module, "out_channels"), _attribute(module, "num_heads")
            least = max(least, features // (heads + 1) + 1)
            most = min(most, features // heads if heads else most)
    option = partial(_of_blocks, modules)
    unet = modules["unet"].state
    return EDM2(
        channels=channels, channel_mult=tuple(w // channels for w in widths), num_blocks=blocks,
        channel_mult_noise=0 if noise == widths[0] else noise // channels,
        channel_mult_emb=0 if width == max(widths) else width // channels,
        attention_resolutions=attention,
        channels_per_head=64 if least <= 64 <= most else max(least, min(most, 2**15)),
        label_balance=float(unet.get("label_balance", 0.5)),
        concat_balance=float(unet.get("concat_balance", 0.5)),
        res_balance=option("res_balance", 0.3), attn_balance=option("attn_balance", 0.3),
        clip_act=option("clip_act", 256.0), dropout=option("dropout", 0.0),
        resample_filter=option("resample_filter", (1.0, 1.0)),
        logvar_channels=len(state.get("logvar_fourier.freqs", "x")),
    )  # fmt: skip


def _units(encoder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The units of latents, raw = offset + scale x, and the name of their autoencoder."""
    told = encoder.state if isinstance(encoder, Module) else {}
    if "scale" not in told:
        return {}, {}
    scale, bias = (np.asarray(told[key], np.float64).ravel() for key in ("scale", "bias"))
    units = {"offset": tuple((-bias / scale).tolist()), "scale": tuple((1 / scale).tolist())}
    return units, {"latents": "edm2", "autoencoder_name": str(told.get("vae_name", ""))}


def _levels(state: State, prefix: str, last: str, qkv: str) -> tuple[int, list[int], int, Any]:
    """Channels of an encoder's start and levels, blocks in a level, heights with attention."""
    found = dict.fromkeys(k.removeprefix(prefix).split(".")[0] for k in state if prefix in k)
    sizes = sorted({n.partition("_")[0] for n in found}, key=lambda s: -int(s.partition("x")[0]))
    if not sizes:
        raise ValueError(f"it has no tensors {prefix}*: not weights of an EDM U-Net")
    widths = [_shape(state, f"{prefix}{s}_block0.{last}.weight")[0] for s in sizes]
    attends = [s for s in sizes if f"{prefix}{s}_block0.{qkv}.weight" in state]
    blocks = sum(name.startswith(f"{sizes[0]}_block") for name in found)
    first, *_ = _shape(state, f"{prefix}{sizes[0]}_conv.weight")
    return first, widths, blocks, tuple(int(s.partition("x")[0]) for s in attends)


def _shape(state: State, name: str) -> tuple[int, ...]:
    """The shape of the first tensor whose name ends so."""
    found = next((v.shape for k, v in state.items() if k.endswith(name)), ())
    if not found:
        raise ValueError(f"tensor {name!r} is missing or a scalar")
    return found


def _whole(part: int, channels: int) -> int:
    if not channels or part % channels:
        raise ValueError(f"a layer has {part} channels; expected a multiple of {channels}.")
    return part // channels


def _taps(filters: list[np.ndarray]) -> tuple[float, ...]:
    """The taps of filters, which must be the same; whole numbers where they are in such ratios."""
    taps = filters[0].astype(np.float64).sum(axis=(0, 1, 2))
    whole = np.round(taps / np.abs(taps).min())
    taps = whole if np.allclose(whole / whole.sum(), taps / taps.sum(), atol=1e-6) else taps
    for found in filters:
        _check("resample_filter", found[0, 0], np.outer(taps, taps) / taps.sum() ** 2, 1e-5)
    return tuple(taps.tolist())


def _attribute(module: Module, name: str) -> Any:
    if name not in module.state:
        raise ValueError(f"its {module.class_name} has no attribute {name}.")
    return module.state[name]


def _of_blocks(modules: Mapping[str, Module], name: str, usual: Any) -> Any:
    """An attribute that all blocks have, of the type of the usual one; 0 for None."""
    blocks = [m for m in modules.values() if m.class_name in ("Block", "UNetBlock")]
    found = [m.state.get(name, usual) for m in blocks]
    values: set[Any] = {tuple(v) if isinstance(v, list | tuple) else v or 0.0 for v in found}
    if len(values) != 1:
        raise ValueError(f"its blocks have {name} = {sorted(values)}; expected one value.")
    (value,) = values
    return tuple(map(float, value)) if isinstance(usual, tuple) else float(value)


def _check(name: str, found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Raises ValueError unless the values are the same but for the tolerance."""
    shapes = np.shape(found), np.shape(expected)
    if shapes[0] != shapes[1] or not np.allclose(found, expected, tolerance, tolerance):
        raise ValueError(f"{name} is {found}, expected {expected}: no network of the official code")
