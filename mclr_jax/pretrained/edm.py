"""Published EDM and EDM2 snapshots: their hyper-parameters, and the names of their tensors.

Sources: NVlabs/edm and NVlabs/edm2, training/networks*.py. A snapshot holds modules with the
arguments of their constructors, and attributes. The official qkv convolutions order the output
channels (head, channel, q/k/v); ours order them (head, q/k/v, channel).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mclr_jax import schema
from mclr_jax.denoiser import EDM, IDDPM, VE, VP
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.edm2 import EDM2
from mclr_jax.networks.unet import UNet
from mclr_jax.pretrained.names import Checkpoint, Names, Path, to_params, to_state
from mclr_jax.pretrained.tensors import Module
from mclr_jax.samplers import Sampler

# Class name -> preconditioning, and its fields by their attributes in the file.
PRECONDITIONINGS: dict[str, tuple[Any, dict[str, str]]] = {
    "EDMPrecond": (EDM, {"sigma_data": "sigma_data"}),
    "VPPrecond": (VP, {"beta_d": "beta_d", "beta_min": "beta_min", "steps": "M",
                       "first": "epsilon_t"}),
    "VEPrecond": (VE, {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "iDDPMPrecond": (IDDPM, {"offset": "C_2", "least_alpha": "C_1", "steps": "M"}),
    "Precond": (EDM, {"sigma_data": "sigma_data"}),
}  # fmt: skip
# Class name of the network inside -> ours, and official defaults that it does not have.
NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SongUNet": (UNet, {"channel_mult": (1, 2, 2, 2), "dropout": 0.1}),
    "DhariwalUNet": (UNet, {
        "architecture": "adm", "channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3,
        "dropout": 0.1, "attention_resolutions": (32, 16, 8), "channels_per_head": 64,
    }),
    "UNet": (EDM2, {}),
}  # fmt: skip
# Arguments of the constructors by other names here; those that follow from the data; those of EDM2
# that are also attributes of its modules.
RENAMED = {"model_channels": "channels", "attn_resolutions": "attention_resolutions",
           "embedding_type": "embedding", "encoder_type": "encoder",
           "decoder_type": "decoder"}  # fmt: skip
OF_DATA = ("img_resolution", "img_channels", "in_channels", "out_channels", "label_dim",
           "label_dropout")  # fmt: skip
OF_EDM2 = ("dropout", "res_balance", "attn_balance", "clip_act", "resample_filter",
           "label_balance", "concat_balance")  # fmt: skip


def names(net: Any) -> Names:
    """The official names of the parameters of `networks.unet.UNet` and `networks.edm2.EDM2`."""
    prefix, qkv = ("unet.", "attn_qkv") if isinstance(net, EDM2) else ("model.", "qkv")

    def name(path: Path) -> tuple[str] | None:
        if path[0] in net.optional_inputs and (isinstance(net, EDM2) or path[0] == "map_strength"):
            return None
        found = ".".join(path).replace("kernel", "weight").replace("scale", "weight")
        for part in ("enc", "dec", "map_noise", "fourier"):
            found = found.replace(f"{part}_", f"{part}.")
        return (found if found.startswith("logvar") else prefix + found,)

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


def read(content: Mapping[str, Any]) -> Checkpoint:
    """The model in the "ema" of a snapshot.

    ValueError: its classes are not those of EDM or EDM2, a tensor is missing, unexpected or
    misshapen, or an attribute has a value that the official networks do not have.
    """
    if not isinstance(module := content.get("ema"), Module):
        raise ValueError("it has no network 'ema'; expected a snapshot of EDM or EDM2")
    if module.class_name not in PRECONDITIONINGS:
        raise ValueError(
            f"its network is a {module.class_name}; expected one of {', '.join(PRECONDITIONINGS)}."
        )
    state, modules = module.tensors(), module.modules()
    cls, keys = PRECONDITIONINGS[module.class_name]
    values = {field: module[name] for field, name in keys.items()}
    preconditioning = cls(**{k: type(getattr(cls(), k))(v) for k, v in values.items()})
    size, channels, classes = (
        int(module[name]) for name in ("img_resolution", "img_channels", "label_dim")
    )
    twice = 2 if module.class_name == "iDDPMPrecond" else 1  # the variance
    net = _network(modules, out_channels=twice * channels, num_classes=classes)
    family, num_steps = "edm", 18
    if isinstance(net, EDM2):
        net = net.clone(logvar_channels=np.size(state.get("logvar_fourier.freqs", 0)))
        family, num_steps = "edm2", 32
    dropped = modules.get("model", module).get("label_dropout", 0)
    units, facts = _units(content.get("encoder"))
    data = DataInfo(
        (size, size, channels), classes, getattr(preconditioning, "sigma_data", 0.5),
        has_null=not classes or dropped > 0, **units,
    )  # fmt: skip
    model = Model(net, preconditioning, data)
    rest = {k: v for k, v in state.items() if k == "u" or k.endswith(".resample_filter")}
    taps = np.array(net.resample_filter or (1, 1))  # of every official class by default
    for name, value in rest.items():
        if name == "u":
            _check(name, value[-2::-1], preconditioning.table, 0.01)
        else:
            _check(name, value[0, 0], np.outer(taps, taps) / taps.sum() ** 2)
    state = {name: value for name, value in state.items() if name not in rest}
    params = to_params(state, shapes_of(model), names(net))
    return Checkpoint(family, model, params, Sampler(num_steps=num_steps), rest, facts)


def state(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, as the file had them."""
    return to_state(checkpoint.params, names(checkpoint.model.network))


