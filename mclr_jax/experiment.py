"""A config becomes an experiment: network, objective, optimizer and averages, looked up by name."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from mclr_jax import denoiser, mixture, noise, posterior
from mclr_jax.data import augment, pipeline
from mclr_jax.denoiser import DenoiseFn
from mclr_jax.names import look_up, nearest
from mclr_jax.networks.classifier import ConvClassifier, MLPClassifier
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.unet import UNet
from mclr_jax.objectives.cca import cca
from mclr_jax.objectives.classify import classify
from mclr_jax.objectives.contrastive_flow import contrastive_flow
from mclr_jax.objectives.ddo import ddo
from mclr_jax.objectives.dpo import dpo
from mclr_jax.objectives.dsm import dsm
from mclr_jax.objectives.gft import gft
from mclr_jax.objectives.mclr import is_unbounded as mclr_is_unbounded
from mclr_jax.objectives.mclr import mclr
from mclr_jax.objectives.mclr import needs_reference as mclr_needs_reference
from mclr_jax.objectives.model_guidance import model_guidance
from mclr_jax.training import ema
from mclr_jax.training.optimizer import learning_rate, optimizer

NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "unet": UNet, "dit": DiT}
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "mlp_classifier": MLPClassifier,
    "conv_classifier": ConvClassifier,
}
NOISE_LEVELS = {"lognormal": noise.LogNormal, "loguniform": noise.LogUniform}
OBJECTIVES: dict[str, Callable] = {
    "dsm": dsm,
    "mclr": mclr,
    "classify": classify,
    "cca": cca,
    "contrastive_flow": contrastive_flow,
    "ddo": ddo,
    "dpo": dpo,
    "gft": gft,
    "model_guidance": model_guidance,
}
# What an objective's parameters of these names are, is made here and not read from the config.
MADE = ("extra", "posterior", "reference", "teacher", "generated", "other", "class_prior")
POSTERIORS = ("", "exact", "classifier", "denoiser")
POSTERIOR_OPTIONS = ("posterior", "posterior_from", "posterior_levels", "posterior_candidates")
STRENGTH_SIZE = 8  # of `strength_features`
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


def objective_options(name: str) -> dict[str, Any]:
    """The options of an objective with their defaults, as config.objective holds them."""
    parameters = inspect.signature(look_up(OBJECTIVES, name, "objective")).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {"name": name} | {key: value for key, value in options.items() if key not in MADE}


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a network must know of a data set, kept with a run so that sampling needs no data.

    Attributes:
      shape: of one example, (H, W, C) or (d,).
      num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.
      sigma_data: standard deviation of the scaled data.
      class_prior: share of each class in the training data.
    """

    shape: tuple[int, ...]
    num_classes: int
    sigma_data: float
    class_prior: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Pure functions made from a config; holds no training state.

    Attributes:
      config: see configs/base.py.
      data: what must be known of the data.
      classifier: the run that objective.posterior "classifier" reads, as an experiment.
    """

    config: FrozenConfigDict
    data: DataInfo
    classifier: "Experiment | None" = None

    @functools.cached_property
    def network(self) -> nn.Module:
        config = self.config.network.to_dict()
        dtype = look_up(DTYPES, config.pop("dtype"), "network.dtype")
        fixed = {"num_classes": self.data.num_classes, "augment_dim": self._condition_size}
        if self.config.objective.name == "classify":
            return make(CLASSIFIERS, config, "network", dtype=dtype, **fixed)
        return make(
            NETWORKS, config, "network", dtype=dtype, out_channels=self.data.shape[-1], **fixed
        )

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
        """(model, x0 (B, ...), label (B,), keys (B,), extra, **made) -> loss (B,), metrics."""
        config = self.config.objective.to_dict()
        function = look_up(OBJECTIVES, config.pop("name"), "objective")
        if self.takes("weight"):
            config["weight"] = functools.partial(noise.edm_weight, sigma_data=self.data.sigma_data)
        if self.takes("class_prior"):
            config["class_prior"] = self.data.class_prior
        for key in ("strength", "generated_from", *POSTERIOR_OPTIONS):
            config.pop(key, None)  # read elsewhere
        return functools.partial(
            function,
            noise=make(NOISE_LEVELS, self.config.noise.to_dict(), "noise"),
            null_label=self.null_label,
            **config,
        )

    def takes(self, parameter: str) -> bool:
        """Whether the objective has a parameter of this name."""
        function = look_up(OBJECTIVES, self.config.objective.name, "objective")
        return parameter in inspect.signature(function).parameters

    @property
    def null_label(self) -> int:
        return self.data.num_classes

    @property
    def strength(self) -> tuple[float, float] | None:
        """(low, high) of the guidance strength beta that the network takes as an input, or None."""
        return tuple(self.config.objective.get("strength", ())) or None

    @property
    def averages(self) -> bool:
        """Whether the loss needs the average of the weights, as frozen["average"]."""
        return self.config.objective.name == "model_guidance"

    def _draw_strength(self, uniform: jax.Array) -> jax.Array:
        low, high = self.strength or (0.0, 0.0)
        if self.config.objective.name == "gft":  # 1 / (1 + strength) is uniform there
            return 1 / (1 / (1 + low) + uniform * (1 / (1 + high) - 1 / (1 + low))) - 1
        # an arcsine law: the ends, which have neighbours on one side alone, are drawn more often
        return low + (high - low) * jnp.sin(jnp.pi / 2 * uniform) ** 2

    @property
    def advice(self) -> str:
        """What to do when training diverges."""
        config = self.config.objective
        remedy = ""
        if config.name == "mclr" and config.beta > 0:
            bound = config.beta / (1 + config.beta)
            if mclr_is_unbounded(config):
                return (
                    "The plain MCLR objective has no minimum: its loss falls without end wherever "
                    f"p(c|x_s) / p(c) < beta / (1 + beta) = {bound:.3g}. Use the CFG-equivalent "
                    "form (objective.negatives='posterior' or objective.weighting='cfg'), or bound "
                    "it (objective.bound='clip' or 'logistic', objective.reference_penalty >= "
                    "beta)."
                )
            remedy = (
                f"A posterior that is more than (1 + beta) / beta = {1 / bound:.3g} times too "
                "large at some (x_s, c~) takes the minimum away: improve it (for 'denoiser' more "
                "objective.posterior_levels), lower objective.beta, or set objective.bound='clip'. "
            )
        return remedy + (
            "Lower config.optimizer.learning_rate, set config.optimizer.clip_norm, or compute in "
            "float32."
        )

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
        label = jnp.zeros((1,), jnp.int32)
        return self.network.init(self._keys[2], x, one, label, self._condition(1))["params"]

    def init_frozen(self) -> dict[str, Any]:
        """Fresh parameters of what the objective holds frozen beside the model, by name.

        `reference` is the model that training starts from, `classifier` gives the posterior.
        """
        config, frozen = self.config.objective, {}
        needed = self.takes("reference")
        if config.name == "mclr":
            options = config.bound, config.target, config.reference_penalty
            needed = mclr_needs_reference(*options) or config.posterior == "denoiser"
        if needed:
            frozen["reference"] = self.init()
        if self.classifier:
            frozen["classifier"] = self.classifier.init()
        return frozen

    def denoiser(self, params: Any, strength: Any = 0.0) -> DenoiseFn:
        """The network with these parameters as a DenoiseFn.

        It takes two more arguments after the label: the condition vector (B, n) that stands for
        augmentation and strength, and dropout keys (B,).

        Args:
          params: network parameters.
          strength: guidance strength beta, () or (B,), of a network that takes it as an input,
            where no condition vector is given.
        """

        def network(x, c_noise, label, condition=None, dropout_keys=None):
            if condition is None:
                condition = self._condition(len(x), strength=strength)
            return self.network.apply(
                {"params": params}, x, c_noise, label, condition, dropout_keys
            )

        return denoiser.edm(network, self.data.sigma_data)

    def logits(self, params: Any) -> Callable:
        """A classifier with these parameters: (x, sigma, label, ...) -> (B, K)."""

        def apply(x, sigma, label, condition=None, dropout_keys=None):
            return self._raw(params, x, sigma, label, condition, dropout_keys)[0]

        return apply

    def features(self, params: Any, x: jax.Array, sigma: float = 0.01) -> tuple:
        """What a classifier makes of images (B, ...) that have noise of level `sigma`.

        Returns:
          features (B, d), its last hidden layer, and logits (B, K).
        """
        null = jnp.full(len(x), self.null_label, jnp.int32)
        logits, state = self._raw(params, x, jnp.full(len(x), sigma), null)
        return state["intermediates"]["features"][0], logits

    def intermediates(self, params: Any, x: jax.Array, sigma: jax.Array, capture: Callable) -> dict:
        """What modules inside the network return at the null label, for x (B, ...), sigma (B,).

        Args:
          capture: (module, method name) -> whether to keep what it returns.

        Returns:
          nested dicts as Flax stores them, in the order of the calls.
        """
        null = jnp.full(len(x), self.null_label, jnp.int32)
        return self._raw(params, x, sigma, null, capture=capture)[1]["intermediates"]

    def _raw(self, params, x, sigma, label, condition=None, dropout_keys=None, capture=False):
        """The network's raw output on data with noise of level sigma (B,), and intermediates."""
        total = denoiser.expand(sigma**2 + self.data.sigma_data**2, x)
        if condition is None:
            condition = self._condition(len(x))
        inputs = (x / jnp.sqrt(total), jnp.log(sigma) / 4, label, condition, dropout_keys)
        return self.network.apply(
            {"params": params}, *inputs, capture_intermediates=capture, mutable=["intermediates"]
        )

    def posterior(self, frozen: dict[str, Any]) -> posterior.Posterior | None:
        """p(class | x_sigma) as config.objective.posterior wants it; None where that is empty.

        Args:
          frozen: parameters as `init_frozen` names them.

        Raises:
          ValueError: if the data or the run have no such posterior.
        """
        config = self.config.objective
        if config.posterior == "exact":
            if self.config.data.name != "mixture":
                raise ValueError(
                    "objective.posterior='exact' is for data.name='mixture'; for "
                    f"{self.config.data.name!r} take 'classifier' or 'denoiser'."
                )
            return posterior.exact(mixture.toy())
        if config.posterior == "classifier":
            if self.classifier is None:
                raise ValueError(
                    "objective.posterior='classifier' needs objective.posterior_from, the work "
                    "directory of a run with objective 'classify'."
                )
            logits = self.classifier.logits(frozen["classifier"])
            return posterior.from_classifier(logits, self.null_label)
        if config.posterior == "denoiser":
            return posterior.from_denoiser(
                self.denoiser(frozen["reference"]),
                self.data.class_prior,
                self.data.sigma_data,
                config.posterior_levels,
                config.posterior_candidates,
            )
        if config.posterior:
            raise ValueError(
                f"objective.posterior is {config.posterior!r}; expected one of {POSTERIORS}."
            )
        return None

    @property
    def _condition_size(self) -> int:
        size = augment.LABEL_SIZE if self.config.data.augment else 0
        return size + (STRENGTH_SIZE if self.strength else 0)

    def _condition(self, batch_size: int, augment_label=None, strength: Any = 0.0):
        """The condition vector (B, n): augmentation, then strength; None where it is empty."""
        parts = []
        if self.config.data.augment:
            zeros = jnp.zeros((batch_size, augment.LABEL_SIZE))
            parts.append(zeros if augment_label is None else augment_label)
        if self.strength:
            parts.append(strength_features(jnp.broadcast_to(strength, (batch_size,))))
        return jnp.concatenate(parts, axis=-1) if parts else None

    def loss(self, params: Any, frozen: dict[str, Any], batch: dict, keys: jax.Array, train: bool):
        """The objective on a batch of raw data.

        Args:
          params: network parameters.
          frozen: parameters as `init_frozen` names them.
          batch: image (B, ...), label (B,) int32, as `data.pipeline` gives them.
          keys: (B,) typed keys of the examples.
          train: whether to augment and to drop out.

        Returns:
          loss (B,) and metrics (B,) by name.
        """
        k_flip, k_augment, k_dropout, k_objective, k_strength = jax.vmap(
            lambda key: jax.random.split(key, 5), out_axes=1
        )(keys)
        x0, augment_label = pipeline.to_float(batch["image"]), None
        if train and self.config.data.flip:
            x0 = pipeline.random_flip(x0, k_flip)
        if train and self.config.data.augment:
            x0, augment_label = augment.augment(x0, k_augment, self.config.data.augment)
        options: dict[str, Any] = {}
        strength: Any = 0.0
        if self.takes("posterior"):
            options["posterior"] = self.posterior(frozen)
        if "reference" in frozen:
            options["reference"] = self.denoiser(frozen["reference"])
        if self.takes("teacher"):
            options["teacher"] = self.denoiser(frozen["average"] if self.averages else params)
        if "other_image" in batch:
            other = pipeline.to_float(batch["other_image"])
            if self.takes("generated"):
                options["generated"] = other, batch["other_label"]
            else:
                options["other"] = other
        if self.strength:
            uniform = jax.vmap(jax.random.uniform)(k_strength)
            options["beta"] = strength = self._draw_strength(uniform)
        condition = self._condition(len(x0), augment_label, strength)
        dropout_keys = k_dropout if train and self.network.dropout else None
        is_classifier = self.config.objective.name == "classify"
        model = self.logits(params) if is_classifier else self.denoiser(params)
        return self.objective(
            model, x0, batch["label"], k_objective, (condition, dropout_keys), **options
        )


def strength_features(beta: jax.Array) -> jax.Array:
    """Guidance strength (B,) as network input (B, 8): smooth functions that vanish at strength 0.

    So a network whose weights for them are zero at first is the model that it was before. They are
    large, so that a few hundred steps of Adam make use of them.
    """
    angles = jnp.log1p(beta)[:, None] * jnp.array([0.5, 1.0, 2.0, 4.0])
    return 8 * jnp.concatenate([jnp.sin(angles), 1 - jnp.cos(angles)], axis=-1)
