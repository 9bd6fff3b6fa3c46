"""Class-conditional diffusion models in JAX, and MCLR: guidance moved into training."""

import os

__version__ = "0.1.0"

# mclr_jax.configs and mclr_jax.launch: setup.py puts them into this folder of an installed package;
# in a checkout they lie beside it.
if not os.path.isdir(os.path.join(__path__[0], "configs")):
    __path__.append(os.path.dirname(__path__[0]))
