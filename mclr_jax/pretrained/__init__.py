"""Published models: reading them as runs, and writing runs as published models."""

from mclr_jax.pretrained.published import convert, export, read, state

__all__ = ["convert", "export", "read", "state"]
