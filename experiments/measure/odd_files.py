"""Files and folders that differ from what is expected: what a user gets who brings one.

    python experiments/measure/odd_files.py

Each is made, and given to the function that reads it. What can only mean one thing is read as it is
meant; everything else is an error that names the file, before any work starts. Writes
odd-files-DEVICE.jsonl; the exit status is 1 if something else happened.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import logging
import pathlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import command

from bdia_jax import data, interop
from bdia_jax.nn import Decoder, ViT, ViTConfig, llama
from bdia_jax.train import (
    ImageClassification,
    LanguageModelling,
    TrainSettings,
    restore_best,
    train,
)
from measure import e2e_data, records

DEPENDS = (
    "bdia_jax/data/*.py",
    "bdia_jax/interop/*.py",
    "bdia_jax/interop/families/*.py",
    "bdia_jax/train/*.py",
    "bdia_jax/train/tasks/*.py",
    "experiments/measure/e2e_data.py",
    "experiments/measure/odd_files.py",
)
LINES = b'{"prompt": "a?", "completion": "b"}\n{"prompt": "c?", "completion": "d"}\n'
SEPARATED = '\ufeff{"prompt": "a?", "completion": "b\u2028c"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
TINY = {"vocab_size": 257, "max_length": 16, "width": 8, "depth": 2, "heads": 2, "hidden": 8}
SHORT = TrainSettings(steps=2, batch_size=2, checkpoint_every=1, eval_every=2)


@dataclasses.dataclass(frozen=True)
class OddFiles:
    """Files and folders that differ from what is expected: what a user gets."""

    out: pathlib.Path | None = None
    """Folder of the table; by default runs/results."""


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Case(NamedTuple):
    """Something that a user brings."""

    kind: str
    what: str
    read: bool
    """Whether it is to be read; otherwise it is to be refused."""
    use: Callable[[pathlib.Path], str]
    """Makes it in an empty folder, gives it to a reader, and tells what was read."""


# ---------------------------------------------------------------------------------------------
# Texts, pairs, E2E, images
# ---------------------------------------------------------------------------------------------


def records_of(name: str, raw: bytes) -> Callable[[pathlib.Path], str]:
    """A file of prompts and completions."""

    def use(folder: pathlib.Path) -> str:
        (folder / name).write_bytes(raw)
        found = data.read_examples(folder / name, data.byte_tokenizer(), 64)
        return f"{len(found)} texts, {sum(sum(e.learned) for e in found)} tokens to learn"

    return use


def chats_of(template: str | None, *contents: Any) -> Callable[[pathlib.Path], str]:
    """A file with a conversation of user and assistant, each message's content given."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]

    def use(folder: pathlib.Path) -> str:
        (folder / "a.jsonl").write_text(json.dumps({"messages": messages}))
        found = data.read_examples(
            folder / "a.jsonl",
            data.byte_tokenizer(),
            64,
            template=None if template is None else data.ChatTemplate(template),
        )
        return f"{len(found)} texts, {sum(sum(e.learned) for e in found)} tokens to learn"

    return use


def text_of(name: str, raw: bytes) -> Callable[[pathlib.Path], str]:
    """A file of plain text."""

    def use(folder: pathlib.Path) -> str:
        (folder / name).write_bytes(raw)
        return f"a text of {len(data.read_text(folder / name))} characters"

    return use


def pairs_of(name: str, raw: bytes) -> Callable[[pathlib.Path], str]:
    """A file of texts and their translations."""

    def use(folder: pathlib.Path) -> str:
        (folder / name).write_bytes(raw)
        return f"{len(data.read_pairs(folder / name))} pairs"

    return use


