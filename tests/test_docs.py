"""What the pages, the tutorial and the command lines say is run."""

import itertools
import json
import logging
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import pytest
from flax import nnx

import bdia_jax
from bdia_jax import data, interop
from bdia_jax.nn import Decoder, llama

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
    page for folder in ("*.md", "docs/**/*.md", "experiments/**/*.md") for page in ROOT.glob(folder)
)
TUTORIAL = ROOT / "experiments" / "tutorial.ipynb"
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))


def name_of(page):
    return str(page.relative_to(ROOT))


def cells_of(notebook, kind):
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def text_of(page):
    return "\n\n".join(cells_of(page, "markdown")) if page.suffix == ".ipynb" else page.read_text()


def code_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_is_a_page():
    # Without captions, which say more or less about a result from one commit to the next.
    hidden = r"<!--.*?-->|<sub>.*?</sub>"
    text = re.sub(hidden, "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    # What draws a table is no word.
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= 600


def test_the_readme_s_example_gives_finite_gradients():
    (example,) = code_of(ROOT / "README.md")
    assert len(example.strip().splitlines()) <= 20
    names = {}
    exec(example.replace("48, 256", "4, 16"), names)
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(names["gradients"]))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "docs" in p.parts and code_of(p)], ids=name_of
)
def test_the_code_on_a_page_runs(page):
    names = {}
    for code in code_of(page):
        exec(code, names)


def anchors(page):
    """What links may name after a #: the headings, as GitHub and MkDocs call them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", [*PAGES, TUTORIAL, *EXAMPLES], ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=name_of)
def test_what_pages_tell_to_run_exists(page):
    text = text_of(page)
    for script in re.findall(r"\b(experiments/[\w/]+\.(?:py|sh))\b", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m (bdia_jax[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^ {4}|`)make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=name_of)
def test_places_for_results_are_closed(page):
    places = re.findall(r"<!-- (results: [\w.-]+|end results) -->", text_of(page))
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


SMALLER = {
    "chats": {"interop.packaged_model()": "TINY", "= 128, 4, 40": "= 512, 4, 2"},
    "images": {
        "= 1797, 12, 300": "= 120, 2, 2",
        '("standard", "standard-checkpoint", "bdia")': '("bdia",)',
    },
    "flax_model": {"= 32, 12, 12, 32, 400": "= 16, 8, 2, 4, 4"},
    "equinox_model": {"= 32, 16, 64, 300": "= 8, 2, 4, 3"},
}
"""What of an example is replaced, so that it takes seconds."""
NEEDED = {"chats": ("peft", "transformers"), "equinox_model": ("equinox",)}
"""Packages without which an example is skipped."""
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def tiny_model(folder):
    """What stands for SmolLM2."""
    tokenizer = data.byte_tokenizer()
    config = llama(vocab_size=tokenizer.size, width=8, depth=2, heads=2, hidden=8, max_length=600)
    interop.save(Decoder(config, rngs=nnx.Rngs(0)), folder)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_an_example_runs(page, tmp_path, monkeypatch, capsys):
    for needed in NEEDED.get(page.stem, ()):
        pytest.importorskip(needed)
    names = {"__name__": page.stem}
    if page.stem == "chats":
        names["TINY"] = tiny_model(tmp_path / "tiny")
    monkeypatch.chdir(page.parent)
    smaller = SMALLER[page.stem] | {"../../runs": str(tmp_path)}
    cells = [c for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "code"]
    lines = 0
    for cell in cells:
        code = "".join(cell["source"])
        lines += len([line for line in code.splitlines() if line.strip()])
        for given in [given for given in smaller if given in code]:
            code = code.replace(given, smaller[given])
        exec(compile(code, page.name, "exec"), names)
        told = capsys.readouterr().out
        assert not re.search(r"\bnan\b|NOT", told)
        # The page shows what the cell prints.
        assert bool(told) == bool(cell["outputs"]), code
    assert 40 <= lines <= 90
    assert all(
        given in "".join("".join(c["source"]) for c in cells) for given in SMALLER[page.stem]
    )


@pytest.fixture
def vit(monkeypatch, capsys):
    """Runs the command in this process until it leaves: its status, and what it prints."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    loggers = [logging.getLogger(name) for name in ("absl", "bdia_jax")]
    levels = [logger.level for logger in loggers]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vit.py", *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "experiments/vit.py"), run_name="__main__")
        captured = capsys.readouterr()
        told = captured.out + captured.err
        # A text as a status is what Python prints when it leaves.
        return left.value.code, f"{told}{left.value.code}"

    yield run
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


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
def test_the_command_line_says_what_is_wrong(arguments, message, tmp_path, vit):
    out = [] if not arguments or "--out" in arguments else ["--out", str(tmp_path / "run")]
    status, told = vit(*out, *arguments)
    assert status not in (0, None)
    assert re.search(message, told, re.DOTALL), told
    assert "Traceback" not in told


def test_help_is_readable(vit):
    status, text = vit("--help")
    assert status == 0
    for phrase in ("--out", "--model.depth", "--train.learning-rate", "Continue the run"):
        assert phrase in text
