"""A model: network, preconditioning and the shape of the data, as pure functions of parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from mclr_jax import types
from mclr_jax.denoiser import Epsilon, NetworkFn, Preconditioning, denoiser, moments, with_range
from mclr_jax.networks.layers import divided
from mclr_jax.schema import in_range
from mclr_jax.types import Condition, DenoiseFn, MomentsFn, as_condition, expand


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Properties of a data set, stored with a run so that sampling needs no data."""

    shape: tuple[int, ...]  # of one example: (H, W, C), (d,) or, for a trajectory, (F, ...)
    num_classes: int  # labels are 0 .. num_classes - 1; num_classes is the null label
    sigma_data: float  # standard deviation of the scaled data
    class_prior: tuple[float, ...] = ()  # share of each class in the training data
    # Physical units are offset + scale * x, with a number for each coordinate of the last axis.
    offset: tuple[float, ...] = ()  # () for data without units
    scale: tuple[float, ...] = ()
    time_step: float = 0.0  # between two frames of a trajectory; 0 for none
    has_null: bool = True  # False: no training has shown the null label to the network


@dataclasses.dataclass(frozen=True)
class Model:
    """Pure functions of parameters; compares and hashes by value.

    The network is a Flax module called with (x, c_noise, condition). Its optional fields or class
    attributes are `augment_dim` and `takes_strength` (inputs), `dropout`, `per_frame` (c_noise is
    (B, F)), `variance` (the second half of the output's channels is the logarithm of a variance),
    `gives` ("logits" for a classifier; "next" for an emulator, which gives the change of each frame
    to the next one), `optional_inputs` (top-level parameters that may be missing from the initial
    weights) and `label_inputs` (layers that embed the label, see `adapter`).
    """

    network: nn.Module
    preconditioning: Preconditioning  # of the input and, for a denoiser, the output of the network
    data: DataInfo
    strength: tuple[float, ...] = ()  # (low, high) of the guidance strength; () if it is no input

    def __post_init__(self):
        if self.strength:
            if len(self.strength) != 2:
                raise ValueError(f"strength is {self.strength}; expected () or (low, high).")
            in_range("strength[0]", self.strength[0], 0.0)
            in_range("strength[1]", self.strength[1], float(self.strength[0]), 1e6)

    @property
    def null_label(self) -> int:
        return self.data.num_classes

    @property
    def frames(self) -> tuple[int, ...]:
        """Shape of the noise levels of one example: (F,) for a level per frame, else ()."""
        return self.data.shape[:1] if getattr(self.network, "per_frame", False) else ()

    @property
    def has_variance(self) -> bool:
        return getattr(self.network, "variance", False)

    @property
    def has_range(self) -> bool:
        """True if the second half of the output is the place of DDPM's variance, as in DiT."""
        twice = getattr(self.network, "out_channels", 0) == 2 * self.data.shape[-1]
        return twice and isinstance(self.preconditioning, Epsilon) and not self.has_variance

    @property
    def label_inputs(self) -> tuple[str, ...]:
        """Names of the layers that embed the label."""
        return tuple(getattr(self.network, "label_inputs", ()))

    @property
    def is_classifier(self) -> bool:
        return getattr(self.network, "gives", "denoised") == "logits"

    @property
    def is_emulator(self) -> bool:
        return getattr(self.network, "gives", "denoised") == "next"

    @property
    def is_denoiser(self) -> bool:
        return not (self.is_classifier or self.is_emulator)

    def init(self, key: jax.Array) -> Any:
        """Random initial parameters; of the network's operations, only their draws run."""
        inputs = (
            jax.ShapeDtypeStruct((1, *self.data.shape), jnp.float32),
            jax.ShapeDtypeStruct((1, *self.frames), jnp.float32),
            jax.eval_shape(lambda: self.complete(None, 1)),
        )
        return self.network.lazy_init(key, *inputs)["params"]

    def complete(self, condition: Condition | jax.Array | None, batch_size: int) -> Condition:
        """The condition with absent inputs of the network set to zeros, the label to null."""
        if condition is None:
            condition = jnp.full(batch_size, self.null_label, jnp.int32)
        condition = as_condition(condition)
        size = getattr(self.network, "augment_dim", 0)
        if size and condition.augment is None:
            condition = condition.replace(augment=jnp.zeros((batch_size, size)))
        if self.strength and condition.strength is None:
            condition = condition.replace(strength=jnp.zeros(batch_size))
        return condition

    def _apply(self, params: Any, x: jax.Array, c_noise: jax.Array, condition: Any, **options: Any):
        """The network with the condition completed and a level (B,) repeated for all frames.

        The frames are those of x: a network may take more of them than it was trained on.
        """
        levels = x.shape[: 1 + len(self.frames)]
        if c_noise.shape != levels:
            if c_noise.ndim > 1:
                raise ValueError(
                    f"Noise levels have shape {c_noise.shape}; {type(self.network).__name__} "
                    f"takes {levels}."
                )
            c_noise = jnp.broadcast_to(c_noise[:, None], levels)
        inputs = divided((x, c_noise, self.complete(condition, len(x))))
        return self.network.apply({"params": params}, *inputs, **options)

    def _denoising(self, params: Any) -> NetworkFn:
        """The network with parameters; raises ValueError for a classifier and an emulator."""
        if not self.is_denoiser:
            what, answer = ("a classifier", "logits") if self.is_classifier else (
                "an emulator", "the next state")  # fmt: skip
            raise ValueError(
                f"{type(self.network).__name__} is {what}: it gives {answer} and cannot "
                "denoise. Expected a denoising network or its run."
            )
        return functools.partial(self._apply, params)

    def denoise(self, params: Any) -> DenoiseFn:
        """A `DenoiseFn` (condition None: the null label); raises ValueError for a classifier."""
        return denoiser(self.preconditioning, self._denoising(params))

    def denoise_with_range(self, params: Any) -> DenoiseFn:
        """`denoise` and the place of the variance for the sampler ddpm: 2 C channels.

        Without `has_range` the place is 1, the upper end, as in DiT without a learned variance.
        """
        if self.has_range:
            return with_range(self.preconditioning, self._denoising(params))
        denoise = self.denoise(params)
        return lambda *inputs: jnp.concatenate([denoise(*inputs), jnp.ones_like(inputs[0])], -1)

    def output(self, params: Any) -> NetworkFn:
        """The network's own output for (x (B, ...), c_noise (B,), condition), of x's shape."""
        network = self._denoising(params)
        return lambda x, *inputs: network(x, *inputs)[..., : x.shape[-1]].astype(x.dtype)

    def moments(self, params: Any) -> MomentsFn:
        """A `MomentsFn`: the denoiser's answer, and the variance of x0 given x, both of x's shape.

        The variance is c_out^2 e^s, with s learned by a network with `variance`, and 0 otherwise.
        For data of unit variance and the preconditioning `edm`, c_out^2 = sigma^2 / (1 + sigma^2).
        Raises ValueError for a classifier.
        """
        return moments(self.preconditioning, self._denoising(params), self.has_variance)

    def log_variance(self, params: Any) -> Callable[[jax.Array], jax.Array] | None:
        """u of the levels sigma (B,), of the network's log-variance head; None without one.

        The loss error / e^u + u has its minimum at u = ln E[error] (Karras et al. 2024, arXiv
        2312.02696, eq. 14 and 21).
        """
        if not hasattr(self.network, "log_variance"):
            return None

        def log_variance(sigma: jax.Array) -> jax.Array:
            c_noise = self.preconditioning.scales(sigma).c_noise
            u: Any = self.network.apply({"params": params}, c_noise, method="log_variance")
            return u

        return log_variance

    def normalised(self, params: Any) -> Any:
        """The parameters that training keeps after an update: EDM2 normalises its weights."""
        return getattr(self.network, "normalised", lambda params: params)(params)

    def _raw(self, params: Any, x: jax.Array, sigma: Any, condition: Any, **options: Any) -> Any:
        """The output of the network, without output preconditioning, for x at level sigma."""
        scales = self.preconditioning.scales(jnp.broadcast_to(sigma, jnp.shape(sigma) or len(x)))
        x = expand(scales.c_in, x) * x
        return self._apply(params, x, scales.c_noise, condition, **options)

    def logits(self, params: Any) -> types.LogitsFn:
        """The classifier, without output preconditioning; raises ValueError for other networks."""
        if not self.is_classifier:
            raise ValueError(
                f"{type(self.network).__name__} is no classifier. Expected a network that gives "
                "logits, such as mlp_classifier or conv_classifier, or its run."
            )
        return lambda x, sigma, condition: self._raw(params, x, sigma, condition)

    def forecast(self, params: Any) -> types.ForecastFn:
        """The emulator; raises ValueError for other networks."""
        if not self.is_emulator:
            raise ValueError(
                f"{type(self.network).__name__} is no emulator. Expected a network that gives the "
                "next state, or its run, as of configs/lorenz96_emulator.py."
            )

        def forecast(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            raw, channels = self._apply(params, x, jnp.zeros(len(x)), None), x.shape[-1]
            variance = jnp.exp(raw[..., channels:]) if self.has_variance else None
            return x + raw[..., :channels], variance

        return forecast

    def answers(self, params: Any) -> types.Answers:
        """Both functions; the function that the network does not have raises when called."""
        return types.Answers(
            lambda *inputs: self.denoise(params)(*inputs),
            lambda *inputs: self.logits(params)(*inputs),
        )

    def features(self, params: Any, x: jax.Array, sigma: float = 0.01) -> tuple:
        """Last hidden layer (B, d) and logits (B, K) of a classifier, for x (B, ...) at `sigma`."""
        logits, state = self._raw(params, x, sigma, None, mutable=["intermediates"])
        return state["intermediates"]["features"][0], logits

    def block_features(self, params: Any) -> Callable[..., dict[str, jax.Array]]:
        """(x (B, ...), sigma, condition) -> features (B, d) float32 of each block, in their order.

        Without a condition they are those at the null label. They are averaged over positions. A
        block is a module whose class name ends in Block. Its name is its path in the network
        (`dec_16x16_block1`); the blocks of a scanned stack have the names `blocks.0`, ...
        """

        def is_block(module: nn.Module, method: str) -> bool:
            return method == "__call__" and type(module).__name__.endswith("Block")

        def run(x: jax.Array, sigma: Any, condition: Any = None) -> dict[str, jax.Array]:
            options = {"capture_intermediates": is_block, "mutable": ["intermediates"]}
            _, state = self._raw(params, x, sigma, condition, **options)
            found: dict[str, jax.Array] = {}
            captured = traverse_util.flatten_dict(state.get("intermediates", {}), sep="/")
            for path, (output,) in captured.items():
                name, _, method = path.rpartition("/")
                if method != "__call__":
                    continue  # sown by the network for other purposes
                if isinstance(output, tuple):  # scanned over depth: carry and output
                    found |= {f"{name}.{i}": carry for i, carry in enumerate(output[0])}
                else:
                    found[name] = output
            return {
                name: h.astype(jnp.float32).mean(axis=tuple(range(1, h.ndim - 1)))
                for name, h in found.items()
            }

        return run


@functools.lru_cache(maxsize=16)
def shapes_of(model: Model) -> Any:
    """The shapes and types of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0))


def size_of(tree: Any) -> int:
    """The number of values in a tree of arrays or shapes, such as parameters."""
    return sum(x.size for x in jax.tree.leaves(tree))
