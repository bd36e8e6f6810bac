"""Data sets, and batches as pure functions of a key and a step."""

from bdia_jax.data.images import (
    ImageData,
    augment,
    batch_indices,
    load_images,
    normalize,
    random_crop,
    random_flip,
)
from bdia_jax.data.text import (
    Example,
    Packed,
    TextData,
    Tokenizer,
    byte_tokenizer,
    completion,
    load_tokenizer,
    pack,
    python_sources,
    read_examples,
    read_text,
    split_text,
    train_tokenizer,
)

__all__ = [
    "Example",
    "ImageData",
    "Packed",
    "TextData",
    "Tokenizer",
    "augment",
    "batch_indices",
    "byte_tokenizer",
    "completion",
    "load_images",
    "load_tokenizer",
    "normalize",
    "pack",
    "python_sources",
    "random_crop",
    "random_flip",
    "read_examples",
    "read_text",
    "split_text",
    "train_tokenizer",
]