def archive(**contents: str) -> bytes:
    """A zip of some files."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        for name, text in contents.items():
            file.writestr(name.replace("_", "."), text)
    return raw.getvalue()


def e2e_of(**contents: str) -> Callable[[pathlib.Path], str]:
    """A zip that is given as the E2E data."""

    def use(folder: pathlib.Path) -> str:
        (folder / "e2e.zip").write_bytes(archive(**contents))
        return f"{len(e2e_data.read(folder / 'e2e.zip', 'trainset.csv'))} pairs"

    return use


def images_of_other_classes(folder: pathlib.Path) -> str:
    """Ten classes, for a model of seven."""
    model = ViT(
        ViTConfig(image_size=8, channels=1, patch_size=4, width=8, depth=2, heads=2, num_classes=7),
        rngs=nnx.Rngs(0),
    )
    train(model, ImageClassification(data.load_images("digits")), SHORT, folder / "run")
    return "trained"


def no_images(folder: pathlib.Path) -> str:
    """A folder of data sets that holds something else."""
    (folder / "cifar10").write_text("")
    data.load_images("cifar10", folder)
    return "read"


DATA = (
    Case(
        "records",
        "lines that end as on Windows, empty ones among them",
        True,
        records_of("a.jsonl", LINES.replace(b"\n", b"\r\n\r\n")),
    ),
    Case(
        "records",
        "a byte-order mark, and U+2028 inside a text",
        True,
        records_of("a.jsonl", SEPARATED.encode()),
    ),
    Case(
        "records",
        "more fields than are needed; a list rather than lines",
        True,
        records_of("a.json", b'[{"id": 7, "prompt": "a?", "completion": "b", "meta": {"x": []}}]'),
    ),
    Case(
        "records",
        "a table whose texts have commas and line ends",
        True,
        records_of("a.csv", b'prompt,completion\r\n"a, b?","c\nd"\r\n'),
    ),
    Case("records", "the last line cut off", False, records_of("a.jsonl", LINES[:-4])),
    Case(
        "records",
        "another form of one field on the way",
        False,
        records_of("a.jsonl", LINES + b'{"prompt": ["a?"], "completion": "b"}'),
    ),
    Case(
        "records",
        "half of a surrogate pair",
        False,
        records_of("a.jsonl", b'{"prompt": "a?", "completion": "\\ud83d"}'),
    ),
    Case("records", "200,000 brackets", False, records_of("a.jsonl", b"[" * 200_000)),
    Case("records", "nothing but line ends", False, records_of("a.jsonl", b"\n\r\n\n")),
    Case("records", "compressed", False, records_of("a.jsonl.gz", gzip.compress(LINES))),
    Case("records", "a pointer of Git LFS", False, records_of("a.jsonl", POINTER)),
    Case("chats", "an answer, in a template with thoughts", True, chats_of(CHAT, "a?", "b")),
    Case("chats", "for a model without a template", False, chats_of(None, "a?", "b")),
    Case("chats", "no answer", False, chats_of(CHAT, "a?")),
    Case("chats", "a picture among the messages", False, chats_of(CHAT, [{"type": "image"}], "b")),
    Case(
        "chats",
        "a template that looks for Python's classes",
        False,
        chats_of("{{ ''.__class__.__base__.__subclasses__() }}", "a?", "b"),
    ),
    Case("text", "a byte-order mark", True, text_of("a.txt", "\ufeffToday.\n".encode())),
    Case("text", "UTF-16", False, text_of("a.txt", "Today.".encode("utf-16"))),
    Case("text", "Windows' Latin letters", False, text_of("a.txt", "Garçon".encode("cp1252"))),
    Case("text", "a picture", False, text_of("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")),
    Case("pairs", "a line without a tab", False, pairs_of("a.txt", b"a\tb\nc d\n")),
    Case(
        "pairs",
        "an archive with two files of pairs",
        False,
        pairs_of("a.zip", archive(a_txt="a\tb", b_txt="a\tb")),
    ),
    Case(
        "E2E",
        "in a folder of the archive, with a byte-order mark",
        True,
        e2e_of(**{"data/trainset_csv": '\ufeffmr,ref\n"name[A]",A is a pub.\n'}),
    ),
    Case("E2E", "other columns", False, e2e_of(trainset_csv="meaning,text\na,b\n")),
    Case("images", "other classes than the model's", False, images_of_other_classes),
    Case("images", "a folder of data sets with a file in the place of one", False, no_images),
)


# ---------------------------------------------------------------------------------------------
# Model folders, tokenizers, adapters
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


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
CASES = (*DATA, *MODELS, *CHECKPOINTS)
REFUSALS = (ValueError, FileNotFoundError, NotADirectoryError)


def main(o: OddFiles) -> str:
    """Tries all; the table. Exit status 1 if something else happened than is right."""
    rows = [*tried()]
    path = records.write("odd-files", rows, DEPENDS, out=o.out)
    text = table(rows)
    print(f"\n{text}\n\nSee {path}")
    if not all(row["right"] for row in rows):
        sys.exit(1)
    return text


def counted(out: pathlib.Path) -> dict[str, Any]:
    """How many were tried and came out right; writes the table, too."""
    rows = [*tried()]
    records.write("odd-files", rows, DEPENDS, out=out)
    notes = [f"{row['kind']}: {row['what']}: {row['told']}" for row in rows if not row["right"]]
    return {"tried": len(rows), "passed": sum(row["right"] for row in rows), "notes": notes}


def tried() -> Iterator[dict[str, Any]]:
    """A row per case: what happened, and whether that is right."""
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder).resolve()
            try:
                read, told = True, case.use(place)
            except REFUSALS as error:
                read, told = False, str(error)
            except Exception as error:
                read, told = None, f"{type(error).__name__}: {error}"
        told = " ".join(told.replace(f"{place}/", "").replace(str(place), "it").split())
        row = {"kind": case.kind, "what": case.what, "read": read, "told": told}
        yield row | {"right": read == case.read}


def table(rows: list[dict[str, Any]]) -> str:
    """What each gets."""
    lines = [
        [
            row["kind"],
            row["what"],
            ("read: " if row["read"] else "refused: ") + shortened(row["told"]).replace("|", "\\|"),
        ]
        for row in rows
    ]
    return records.markdown(["given", "that is", "what happens"], lines)


def shortened(text: str, most: int = 240) -> str:
    """The beginning of a message."""
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


if __name__ == "__main__":
    command.run(main, OddFiles, __doc__, told=logging.ERROR)
