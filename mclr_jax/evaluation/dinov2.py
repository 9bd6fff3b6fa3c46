"""DINOv2: the vision transformer of FD_DINOv2, with its published weights.

The user downloads the file of weights: dinov2_vitl14_pretrain.pth, as in EDM2 and dgm-eval, or
another of facebookresearch/dinov2 (S, B, L or g, with or without registers). Sources: Oquab et al.
2023 (arXiv 2304.07193); Darcet et al. 2023 (2309.16588, registers); Stein et al. 2023 (2306.04675).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.evaluation import backbone
from mclr_jax.networks.layers import attention, layer_norm, space_to_depth

SIZE, PATCH, HEAD = 224, 14, 64  # pixels of image and patch, width of an attention head
MEAN, STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)  # of ImageNet


def convert(state: backbone.Weights) -> dict[str, Any]:
    """The published state dict -> weights for `apply`; ValueError if a weight is missing.

    The weights of the blocks are stacked; the positions are resized to SIZE x SIZE pixels.
    """
    try:
        first, positions = state["pos_embed"][0, :1], state["pos_embed"][0, 1:]
        inner = {tuple(key.split(".", 2)[1:]) for key in state if key.startswith("blocks.")}
        depth, names = 1 + max(int(index) for index, _ in inner), {name for _, name in inner}
        width = first.shape[-1]
        registers = state.get("register_tokens", np.zeros((1, 0, width), np.float32))[0]
        patch = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
        stacked = {n: np.stack([state[f"blocks.{i}.{n}"] for i in range(depth)]) for n in names}
        return {
            "patch": patch.reshape(-1, width),
            "patch.bias": state["patch_embed.proj.bias"],
            "tokens": np.concatenate([state["cls_token"][0] + first, registers]),
            "positions": _resized(positions, antialias=bool(len(registers))),
            "blocks": stacked,
            "norm.weight": state["norm.weight"],
            "norm.bias": state["norm.bias"],
        }
    except KeyError as error:
        raise ValueError(
            f"The DINOv2 weights have no {error}; expected a file like dinov2_vitl14_pretrain.pth."
        ) from error


def _resized(positions: np.ndarray, antialias: bool) -> np.ndarray:
    """Embeddings (old^2, D) of a grid of positions -> (256, D), resized as in the published code.

    Models with registers: antialiasing, cubic weights with a = -0.5. Models without registers: no
    antialiasing, a = -0.75, and a grid that is 0.1 positions too large.
    """
    old, new, width = round(len(positions) ** 0.5), SIZE // PATCH, positions.shape[-1]
    grid = positions.reshape(old, old, width)
    if antialias:
        grid = np.asarray(jax.image.resize(grid, (new, new, width), "cubic"))
    elif old != new:
        place, a = (np.arange(new) + 0.5) * old / (new + 0.1) - 0.5, -0.75
        d = np.abs(place[:, None] - np.arange(-2, old + 2))  # to old positions, padded by 2
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        matrix = np.where(d <= 1, near, np.where(d < 2, far, 0))
        grid = np.pad(grid, [(2, 2), (2, 2), (0, 0)], "edge")
        grid = np.einsum("ai,bj,ijd->abd", matrix, matrix, grid, optimize=True).astype(np.float32)
    return grid.reshape(new * new, width)


def apply(weights: dict[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, 1 or 3) in [-1, 1] -> class token (B, D), logits (B, 0) of no classes."""
    x = backbone.coloured(images, SIZE)  # resized as in EDM2
    x = space_to_depth((x / 2 + 0.5 - MEAN) / STD, PATCH).reshape(len(x), -1, 3 * PATCH**2)
    x = x @ weights["patch"] + weights["patch.bias"] + weights["positions"]
    tokens = jnp.broadcast_to(weights["tokens"], (len(x), *weights["tokens"].shape))
    x, _ = jax.lax.scan(_block, jnp.concatenate([tokens, x], axis=1), weights["blocks"])
    return _norm(weights, "norm", x[:, 0]), jnp.zeros((len(x), 0))


def _block(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    """One block of x (B, N, D), for lax.scan."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    qkv = linear(_norm(weights, "norm1", x), "attn.qkv").reshape(*x.shape[:2], 3, -1, HEAD)
    h = attention(*jnp.moveaxis(qkv, 2, 0)).reshape(x.shape)
    x = x + weights["ls1.gamma"] * linear(h, "attn.proj")
    h = _norm(weights, "norm2", x)
    if "mlp.w12.weight" in weights:  # SwiGLU, in g alone
        gate, value = jnp.split(linear(h, "mlp.w12"), 2, axis=-1)
        h = linear(jax.nn.silu(gate) * value, "mlp.w3")
    else:
        h = linear(jax.nn.gelu(linear(h, "mlp.fc1"), approximate=False), "mlp.fc2")
    return x + weights["ls2.gamma"] * h, None


def _norm(weights: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    return layer_norm(x, x.dtype) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
