"""Class-conditional diffusion models in JAX, and MCLR: guidance moved into training."""

__version__ = "0.1.0"
