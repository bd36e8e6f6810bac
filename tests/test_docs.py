"""What the pages, the tutorial and the command lines say is run."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import pytest

import bdia_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
    page for folder in ("*.md", "docs/**/*.md", "experiments/**/*.md") for page in ROOT.glob(folder)
)
TUTORIAL = ROOT / "experiments" / "tutorial.ipynb"
VIT = [sys.executable, str(ROOT / "experiments" / "vit.py")]


def name_of(page):
    return str(page.relative_to(ROOT))


def code_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_is_a_page():
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    # What draws a table is no word.
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= 600


def test_the_readme_s_example_gives_finite_gradients():
    (example,) = code_of(ROOT / "README.md")
    assert len(example.strip().splitlines()) <= 20
    names = {}
    exec(example.replace("48, 256", "4, 16"), names)
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(names["gradients"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "docs" in p.parts and code_of(p)], ids=name_of
)
def test_the_code_on_a_page_runs(page):
    names = {}
    for code in code_of(page):
        exec(code, names)


def anchors(page):
    """What links may name after a #: the headings, as GitHub and MkDocs call them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", [*PAGES, TUTORIAL], ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text()
    if page == TUTORIAL:
        cells = json.loads(text)["cells"]
        text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_pages_tell_to_run_exists(page):
    text = page.read_text()
    for script in re.findall(r"\b(experiments/[\w/]+\.(?:py|sh))\b", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m (bdia_jax[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^ {4}|`)make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_places_for_results_are_closed(page):
    places = re.findall(r"<!-- (results: [\w.-]+|end results) -->", page.read_text())
    assert all(
        place.startswith("results") if i % 2 == 0 else place == "end results"
        for i, place in enumerate(places)
    )
    assert len(places) % 2 == 0
    assert len({p for p in places if p != "end results"}) == len(places) // 2


def test_versions_agree():
    version = re.match(r"\d+\.\d+\.\d+", bdia_jax.__version__)[0]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    built = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr + built.stdout
    pages = {page: page.read_text() for page in tmp_path.glob("**/*.html")}
    ids = {page: set(re.findall(r' id="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        for target in set(re.findall(r'(?:href|src)="([^"]+)"', text)):
            if page.name == "404.html" or re.match(r"https?:|data:|javascript:", target):
                continue
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), (page, target)
            assert not anchor or found not in ids or anchor in ids[found] | {"__comments"}, target
        # Roles of Sphinx have become links or code.
        assert ":class:`" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL), page


@pytest.mark.slow
def test_the_tutorial_runs():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600).execute()
    outputs = itertools.chain(*(cell.get("outputs", []) for cell in notebook.cells))
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--data", "cifar11"], "unknown data set 'cifar11'.*did you mean"),
        (["--data", "cifar10", "--data-dir", "/no/such"], "existing folder; got '/no/such'"),
        (["--model.patch-size", "3"], "patch_size must divide image_size = 8; got 3"),
        (["--model.method", "bdai"], "bdia"),
        (["--train.optimizer", "adan"], "invalid choice 'adan'"),
        (["--train.mesh", "data=3"], "3 devices; there are"),
        (["--out", "/proc/no/such"], "cannot be written|No such file|not a folder"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message, tmp_path):
    out = [] if not arguments or "--out" in arguments else ["--out", str(tmp_path / "run")]
    found = subprocess.run([*VIT, *out, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert re.search(message, found.stderr + found.stdout, re.DOTALL), found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_help_is_readable():
    text = subprocess.run([*VIT, "--help"], capture_output=True, text=True, check=True).stdout
    for phrase in ("--out", "--model.depth", "--train.learning-rate", "Continue the run"):
        assert phrase in text
