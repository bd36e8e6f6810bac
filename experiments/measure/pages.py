"""Writes the tables of the pages, from the results in experiments/results alone.

    python experiments/measure/pages.py             # writes
    python experiments/measure/pages.py --check     # fails if a page is out of date

A page has, on lines of their own, ``<!-- results: NAME -->`` and ``<!-- end results -->``; what is
between them is written here. NAME is a result (a file of experiments/results, without the device),
or a view of one (:data:`VIEWS`). Under a result of code that has changed since, the page says so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from bdia_jax import files
from measure import (
    against_torch,
    chat_tables,
    cost_tables,
    curves,
    exactness,
    finetune_e2e,
    gamma,
    long_texts,
    odd_files,
    records,
    reliability,
    same_kernels,
    sources,
    vision_tables,
)

Rows = list[dict[str, Any]]
MARKED = re.compile(r"(<!-- results: ([\w.-]+) -->\n)(.*?)(<!-- end results -->)", re.DOTALL)
MISSING = "*Not measured yet.*"


def pivot(
    rows: Rows, index: tuple[str, ...], column: str, cell: Callable[[dict[str, Any]], str]
) -> str:
    """A line for each value of some fields, and a column for each value of another."""
    values = [*dict.fromkeys(row[column] for row in rows)]
    lines: dict[tuple, dict[Any, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in index), {})[row[column]] = cell(row)
    header = [*index, *(f"{column}: {value}" for value in values)]
    return records.markdown(
        header,
        [[*map(str, key), *(line.get(v, "") for v in values)] for key, line in lines.items()],
    )


def rise(row: dict[str, Any]) -> str:
    """A loss, and by how much it is above the standard network's."""
    return f"{row['loss']:.3f} ({row['rise']:+.1%})"


def mismatches(row: dict[str, Any]) -> str:
    """Of how many integers."""
    return f"{row['mismatched']:,} of {row['compared']:,}"


def cosines(rows: Rows) -> str:
    """Means over batches, and their standard deviations."""
    lines = [[row["way"], records.spread(row["cosines"], 4)] for row in rows]
    return records.markdown(["way", "cosine"], lines)


def cosines_by_gamma(rows: Rows) -> str:
    """Of every draw."""
    lines = [[f"{row['gamma']:g}", ", ".join(f"{c:.5f}" for c in row["cosines"])] for row in rows]
    return records.markdown(["γ", "cosines"], lines)


def exactness_by_block(rows: Rows) -> str:
    """Sums over the cases of a block or a model, and over all."""
    names = [*dict.fromkeys(row["case"]["block"] for row in rows)]
    groups = {name: [row for row in rows if row["case"]["block"] == name] for name in names}
    lines = [
        [name, str(len(some)), *(f"{total:,}" for total in exactness.totals(some).values())]
        for name, some in (groups | {"**all**": rows}).items()
    ]
    return records.markdown(["block", "cases", *exactness.COUNTS], lines)


def means(rows: Rows, by: str = "way", names: Iterable[str] | None = None) -> str:
    """Means over seeds of some numbers, by default of all, and their standard deviations."""
    if names is None:
        told = [name for row in rows for name, value in row.items() if isinstance(value, float)]
        names = [n for n in dict.fromkeys(told) if n not in (by, "seed", "seconds", "mismatched")]
    lines = []
    for value in dict.fromkeys(row[by] for row in rows):
        some = [row for row in rows if row[by] == value]
        found = [[row[name] for row in some if name in row] for name in names]
        lines.append([value, *(records.spread(numbers) if numbers else "" for numbers in found)])
    return records.markdown([by, *names], lines)


def means_by_base(rows: Rows, names: Iterable[str] | None = None) -> str:
    """The same, by a way to train and what base it is on."""
    return means([row | {"way": f"{row['base']}, {row['way']}"} for row in rows], names=names)


losses = functools.partial(means, names=("loss", "accuracy", "training loss"))


TABLES: dict[str, Callable[[Rows], str]] = cost_tables.TABLES | {
    "exactness": exactness.table,
    "reliability": reliability.table,
    "odd-files": odd_files.table,
    "same-kernels": same_kernels.table,
    "long-texts": long_texts.table,
    "torch": against_torch.table,
    "few-bits-base": means_by_base,
    "few-bits-checkpoints": means,
    "vision": vision_tables.all_tables,
    "small-text": curves.table,
    "translation": curves.table,
    "chats": chat_tables.table,
    "e2e": finetune_e2e.table,
    "gamma-perturbation": functools.partial(
        pivot, index=("steps", "gamma"), column="signs", cell=rise
    ),
    "gamma-exactness": functools.partial(
        pivot, index=("dtype", "steps", "gamma"), column="signs", cell=mismatches
    ),
    "gamma-gradients": cosines,
    "gamma-cotangents": cosines_by_gamma,
    "gamma-finetuning": means,
}
"""By the beginning of a result's name; of any other, rows are shown as they are."""


@dataclasses.dataclass(frozen=True)
class View:
    """Some of a result."""

    result: str
    where: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Values of a row's fields that are shown."""
    draw: Callable[[Rows, pathlib.Path], None] | None = None
    """A picture instead."""
    table: Callable[[Rows], str] | None = None
    """Another table than the result's."""

    def rows(self, path: pathlib.Path) -> Rows:
        """Those of a result that are shown."""
        allowed = self.where.items()
        rows = records.read(path).rows
        return [row for row in rows if all(row.get(name) in some for name, some in allowed)]


