"""Texts, conversations, pairs and images that differ from what is expected."""

from __future__ import annotations

import functools
import gzip
import io
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from bdia_jax import data
from bdia_jax.nn import ViT, ViTConfig
from bdia_jax.train import ImageClassification, TrainSettings, train
from measure import e2e_data

LINES = b'{"prompt": "a?", "completion": "b"}\n{"prompt": "c?", "completion": "d"}\n'
SEPARATED = '\ufeff{"prompt": "a?", "completion": "b\u2028c"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CLASSES = "{{ ''.__class__.__base__.__subclasses__() }}"


class Case(NamedTuple):
    """Something that a user brings."""

    kind: str
    what: str
    read: bool
    """Whether it is to be read; otherwise it is to be refused."""
    use: Callable[[pathlib.Path], str]
    """Makes it in an empty folder, gives it to a reader, and tells what was read."""


def texts_of(path: pathlib.Path, template: str | None = None) -> str:
    """Prompts and completions, or conversations by a template."""
    told = None if template is None else data.ChatTemplate(template)
    found = data.read_examples(path, data.byte_tokenizer(), 64, template=told)
    return f"{len(found)} texts, {sum(sum(e.learned) for e in found)} tokens to learn"


READERS: dict[str, Callable[[pathlib.Path], str]] = {
    "records": texts_of,
    "chats": functools.partial(texts_of, template=CHAT),
    "text": lambda path: f"a text of {len(data.read_text(path))} characters",
    "pairs": lambda path: f"{len(data.read_pairs(path))} pairs",
    "E2E": lambda path: f"{len(e2e_data.read(path, 'trainset.csv'))} pairs",
}
"""What reads a file of a kind, and tells what it read."""


def file(
    kind: str,
    what: str,
    read: bool,
    name: str,
    raw: bytes,
    reader: Callable[[pathlib.Path], str] | None = None,
) -> Case:
    """A file, given to what reads files of its kind, or to another reader."""

    def use(folder: pathlib.Path) -> str:
        (folder / name).write_bytes(raw)
        return (reader or READERS[kind])(folder / name)

    return Case(kind, what, read, use)


def chat(*contents: Any) -> bytes:
    """A conversation: what the user says, and what the assistant answers."""
    messages = [
        {"role": role, "content": content} for role, content in zip(("user", "assistant"), contents)
    ]
    return json.dumps({"messages": messages}).encode()


def archive(contents: dict[str, str]) -> bytes:
    """A zip of some files."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        for name, text in contents.items():
            file.writestr(name, text)
    return raw.getvalue()


def images_of_other_classes(folder: pathlib.Path) -> str:
    """Ten classes, for a model of seven."""
    model = ViT(
        ViTConfig(image_size=8, channels=1, patch_size=4, width=8, depth=2, heads=2, num_classes=7),
        rngs=nnx.Rngs(0),
    )
    train(
        model,
        ImageClassification(data.load_images("digits")),
        TrainSettings(steps=2, batch_size=2),
        folder / "run",
    )
    return "trained"


def no_images(folder: pathlib.Path) -> str:
    """A folder of data sets that holds something else."""
    (folder / "cifar10").write_text("")
    data.load_images("cifar10", folder)
    return "read"


DATA = (
    file(
        "records",
        "lines that end as on Windows, empty ones among them",
        True,
        "a.jsonl",
        LINES.replace(b"\n", b"\r\n\r\n"),
    ),
    file(
        "records",
        "a byte-order mark, and U+2028 inside a text",
        True,
        "a.jsonl",
        SEPARATED.encode(),
    ),
    file(
        "records",
        "more fields than are needed; a list rather than lines",
        True,
        "a.json",
        b'[{"id": 7, "prompt": "a?", "completion": "b", "meta": {"x": []}}]',
    ),
    file(
        "records",
        "a table whose texts have commas and line ends",
        True,
        "a.csv",
        b'prompt,completion\r\n"a, b?","c\nd"\r\n',
    ),
    file("records", "the last line cut off", False, "a.jsonl", LINES[:-4]),
    file(
        "records",
        "another form of one field on the way",
        False,
        "a.jsonl",
        LINES + b'{"prompt": ["a?"], "completion": "b"}',
    ),
    file(
        "records",
        "half of a surrogate pair",
        False,
        "a.jsonl",
        b'{"prompt": "a?", "completion": "\\ud83d"}',
    ),
    file("records", "200,000 brackets", False, "a.jsonl", b"[" * 200_000),
    file("records", "nothing but line ends", False, "a.jsonl", b"\n\r\n\n"),
    file("records", "compressed", False, "a.jsonl.gz", gzip.compress(LINES)),
    file("records", "a pointer of Git LFS", False, "a.jsonl", POINTER),
    file("chats", "an answer, in a template with thoughts", True, "a.jsonl", chat("a?", "b")),
    file("chats", "for a model without a template", False, "a.jsonl", chat("a?", "b"), texts_of),
    file("chats", "no answer", False, "a.jsonl", chat("a?")),
    file("chats", "a picture among the messages", False, "a.jsonl", chat([{"type": "image"}], "b")),
    file(
        "chats",
        "a template that looks for Python's classes",
        False,
        "a.jsonl",
        chat("a?", "b"),
        functools.partial(texts_of, template=CLASSES),
    ),
    file("text", "a byte-order mark", True, "a.txt", "\ufeffToday.\n".encode()),
    file("text", "UTF-16", False, "a.txt", "Today.".encode("utf-16")),
    file("text", "Windows' Latin letters", False, "a.txt", "Garçon".encode("cp1252")),
    file("text", "a picture", False, "a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    file("pairs", "a line without a tab", False, "a.txt", b"a\tb\nc d\n"),
    file(
        "pairs",
        "an archive with two files of pairs",
        False,
        "a.zip",
        archive({"a.txt": "a\tb", "b.txt": "a\tb"}),
    ),
    file(
        "E2E",
        "in a folder of the archive, with a byte-order mark",
        True,
        "e2e.zip",
        archive({"data/trainset.csv": '\ufeffmr,ref\n"name[A]",A is a pub.\n'}),
    ),
    file(
        "E2E", "other columns", False, "e2e.zip", archive({"trainset.csv": "meaning,text\na,b\n"})
    ),
    Case("images", "other classes than the model's", False, images_of_other_classes),
    Case("images", "a folder of data sets with a file in the place of one", False, no_images),
)
