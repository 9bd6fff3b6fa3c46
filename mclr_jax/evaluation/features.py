"""Feature extractors: images -> feature vectors and class probabilities, behind one type."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

from mclr_jax import runs
from mclr_jax.data.pixels import to_float
from mclr_jax.evaluation import dinov2, efficientnet, inception
from mclr_jax.files import digest
from mclr_jax.model import DataInfo
from mclr_jax.pretrained import tensors
from mclr_jax.schema import look_up
from mclr_jax.training.devices import in_batches, shardings

BATCH = 512
CPU_BATCH = 16  # of the published extractors, whose activations have to stay in a core's cache
# (weights, images (b, ...) in [-1, 1]) -> features (b, d), logits (b, K); without classes K = 0.
Apply = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]


class Features(NamedTuple):
    """The output of an extractor for n images."""

    features: np.ndarray  # (n, d) float64
    log_probs: np.ndarray  # (n, K) float64, of the extractor's own classes
    labels: np.ndarray  # (n,) int32, the intended classes of the images


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A frozen network, whose features and classes judge images."""

    name: str  # the argument of `load`
    weights: Any  # a tree of arrays
    apply: Apply
    shape: tuple[int, ...] = ()  # of an image; () for any

    @functools.cached_property
    def digest(self) -> str:
        return digest(self.weights)

    @functools.cached_property
    def length(self) -> int:
        """The number of features of an image."""
        images = jax.ShapeDtypeStruct((1, *(self.shape or (32, 32, 3))), np.float32)
        return jax.eval_shape(self.apply, self.weights, images)[0].shape[1]

    @functools.cached_property
    def _compiled(self) -> Callable:
        # The weights are an argument, since gigabytes of constants in a program do not compile.
        whole = shardings()[1]  # weights and features, on every device
        weights = jax.device_put(self.weights, whole)
        return functools.partial(jax.jit(self.apply, out_shardings=whole), weights)

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, progress: Callable = lambda count: None
    ) -> Features:
        """Features of images (n, ...), float in [-1, 1] or uint8, computed on all devices.

        `progress` is called with the number of new images.
        """
        if self.shape not in ((), images.shape[1:]):
            raise ValueError(
                f"{self.name} takes images of shape {self.shape}; got {images.shape[1:]}. Name a "
                "classifier of these images, or an extractor of images of any size."
            )
        batch, kept = BATCH if self.shape or jax.default_backend() != "cpu" else CPU_BATCH, []
        given = lambda x: self._compiled(to_float(x)), lambda rows: (images[rows],)
        for rows, outputs in in_batches(*given, len(images), batch, fixed=True):
            kept.append([array.astype(np.float64) for array in outputs])
            progress(len(rows))
        features, logits = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
        log_probs = scipy.special.log_softmax(logits, axis=1) if logits.size else logits
        return Features(features, log_probs, np.asarray(labels, np.int32))


def load(name: str) -> Extractor:
    """The extractor of this name; FileNotFoundError if its weights are missing.

    classifier:WORKDIR is a run that trained a classifier; efficientnet_lite0 has ImageNet classes;
    inception:FILE and dinov2:FILE are those of FID and FD_DINOv2, with the weights in FILE.
    ValueError: unknown kind, a run without classifier, or a file with other weights.
    """
    kind, _, argument = name.partition(":")
    return Extractor(name, *look_up(_LOADERS, kind, "feature extractor")(argument))


def noisy(workdir: str, sigma: float, data: DataInfo, source: str) -> Extractor:
    """The classifier of noisy images in a run, at a noise level.

    ValueError: it is no classifier of such data, which are those of `source`.
    """
    model, params = runs.load_model(workdir)
    runs.check_companion("classifier", workdir, model, data, source)
    apply = functools.partial(model.features, sigma=sigma)
    return Extractor(f"classifier:{workdir}", jax.device_get(params), apply)


def _classifier(workdir: str) -> tuple[Any, ...]:
    """The features are the last hidden layer."""
    model, params = runs.load_model(workdir)
    if not model.is_classifier:
        kind = type(model.network).__name__
        raise ValueError(f"{workdir} is a run of {kind}, which is no classifier; expected one.")
    return jax.device_get(params), model.features, model.data.shape


def _efficientnet(argument: str) -> tuple[Any, Apply]:
    if argument:
        raise ValueError(f"efficientnet_lite0 takes no argument; got {argument!r} after a colon.")
    return efficientnet.load_weights(), efficientnet.apply


_LOADERS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "classifier": _classifier,
    "efficientnet_lite0": _efficientnet,
    "inception": lambda path: (inception.convert(tensors.load(path)), inception.apply),
    "dinov2": lambda path: (dinov2.convert(tensors.load(path)), dinov2.apply),
}
