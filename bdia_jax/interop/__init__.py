"""Weights of other libraries, in and out.

- Folders of ``transformers`` (GPT-2, Llama, Mistral, Phi-3 and 4, Qwen 2 and 3, Seed-OSS, SmolLM3,
  Gemma 1 to 3, OLMo 2 and 3, Granite, ERNIE 4.5, Pythia; with experts: Mixtral, Qwen 3, OLMoE),
  local or of the Hugging Face hub: :func:`load`, :func:`read_config`, :func:`save`.
- GGUF files of llama.cpp: :func:`load` and :func:`read_config`, too; their tokenizer:
  :func:`bdia_jax.interop.gguf.load_tokenizer`. A pretrained model in one, as a package:
  :func:`packaged_model`.
- The chat template of either: :func:`load_chat_template`.
- Vision transformers (ViT, DINOv2, CLIP, SigLIP): :func:`load_vision`,
  :func:`load_normalization`, :func:`load_scaling`, :func:`save_vision`.
- Low-rank updates in the format of ``peft``: :func:`load_adapter`, :func:`save_adapter`,
  :func:`lora_targets`.

Another family of networks is a class in ``families``, and a line in its table.
"""

from bdia_jax.interop import gguf
from bdia_jax.interop.adapters import load_adapter, lora_targets, save_adapter
from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.hub import packaged_model, resolve
from bdia_jax.interop.models import load, load_chat_template, read_config, stored_dtype
from bdia_jax.interop.saving import save
from bdia_jax.interop.vision.models import (
    load_normalization,
    load_scaling,
    load_vision,
    read_vision_config,
    save_vision,
)

__all__ = [
    "FolderError",
    "gguf",
    "load",
    "load_adapter",
    "load_chat_template",
    "load_normalization",
    "load_scaling",
    "load_vision",
    "lora_targets",
    "packaged_model",
    "read_config",
    "read_vision_config",
    "resolve",
    "save",
    "save_adapter",
    "save_vision",
    "stored_dtype",
]
