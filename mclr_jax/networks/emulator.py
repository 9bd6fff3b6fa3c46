"""Emulators: networks that give the change from a state to the next one."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from mclr_jax.networks import layers
from mclr_jax.networks.layers import DEEPEST, WIDEST, Dropout, Linear, Network
from mclr_jax.schema import key
from mclr_jax.types import Condition


def near(h: jax.Array, reach: int, axes: tuple[int, ...]) -> jax.Array:
    """The channels (..., C) of all places at most `reach` away along each of the periodic axes."""
    for axis in axes:
        shifts = range(reach, -reach - 1, -1)
        h = jnp.concatenate([jnp.roll(h, shift, axis) for shift in shifts], axis=-1)
    return h


class Block(nn.Module):
    """h + W silu(u) v, of u and v linear in the channels `near` a place."""

    hidden: int
    reach: int
    axes: tuple[int, ...]
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
        inputs = near(h, self.reach, self.axes)
        u, v = jnp.split(Linear(2 * self.hidden, dtype=self.dtype, name="linear0")(inputs), 2, -1)
        hidden = Dropout(self.dropout, name="dropout")(nn.silu(u) * v, dropout_keys)
        return h + Linear(h.shape[-1], kernel_init=zeros, dtype=self.dtype, name="linear1")(hidden)


class Emulator(Network):
    """The change of each frame's state to the next one, from that state alone; 0 at the start.

    With `reach`, coordinates (d,) are places on a ring and fields (H, W, C) have places on a torus,
    or on a ring if a side is 1; the network is the same at each place and sees those near it,
    further with each block. Without, all coordinates are the channels of one place. Of a field a
    place can be a patch: then the network sees further, and moves with its input by patches alone.
    """

    out_channels: int = 3
    width: int = key(32, 1, WIDEST, says="channels of a place")
    hidden: int = key(48, 1, WIDEST, says="units of a block")
    depth: int = key(4, 1, DEEPEST, says="number of blocks")
    reach: int = key(0, 0, says="places on each side that a block sees; 0: no places")
    patch_size: int = key(1, 1, DEEPEST, says="sides of the patch of a field that is one place")
    variance: bool = key(False, says="the output has a log variance for each value")
    gives: ClassVar[str] = "next"

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, F, d) or (B, F, H, W, C) -> as x, with twice the channels if `variance`.

        Noise level and label are not used. Raises ValueError on other shapes, for fields without
        `reach`, and for a reach that sees a place twice.
        """
        del c_noise
        fields = x.ndim == 5
        if x.ndim not in (3, 5) or (fields and not self.reach):
            raise ValueError(
                f"x has shape {x.shape} and network.reach is {self.reach}; expected states "
                "(B, F, d), or fields (B, F, H, W, C) and a reach of 1 or more"
            )
        ring, patch = bool(self.reach) and not fields, self.patch_size
        h = x[..., None] if ring else x
        if fields:
            layers.check_sizes(x[:, 0], patch, 1, "patch_size")
            h = layers.space_to_depth(x.reshape(-1, *x.shape[2:]), patch)
            h = h.reshape(*x.shape[:2], *h.shape[1:])
        axes = tuple(axis for axis in (2, 3) if h.shape[axis] > 1) if fields else (2,) * ring
        if axes and 2 * self.reach >= (least := min(h.shape[axis] for axis in axes)):
            raise ValueError(
                f"network.reach is {self.reach} for {least} places of x, {x.shape}; expected at "
                f"most {(least - 1) // 2}, by which a block sees each place once"
            )
        h = Linear(self.width, dtype=self.dtype, name="in_linear")(near(h, self.reach, axes))
        block = self.block(Block)
        for index in range(self.depth):
            options = self.hidden, self.reach, axes, self.dropout, self.dtype
            h = block(*options, name=f"block{index}")(h, condition.dropout_keys)
        channels = (1 if ring else x.shape[-1] * patch**2) * (1 + self.variance)
        h = Linear(channels, kernel_init=zeros, dtype=self.dtype, name="out_linear")(h)
        if fields:
            h = layers.depth_to_space(h.reshape(-1, *h.shape[2:]), patch)
            h = h.reshape(*x.shape[:-1], -1)
        if ring:  # (..., d, 1 or 2): the means of all coordinates come first
            h = h.swapaxes(-1, -2).reshape(*x.shape[:-1], -1)
        return h.astype(jnp.float32)