def _network(modules: Mapping[str, Module], **of_data: int) -> UNet | EDM2:
    """The network by its constructor's arguments; attributes of modules must agree with them."""
    inner = modules.get("model", modules.get("unet", Module()))
    if inner.class_name not in NETWORKS:
        raise ValueError(
            f"its inner network is a {inner.class_name}; expected one of {', '.join(NETWORKS)}."
        )
    cls, usual = NETWORKS[inner.class_name]
    given = {
        RENAMED.get(key, key): 0 if value is None else value
        for key, value in dict(inner["_init_kwargs"]).items() if key not in OF_DATA
    }  # fmt: skip
    net = schema.read(cls, usual | given | of_data, "its network")

    adm = inner.class_name == "DhariwalUNet"
    for name, module in modules.items():
        attends = modules.keys() & {f"{name}.qkv", f"{name}.attn_qkv"}
        heads = net.heads(module["out_channels"]) if attends else 0
        expected: dict[str, dict[str, Any]] = {
            "UNet": {key: getattr(net, key, 0) for key in OF_EDM2},
            "Block": {key: getattr(net, key, 0) for key in OF_EDM2} | {"num_heads": heads},
            "UNetBlock": {"skip_scale": 1.0 if adm else np.sqrt(0.5), "adaptive_scale": adm,
                          "num_heads": heads, "dropout": net.dropout},
            "GroupNorm": {"eps": 1e-5 if adm else 1e-6},
            "PositionalEmbedding": {"endpoint": not adm, "max_positions": 10000},
            "Conv2d": {"fused_resample": name.endswith("_aux_residual")},
        }  # fmt: skip
        for key, value in expected.get(module.class_name, {}).items():
            _check(f"{name}.{key}", module.get(key, value) or 0, value)
    return net


def _units(encoder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The units of latents, raw = offset + scale x, and the name of their autoencoder."""
    if not isinstance(encoder, Module) or "scale" not in encoder:
        return {}, {}
    scale, bias = (np.asarray(encoder[key], np.float64).ravel() for key in ("scale", "bias"))
    units = {"offset": tuple((-bias / scale).tolist()), "scale": tuple((1 / scale).tolist())}
    return units, {"latents": "edm2", "autoencoder_name": str(encoder.get("vae_name", ""))}


def _check(name: str, found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Raises ValueError unless the values are the same but for the tolerance."""
    shapes = np.shape(found), np.shape(expected)
    if shapes[0] != shapes[1] or not np.allclose(found, expected, tolerance, tolerance):
        raise ValueError(f"{name} is {found}, expected {expected}: no network of the official code")
