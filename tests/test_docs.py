"""What the README, the tutorial and the command lines say is run."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
VIT = [sys.executable, str(ROOT / "experiments" / "vit.py")]


def test_the_readme_s_example_gives_finite_gradients():
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    example = example.replace("48, 256", "4, 16")
    assert len(example.strip().splitlines()) <= 20
    names = {}
    exec(example, names)
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(names["gradients"]))


@pytest.mark.usefixtures("quick_compiles")
def test_the_tutorial_runs():
    notebook = nbformat.read(ROOT / "experiments" / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
    assert all(cell.outputs == [] or cell.execution_count for cell in notebook.cells[1:2])


def test_links_lead_somewhere():
    for page in (
        ROOT / "README.md",
        ROOT / "bdia_jax" / "README.md",
        *ROOT.glob("experiments/*.md"),
    ):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--data", "cifar11"], "unknown data set 'cifar11'.*did you mean"),
        (["--data", "cifar10", "--data-dir", "/no/such"], "existing folder; got '/no/such'"),
        (["--model.patch-size", "3"], "patch_size must divide image_size = 8; got 3"),
        (["--model.method", "bdai"], "bdia"),
        (["--train.optimizer", "adan"], "one of adam, adamw.*got 'adan'"),
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


def test_help_is_readable():
    text = subprocess.run([*VIT, "--help"], capture_output=True, text=True, check=True).stdout
    for phrase in ("--out", "--model.depth", "--train.learning-rate", "Continue the run"):
        assert phrase in text
