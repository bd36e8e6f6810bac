"""Model folders, adapters, tokenizers and checkpoints that differ from what is expected."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
from flax import nnx

from bdia_jax import data, interop
from bdia_jax.nn import Decoder, llama
from bdia_jax.train import LanguageModelling, TrainSettings, restore_best, train
from measure.odd_data import Case

TINY = {"vocab_size": 257, "max_length": 16, "width": 8, "depth": 2, "heads": 2, "hidden": 8}
SHORT = TrainSettings(steps=2, batch_size=2, checkpoint_every=1, eval_every=2)


def model_of(change: Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], str]:
    """A saved model, changed."""

    def use(folder: pathlib.Path) -> str:
        interop.save(Decoder(llama(**TINY), rngs=nnx.Rngs(0)), folder / "model")
        change(folder / "model")
        model = interop.load(folder / "model")
        return f"a model of {model.config.depth} blocks"

    return use


def configured(**values: Any) -> Callable[[pathlib.Path], Any]:
    """Other settings in config.json."""

    def change(folder: pathlib.Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], Any]:
    """Other tensors."""

    def changed(folder: pathlib.Path) -> None:
        path = folder / "model.safetensors"
        found = safetensors.numpy.load_file(path)
        change(found)
        safetensors.numpy.save_file(found, path)

    return changed


def cut(folder: pathlib.Path) -> None:
    """Weights of which half is missing."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def linked(folder: pathlib.Path) -> None:
    """Weights that lie elsewhere."""
    elsewhere = folder.parent / "elsewhere"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)


def index_outside(folder: pathlib.Path) -> None:
    """An index that names a file above the folder."""
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer_of(**contents: str) -> Callable[[pathlib.Path], str]:
    """A folder with a tokenizer."""

    def use(folder: pathlib.Path) -> str:
        for name, text in contents.items():
            (folder / name.replace("_json", ".json").replace("_model", ".model")).write_text(text)
        found = data.load_tokenizer(folder)
        return f"a tokenizer of {found.size} tokens; {len(found.encode('x' * 99))} of 99 characters"

    return use


def linked_tokenizer(folder: pathlib.Path) -> str:
    """A tokenizer that lies elsewhere."""
    inside = folder / "model"
    inside.mkdir()
    (folder / "elsewhere").write_text(tokenizer_json())
    (inside / "tokenizer.json").symlink_to(folder / "elsewhere")
    return f"a tokenizer of {data.load_tokenizer(inside).size} tokens"


def tokenizer_json(**settings: Any) -> str:
    """A tokenizer of bytes, with other settings."""
    return json.dumps(json.loads(data.byte_tokenizer().inner.to_str()) | settings)


def run_in(folder: pathlib.Path, width: int = 8, text: str = "ab" * 99) -> Decoder:
    """A short run, resumed if there is one."""
    model = Decoder(llama(**TINY | {"width": width}), rngs=nnx.Rngs(0))
    task = LanguageModelling(data.split_text("text", text, data.byte_tokenizer()), 8)
    train(model, task, SHORT, folder / "run", resume=True, progress=False)
    return model


def checkpoint_of(
    change: Callable[[pathlib.Path], Any], **again: Any
) -> Callable[[pathlib.Path], str]:
    """A run whose folder is changed, and that is then resumed."""

    def use(folder: pathlib.Path) -> str:
        run_in(folder)
        change(folder / "run" / "checkpoints")
        model = run_in(folder, **again)
        return f"resumed; the best is step {restore_best(folder / 'run', model)}"

    return use


def flipped(folder: pathlib.Path) -> None:
    """A bit of the newest checkpoint's data."""
    for path in (folder / "2" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(bytes(raw))


MODELS = (
    Case(
        "model",
        "a byte-order mark in config.json, and settings nobody knows",
        True,
        model_of(
            lambda f: (
                configured(made_by="me")(f),
                (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
            )
        ),
    ),
    Case(
        "model",
        "masks and frequencies of old files among the tensors",
        True,
        model_of(
            tensors(
                lambda t: t.update(
                    {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
                )
            )
        ),
    ),
    Case("model", "a family that is not supported", False, model_of(configured(model_type="rwkv"))),
    Case("model", "half of the weights", False, model_of(cut)),
    Case(
        "model", "a tensor missing", False, model_of(tensors(lambda t: t.pop("model.norm.weight")))
    ),
    Case(
        "model",
        "a tensor too many",
        False,
        model_of(tensors(lambda t: t.update({"model.extra": np.ones(2, np.float32)}))),
    ),
    Case(
        "model",
        "a tensor of another shape",
        False,
        model_of(tensors(lambda t: t.update({"model.norm.weight": np.ones(9, np.float32)}))),
    ),
    Case(
        "model",
        "quantized",
        False,
        model_of(configured(quantization_config={"quant_method": "gptq", "bits": 4})),
    ),
    Case(
        "model",
        "settings that contradict each other",
        False,
        model_of(
            configured(
                rope_scaling={"rope_type": "yarn", "factor": 4.0},
                rope_parameters={"rope_type": "default"},
            )
        ),
    ),
    Case("model", "weights that are a link out of the folder", False, model_of(linked)),
    Case("model", "an index that leads out of the folder", False, model_of(index_outside)),
    Case(
        "model",
        "pickled weights only",
        False,
        model_of(lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")),
    ),
    Case(
        "adapter",
        "beside the weights that it changes",
        False,
        model_of(lambda f: (f / "adapter_config.json").write_text("{}")),
    ),
    Case(
        "tokenizer",
        "truncation and padding left on",
        True,
        tokenizer_of(
            tokenizer_json=tokenizer_json(
                truncation={
                    "direction": "Right",
                    "max_length": 8,
                    "strategy": "LongestFirst",
                    "stride": 0,
                }
            )
        ),
    ),
    Case("tokenizer", "cut off", False, tokenizer_of(tokenizer_json=tokenizer_json()[:-9])),
    Case("tokenizer", "a link out of the folder", False, linked_tokenizer),
    Case("tokenizer", "of SentencePiece alone", False, tokenizer_of(tokenizer_model="\n\x0e")),
    Case(
        "tokenizer",
        "without the end of a text that it names",
        False,
        tokenizer_of(
            tokenizer_json=tokenizer_json(), tokenizer_config_json='{"eos_token": "</s>"}'
        ),
    ),
)
CHECKPOINTS = (
    Case("checkpoint", "flipped bits in the newest", True, checkpoint_of(flipped)),
    Case(
        "checkpoint",
        "one half deleted",
        True,
        checkpoint_of(lambda f: shutil.rmtree(f / "1" / "state")),
    ),
    Case(
        "checkpoint", "of a model of another width", False, checkpoint_of(lambda f: None, width=16)
    ),
    Case(
        "checkpoint",
        "of other data under the same name",
        False,
        checkpoint_of(lambda f: None, text="ac" * 99),
    ),
)
