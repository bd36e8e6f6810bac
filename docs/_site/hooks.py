"""Pages that are made from files outside ``docs/``, and links to such files.

A page of the site may link to any file of the repository as one reads it there, such as
``../bdia_jax/maps.py``. Where the site has a page made from that file, the link leads to the page;
otherwise to a copy of the file, under ``source/``.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[2]
MADE = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "experiments/README.md": "results.md",
    "experiments/tutorial.ipynb": "tutorial.md",
} | {
    f"docs/examples/{path.name}": f"examples/{path.stem}.md"
    for path in sorted((ROOT / "docs/examples").glob("*.ipynb"))
}
"""Pages by the file that they are made from."""
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s]+)([^)]*\))")


def on_files(files, config):
    """Adds the pages that are made, and a copy of every file that some page links to."""
    sources = {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    for source, uri in MADE.items():
        text = (ROOT / source).read_text()
        if source.endswith(".ipynb"):
            text = from_notebook(json.loads(text), uri, files, config)
        if source.startswith("docs/"):
            # MkDocs has copied it.
            file = pathlib.PurePosixPath(source).name
            text += f'\n<a href="{file}" download>This page as a notebook</a>\n'
        files.append(File.generated(config, uri, content=text))
    sources |= MADE
    for source, uri in sources.items():
        page = files.get_file_from_path(uri)
        text, copies = with_links(page.content_string, source, uri, sources)
        for copied in copies:
            if files.get_file_from_path(place_of(copied)) is None:
                content = (ROOT / copied).read_bytes()
                files.append(File.generated(config, place_of(copied), content=content))
        files.remove(page)
        files.append(File.generated(config, uri, content=text))
    return files


def with_links(text: str, source: str, uri: str, sources: dict[str, str]) -> tuple[str, set[str]]:
    """``text`` with links as the site has them; and the files to copy."""
    copies = set()

    def of(match):
        shown, target, rest = match.groups()
        path = os.path.normpath(pathlib.PurePosixPath(source).parent / target)
        if re.match(r"[a-z]+:", target) or not (ROOT / path).exists():
            return match[0]
        if (ROOT / path).is_dir():
            return shown
        if path not in sources:
            copies.add(path)
        place = sources.get(path, place_of(path))
        return f"[{shown}]({os.path.relpath(place, pathlib.PurePosixPath(uri).parent)}{rest}"

    return LINK.sub(of, text), copies


def place_of(path: str) -> str:
    """Where the site has the copy of a file; Markdown as text, or it would be made a page."""
    return f"source/{path}.txt" if path.endswith(".md") else f"source/{path}"


def from_notebook(notebook: dict, uri: str, files, config) -> str:
    """A notebook as Markdown for the page ``uri``, with the outputs that it was saved with."""
    lines, place = [], pathlib.PurePosixPath(uri)
    for i, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        is_text = cell["cell_type"] == "markdown"
        lines.append(with_formulas(source) if is_text else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = place.with_name(f"{place.stem}-{i}.png")
                content = base64.b64decode("".join(data["image/png"]))
                files.append(File.generated(config, str(picture), content=content))
                lines.append(f"![Output of the cell above]({picture.name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                lines.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(lines) + "\n"


def with_formulas(text: str) -> str:
    """``text`` with its formulas as MathML, which browsers show without a script."""

    def of(match):
        if match[1] == "$$":
            return latex2mathml.converter.convert(match[2], display="block")
        # At the beginning of a line, Markdown would take <math> for a block of its own.
        return f"<span>{latex2mathml.converter.convert(match[2])}</span>"

    return re.sub(r"(\$\$?)(.+?)\1", of, text, flags=re.DOTALL)
