"""A config becomes an experiment: network, objective, optimizer and averages, looked up by name."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from mclr_jax import denoiser, noise
from mclr_jax.data import augment, pipeline
from mclr_jax.denoiser import DenoiseFn
from mclr_jax.names import look_up, nearest
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.unet import UNet
from mclr_jax.objectives.dsm import dsm
from mclr_jax.training import ema
from mclr_jax.training.optimizer import learning_rate, optimizer

NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "unet": UNet, "dit": DiT}
NOISE_LEVELS = {"lognormal": noise.LogNormal, "loguniform": noise.LogUniform}
OBJECTIVES = {"dsm": dsm}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make(table: Mapping[str, Any], config: Mapping[str, Any], what: str, **more: Any) -> Any:
    """table[config["name"]](**the other keys, **more); errors name the key at fault."""
    factory = look_up(table, config["name"], what)
    arguments = {key: value for key, value in config.items() if key != "name"}
    fields = [field.name for field in dataclasses.fields(factory)]
    for key in arguments:
        if key not in fields:
            raise ValueError(
                f"config.{what}.{key}: {config['name']!r} has no such option. "
                f"{nearest(key, fields)}"
            )
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return factory(**frozen, **more)


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a network must know of a data set, kept with a run so that sampling needs no data.

    Attributes:
      shape: of one example, (H, W, C) or (d,).
      num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.
      sigma_data: standard deviation of the scaled data.
    """

    shape: tuple[int, ...]
    num_classes: int
    sigma_data: float


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Pure functions made from a config; holds no training state."""

    config: FrozenConfigDict
    data: DataInfo

    @functools.cached_property
    def network(self) -> nn.Module:
        config = self.config.network.to_dict()
        dtype = look_up(DTYPES, config.pop("dtype"), "network.dtype")
        fixed = {"out_channels": self.data.shape[-1], "num_classes": self.data.num_classes}
        if self.config.data.augment:
            fixed["augment_dim"] = augment.LABEL_SIZE
        return make(NETWORKS, config, "network", dtype=dtype, **fixed)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optimizer(self.config.optimizer, self.config.num_steps)

    @functools.cached_property
    def learning_rate(self) -> Callable:
        return learning_rate(self.config.optimizer, self.config.num_steps)

    @functools.cached_property
    def ema_tracks(self) -> dict[str, ema.Decay]:
        return ema.tracks(self.config.ema)

    @functools.cached_property
    def objective(self) -> Callable:
        """(denoise, x0 (B, ...), label (B,), keys (B,)) -> loss (B,), metrics (B,) by name."""
        config = self.config.objective.to_dict()
        return functools.partial(
            look_up(OBJECTIVES, config.pop("name"), "objective"),
            noise=make(NOISE_LEVELS, self.config.noise.to_dict(), "noise"),
            weight=functools.partial(noise.edm_weight, sigma_data=self.data.sigma_data),
            null_label=self.data.num_classes,
            **config,
        )

    @property
    def null_label(self) -> int:
        return self.data.num_classes

    @property
    def _keys(self) -> jax.Array:
        return jax.random.split(jax.random.key(self.config.seed), 3)

    @property
    def step_key(self) -> jax.Array:
        """Root of the randomness of training steps."""
        return self._keys[0]

    @property
    def eval_key(self) -> jax.Array:
        """Root of the randomness of evaluation."""
        return self._keys[1]

    def init(self) -> Any:
        """Fresh parameters; a function of config.seed alone."""
        x, one = jnp.zeros((1, *self.data.shape)), jnp.zeros((1,))
        variables = self.network.init(
            self._keys[2], x, one, jnp.zeros((1,), jnp.int32), self._no_augment(1)
        )
        return variables["params"]

    def denoiser(self, params: Any, augment_label=None, dropout_keys=None) -> DenoiseFn:
        """The network with these parameters as a DenoiseFn."""

        def network(x, c_noise, label):
            extra = self._no_augment(len(x)) if augment_label is None else augment_label
            return self.network.apply({"params": params}, x, c_noise, label, extra, dropout_keys)

        return denoiser.edm(network, self.data.sigma_data)

    def _no_augment(self, batch_size: int):
        return jnp.zeros((batch_size, augment.LABEL_SIZE)) if self.config.data.augment else None

    def loss(self, params: Any, batch: dict, keys: jax.Array, train: bool):
        """The objective on a batch of raw data.

        Args:
          params: network parameters.
          batch: image (B, ...), label (B,) int32, as `data.pipeline` gives them.
          keys: (B,) typed keys of the examples.
          train: whether to augment and to drop out.

        Returns:
          loss (B,) and metrics (B,) by name.
        """
        k_flip, k_augment, k_dropout, k_objective = jax.vmap(
            lambda key: jax.random.split(key, 4), out_axes=1
        )(keys)
        x0, augment_label = pipeline.to_float(batch["image"]), None
        if train and self.config.data.flip:
            x0 = pipeline.random_flip(x0, k_flip)
        if train and self.config.data.augment:
            x0, augment_label = augment.augment(x0, k_augment, self.config.data.augment)
        dropout_keys = k_dropout if train and self.network.dropout else None
        denoise = self.denoiser(params, augment_label, dropout_keys)
        return self.objective(denoise, x0, batch["label"], k_objective)
