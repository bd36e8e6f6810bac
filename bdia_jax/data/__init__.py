"""Data sets, and batches as pure functions of a key and a step."""

from bdia_jax.data.augmentation import Augmentation
from bdia_jax.data.batches import (
    augment,
    batch_indices,
    normalize,
    random_crop,
    random_flip,
)
from bdia_jax.data.chats import ChatTemplate, conversation, read_chat_template
from bdia_jax.data.class_names import class_names
from bdia_jax.data.example_files import read_examples
from bdia_jax.data.examples import Example, completion
from bdia_jax.data.fingerprints import fingerprint
from bdia_jax.data.image_folder import ImageFolder, load_image_folder, read_image
from bdia_jax.data.images import ImageData, check_classes, load_images
from bdia_jax.data.mix import Mix
from bdia_jax.data.packing import Packed, PackedPairs, pack, pack_pairs
from bdia_jax.data.pairs import cldr_pairs, clean, plain, read_pairs, split_pairs, tfds_pairs
from bdia_jax.data.reading import read_text
from bdia_jax.data.records import (
    Conversation,
    Record,
    parse_records,
    read_conversations,
    read_records,
)
from bdia_jax.data.sources import TextsInMemory, TextsOnDisk, TextSource
from bdia_jax.data.text import TextData, python_sources, split_text
from bdia_jax.data.tokenizers import (
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

__all__ = [
    "Augmentation",
    "ChatTemplate",
    "Conversation",
    "Example",
    "ImageData",
    "ImageFolder",
    "Mix",
    "Packed",
    "PackedPairs",
    "Record",
    "TextData",
    "TextSource",
    "TextsInMemory",
    "TextsOnDisk",
    "Tokenizer",
    "augment",
    "batch_indices",
    "byte_tokenizer",
    "check_classes",
    "class_names",
    "cldr_pairs",
    "clean",
    "completion",
    "conversation",
    "fingerprint",
    "load_image_folder",
    "load_images",
    "load_tokenizer",
    "normalize",
    "pack",
    "pack_pairs",
    "parse_records",
    "plain",
    "python_sources",
    "random_crop",
    "random_flip",
    "read_chat_template",
    "read_conversations",
    "read_examples",
    "read_image",
    "read_pairs",
    "read_records",
    "read_text",
    "split_pairs",
    "split_text",
    "tfds_pairs",
    "train_tokenizer",
]
