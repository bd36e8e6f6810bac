"""Weights of other libraries, in and out."""

from bdia_jax.interop.hugging_face import FolderError, load, read_config, resolve, save

__all__ = ["FolderError", "load", "read_config", "resolve", "save"]
