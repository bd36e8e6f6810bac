"""Weights of other libraries, in and out."""

from bdia_jax.interop.hugging_face import load, read_config, save

__all__ = ["load", "read_config", "save"]
