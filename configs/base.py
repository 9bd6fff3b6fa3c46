"""A config with the defaults of all keys; mclr_jax/config.py explains them, and so does --help."""

from typing import Any

from ml_collections import ConfigDict

from mclr_jax import config


def base() -> ConfigDict:
    """A config without data set and network, which configs/NAME.py add."""
    return ConfigDict(config.blank())


def options(name: str, **values: Any) -> ConfigDict:
    """A section of a config, such as config.objective = options("mclr", beta=0.4).

    Args:
      name: an objective, network, posterior, preconditioning or distribution of noise levels, or
        package.module:Name. Objectives are explained in mclr_jax/objectives/; all but dsm, classify
        and contrastive_flow fine-tune the run in config.init_from. ddo needs config.data.generated.
      values: options that differ from the defaults.
    """
    return ConfigDict(config.options(name, **values))
