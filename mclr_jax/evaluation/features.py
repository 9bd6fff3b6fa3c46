"""Feature extractors: images -> feature vectors and class probabilities, behind one type."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

from mclr_jax import run
from mclr_jax.data import pipeline
from mclr_jax.evaluation import dinov2, efficientnet, inception
from mclr_jax.names import look_up
from mclr_jax.training.devices import Devices

BATCH = 512


class Features(NamedTuple):
    """What an extractor makes of n images.

    Attributes:
      features: (n, d) float64.
      log_probs: (n, K) float64, of the extractor's own classes.
      labels: (n,) int32, what the images are meant to show.
    """

    features: np.ndarray
    log_probs: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Features":
        """Of some images: indices or a mask."""
        return Features(*(array[rows] for array in self))


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A frozen network that judges images.

    Attributes:
      name: as given to `load`.
      weights: a tree of arrays.
      apply: weights, images (b, ...) in [-1, 1] -> features (b, d) and logits (b, K), pure; K is 0
        where the network knows no classes.
    """

    name: str
    weights: Any
    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the weights."""
        return digest(self.weights)

    @functools.cached_property
    def _compiled(self) -> Callable:
        # The weights are an argument: as constants of the program, gigabytes would not compile.
        return functools.partial(jax.jit(self.apply), Devices("data").put_state(self.weights))

    def __call__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        progress: Callable[[int], Any] = lambda count: None,
    ) -> Features:
        """Features of images (n, ...), float in [-1, 1] or uint8, spread over all devices."""
        devices, kept = Devices("data"), []
        size = BATCH + -BATCH % jax.device_count()
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            padded = np.resize(chunk, (size, *chunk.shape[1:]))  # one program serves all
            batch = devices.put_batches({"image": padded[None]})["image"][0]
            outputs = jax.device_get(self._compiled(pipeline.to_float(batch)))
            kept.append([np.asarray(array[: len(chunk)], np.float64) for array in outputs])
            progress(len(chunk))
        features, logits = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
        labels = np.asarray(labels, np.int32)
        log_probs = scipy.special.log_softmax(logits, axis=1) if logits.size else logits
        return Features(features, log_probs, labels)


def load(name: str) -> Extractor:
    """The extractor of this name.

    classifier:WORKDIR is a run of objective `classify`; efficientnet_lite0, for natural images, has
    ImageNet weights and classes; inception:FILE is FID's, with the weights in this file, and
    dinov2:FILE that of FD_DINOv2.

    Raises:
      ValueError: if there is no such kind, or the run is no classifier.
      FileNotFoundError: if the weights are not installed.
    """
    kind, _, argument = name.partition(":")
    return look_up(_LOADERS, kind, "feature extractor")(name, argument)


def _classifier(name: str, workdir: str) -> Extractor:
    """The last hidden layer of a classifier trained by our loop."""
    experiment = run.load_experiment(workdir)
    if experiment.config.objective.name != "classify":
        raise ValueError(
            f"{workdir} was trained by objective {experiment.config.objective.name!r}; expected a "
            "run of 'classify', for example of configs/digits_classifier.py."
        )
    params = jax.device_get(run.load_weights(workdir)[0])
    return Extractor(name, params, experiment.features)


def _efficientnet(name: str, argument: str) -> Extractor:
    if argument:
        raise ValueError(f"got features {name!r}; efficientnet_lite0 takes no argument.")
    return Extractor(name, efficientnet.load_weights(), efficientnet.apply)


def _inception(name: str, path: str) -> Extractor:
    return Extractor(name, inception.load_weights(path), inception.apply)


def _dinov2(name: str, path: str) -> Extractor:
    return Extractor(name, dinov2.load_weights(path), dinov2.apply)


def digest(tree: Any) -> str:
    """SHA-256 over the arrays of a tree, their shapes and places; 16 hex digits."""
    total = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(tree)):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        total.update(array.tobytes())
    return total.hexdigest()[:16]


_LOADERS = {"classifier": _classifier, "efficientnet_lite0": _efficientnet,
            "inception": _inception, "dinov2": _dinov2}  # fmt: skip