MAIN_WAYS = ("standard", "checkpointed", "RevNet", "BDIA", "BDIA, parts")
VIEWS: dict[str, View] = {
    "readme-figure": View("activations-vit-depth", {"way": MAIN_WAYS}, draw=cost_tables.draw),
    "readme-case": View("activations-vit-depth", {"way": MAIN_WAYS}),
    "readme-finetuning": View(
        "gamma-finetuning",
        {"way": gamma.ANSWERED},
        table=functools.partial(means, names=("loss", "BLEU")),
    ),
    "gamma-finetuning": View("gamma-finetuning", table=losses),
    "few-bits-base": View(
        "few-bits-base", table=functools.partial(means_by_base, names=("loss", "accuracy"))
    ),
    "few-bits-checkpoints": View("few-bits-checkpoints", table=losses),
    "gamma-answers": View(
        "gamma-finetuning",
        {"way": gamma.ANSWERED},
        table=functools.partial(means, names=("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")),
    ),
    **{
        f"gamma-from-scratch-{name}": View(result, table=curves.dial)
        for name, result in {
            "text": "small-text-tinyshakespeare",
            "little-text": "small-text-tinyshakespeare-0.05",
            "translation": "translation-fra-eng",
        }.items()
    },
    "vision-signs": View("vision-reduced-cifar10", {"table": ("signs",)}),
    "exactness-by-block": View("exactness", table=exactness_by_block),
    "chats-answers": View("chats", table=chat_tables.answers_table),
}


def render(name: str, page: pathlib.Path, folder: pathlib.Path = records.COMMITTED) -> str:
    """What a page shows under a name."""
    view = VIEWS.get(name, View(name))
    parts = []
    for path in found(view.result, folder):
        if view.draw is not None:
            place = pathlib.Path(os.path.relpath(picture(name, path), page.parent)).as_posix()
            # What made it stands under the table of the same result.
            parts.append(f"![{name.replace('-', ' ')}]({place})")
        else:
            table = view.table or table_of(view.result)
            parts.append(table(view.rows(path)))
            parts.append(caption(records.read(path).about))
    return "\n\n".join(parts) if parts else MISSING


def picture(name: str, path: pathlib.Path) -> pathlib.Path:
    """Of a view, of a result's file."""
    return path.with_name(f"{name}-{path.stem}.png")


def found(result: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a result, one per device."""
    paths = sorted(folder.glob(f"{result}-*.jsonl"))
    return [path for path in paths if records.read(path).about["result"] == result]


def table_of(result: str) -> Callable[[Rows], str]:
    """The function that makes its table."""
    names = [name for name in TABLES if result == name or result.startswith(f"{name}-")]
    return TABLES[max(names, key=len)] if names else records.as_they_are


def caption(about: dict[str, Any]) -> str:
    """What made a result, as a line under it."""
    machine = f"{about['device']}, {about['cores']} cores, jax {about['versions']['jax']}"
    if "compiled for" in about:
        machine = f"compiled for {about['compiled for']} with jax {about['versions']['jax']}"
    commit = "no commit" if about["commit"] is None else f"commit {about['commit'][:7]}"
    commit += "" if about["clean"] else ", changed"
    if again := about.get("again"):
        near = f", to {again['within']:.0e}" if again["within"] else ""
        commit += f" ({again['commit'][:7]}: the same {again['numbers']} numbers{near}, run short)"
    if changed(about):
        commit += ", **since changed**"
    note = f"{about['note']} " if "note" in about else ""
    return f"<sub>{note}{machine}; {about['date']}, {commit}; `{about['command']}`</sub>"


def pages() -> list[pathlib.Path]:
    """The pages of the repository, notebooks among them."""
    root = sources.ROOT
    found = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("docs/**/*.ipynb")]
    return sorted([*found, root / "experiments/README.md"])


def written(page: pathlib.Path, folder: pathlib.Path = records.COMMITTED) -> str:
    """The text of a page as it should be."""

    def filled(text: str) -> str:
        return MARKED.sub(lambda m: f"{m[1]}{render(m[2], page, folder)}\n{m[4]}", text)

    if page.suffix != ".ipynb":
        return filled(page.read_text(encoding="utf-8"))
    notebook = json.loads(page.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = filled("".join(cell["source"])).splitlines(keepends=True)
    # As nbformat writes it.
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def changed(about: dict[str, Any]) -> bool:
    """Whether a result is of other code than is here, and was not shown to be the same."""

    def same(made: dict[str, Any]) -> bool:
        try:
            return sources.digest(made["depends"]) == made["code"]
        except FileNotFoundError:
            return False

    return not (same(about) or ("again" in about and same(about | about["again"])))


def stale(folder: pathlib.Path = records.COMMITTED) -> list[pathlib.Path]:
    """The results of code that has changed since."""
    return [p for p in sorted(folder.glob("*.jsonl")) if changed(records.read(p).about)]


def main() -> None:
    """Draws the pictures that pages show, and writes the pages."""
    shown = {
        name for page in pages() for _, name, *_ in MARKED.findall(page.read_text(encoding="utf-8"))
    }
    for name in shown & VIEWS.keys():
        view = VIEWS[name]
        for path in found(view.result, records.COMMITTED) if view.draw else ():
            view.draw(view.rows(path), picture(name, path))
    for page in pages():
        if (text := written(page)) != page.read_text(encoding="utf-8"):
            files.write_text(page, text)
            print(f"wrote {page.relative_to(sources.ROOT)}")


def check() -> list[str]:
    """What is not up to date: a page with another figure than its file, or another caption."""
    return [
        f"{p} is not as its results and the code say: run experiments/measure/pages.py"
        for p in pages()
        if written(p) != p.read_text(encoding="utf-8")
    ]


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit("\n".join(check()) or 0)
    main()
