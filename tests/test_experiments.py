"""The experiments, at a size that takes seconds: what they count, write and draw."""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments"))

import accelerator
import demo
import translate
import tyro
import vit
from measure import (
    against_torch,
    chats,
    costs,
    exactness,
    exactness_cases,
    few_bits,
    finetune_e2e,
    gamma,
    gpt2_small_data,
    long_texts,
    networks,
    odd_files,
    pages,
    records,
    reliability,
    results,
    runs,
    same_kernels,
    side_by_side,
    sources,
    still,
    timing,
    vision_tables,
)
from measure import ways as all_ways

from bdia_jax.nn import DecoderConfig, ViTConfig, llama
from bdia_jax.planning import ways
from bdia_jax.train import TrainSettings

SMALL = ViTConfig(
    image_size=8,
    channels=1,
    patch_size=4,
    width=8,
    depth=2,
    heads=2,
    head_dim=4,
    hidden=8,
    pool="mean",
    dropout=0.0,
)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------
# Results and pages
# ---------------------------------------------------------------------------------------------


def test_pages_show_the_results_and_results_are_of_this_code():
    assert pages.check() == []


def test_code_is_compared_without_comments_docstrings_and_layout():
    code = '''"""What it is."""
X = 1  # why é
class A:
    field: int = 1
    """Of é."""
    def f(self): "one"; return f"{X} # no"
'''
    same = 'X=1\nclass A:\n  """Other."""\n  field:int=1\n  def f(self): ; return f"{X} # no"'
    assert sources.bare(code) == "".join(['X=1classA:field:int=1deff(self):;returnf"{X}#no"'])
    assert sources.bare(code) == "".join(same.replace('"""Other."""', "").split())
    assert sources.bare(code) != sources.bare(code.replace("X = 1", "X = 2"))


def test_what_is_refused_changes_no_number():
    code = "def f(x):\n    if x < 0:\n        raise ValueError(f'no {x}')\n    return x\n"
    for same in (
        code.replace("no {x}", "not {x}"),
        code.replace("x < 0", "x <= 0 or x > 9"),
        "def f(x):\n    return x\n",
    ):
        assert sources.bare(same) == sources.bare(code)
    for other in (
        code.replace("return x", "return -x"),
        code.replace("if x < 0:", "if (x := abs(x)) < 0:"),
        code.replace(
            "ValueError(f'no {x}')\n", "ValueError(f'no {x}')\n    else:\n        x = 1\n"
        ),
        code.replace("        raise", "        x = 1\n        raise"),
    ):
        assert sources.bare(other) != sources.bare(code)
    again = "try:\n    f()\nexcept E:\n    if a:\n        raise\n    g()\n"
    assert sources.bare(again) != sources.bare(again.replace("if a", "if b"))
    caught = "try:\n    f()\nexcept E as e:\n    raise F('a') from e\n"
    assert sources.bare(caught) == sources.bare(caught.replace("'a'", "'b'"))
    assert sources.bare(caught) != sources.bare(caught.replace("raise F", "raise G"))


def test_a_result_says_what_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(sources.ROOT / "experiments/vit.py"), "--data", "/a/b"])
    settings = vision_tables.VisionTables(data_dir=pathlib.Path("/a/b"))
    depends = ["bdia_jax/grid.py"]
    rows = [{"way": "standard", "seconds": 0.123456}, {"way": "BDIA", "seconds": None}]
    path = records.write("some-thing", rows, depends, settings=settings, out=tmp_path)
    assert len(path.read_text().splitlines()) == 3
    about, read = records.read(path)
    assert read == rows
    assert about["command"] == "python experiments/vit.py --data b"
    assert about["settings"]["data_dir"] == "b"
    assert about["code"] == sources.digest(depends)
    assert {"commit", "clean", "date", "device", "cores", "versions", "seconds"} <= about.keys()

    # A page gets the table, whatever was there; pages of results that do not exist say so.
    page = tmp_path / "page.md"
    page.write_text("<!-- results: some-thing -->\nold\n<!-- end results -->\nend\n")
    text = pages.written(page, tmp_path)
    assert "| standard | 0.1235  |" in text
    assert "`python experiments/vit.py --data b`</sub>\n<!-- end results -->\nend" in text
    page.write_text(text)
    assert pages.written(page, tmp_path) == text
    page.write_text("<!-- results: nothing -->\n<!-- end results -->\n")
    assert pages.MISSING in pages.written(page, tmp_path)

    # Code that has changed in what it does is noticed, and said.
    assert pages.stale(tmp_path) == []
    assert "since changed" not in text
    path.write_text(path.read_text().replace(about["code"], "0" * 16))
    assert pages.stale(tmp_path) == [path]
    page.write_text("<!-- results: some-thing -->\nold\n<!-- end results -->\nend\n")
    assert "**since changed**" in pages.written(page, tmp_path)


def test_what_a_result_depends_on_is_there():
    for module in (
        *(costs, exactness, reliability, vision_tables),
        *(same_kernels, gpt2_small_data, finetune_e2e, gamma, chats, translate),
    ):
        assert sources.files(module.DEPENDS)
    assert sources.files(gamma.TRAINS)


def test_means_of_some_numbers():
    rows = [{"way": "a", "seed": i, "loss": 1.0 + i, "accuracy": 0.5} for i in range(3)]
    loss = [["a", "2.000 ± 1.000"]]
    assert pages.means(rows, names=("loss",)) == records.markdown(["way", "loss"], loss)
    both = records.markdown(["way", "loss", "accuracy"], [[*loss[0], "0.500 ± 0.000"]])
    assert pages.means(rows) == both
    named = [row | {"base": "nf4"} for row in rows]
    assert "| nf4, a | 2.000 ± 1.000 |" in pages.means_by_base(named, ("loss",))


def test_a_bar_in_a_cell_is_no_end_of_it():
    table = records.markdown(["a", "b"], [["|γ| = 1", r"known \| already"]])
    assert table.splitlines()[2] == r"| \|γ\| = 1 | known \| already |"


COMMANDS = {
    "experiments/exactness.py": exactness.Exactness,
    "experiments/translate.py": translate.Translate,
    "experiments/vision_tables.py": vision_tables.VisionTables,
    "experiments/measure/against_torch.py": against_torch.AgainstTorch,
    "experiments/measure/chats.py": chats.Chats,
    "experiments/measure/costs.py": costs.Costs,
    "experiments/measure/few_bits.py": few_bits.FewBits,
    "experiments/measure/gamma.py": gamma.Gamma,
    "experiments/measure/gpt2_small_data.py": gpt2_small_data.SmallData,
    "experiments/measure/long_texts.py": long_texts.LongTexts,
    "experiments/measure/odd_files.py": odd_files.OddFiles,
    "experiments/measure/same_kernels.py": same_kernels.SameKernels,
}


def test_every_result_can_be_made_again_by_its_command(capsys):
    results.main(results.Results(list=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        python, script, *words = shlex.split(line.rpartition("  # ")[0])
        assert python == "python"
        assert tyro.cli(COMMANDS[script], args=words).out.as_posix() == "experiments/results"


ACCELERATOR = {
    "exactness.py": exactness.Exactness,
    "reliability.py": reliability.Reliability,
    "vit.py": vit.Experiment,
    "measure/costs.py": costs.Costs,
    "measure/gamma.py": gamma.Gamma,
    "measure/gpt2_small_data.py": gpt2_small_data.SmallData,
}


@pytest.mark.parametrize("size", accelerator.PHASES)
def test_commands_for_an_accelerator_have_these_options(size):
    given = accelerator.Accelerator(size=size)
    for phase in accelerator.PHASES[size].values():
        for line in [line for job in phase.jobs for line in job.commands]:
            script, *words = shlex.split(accelerator.filled(line, given))
            assert pathlib.Path(script).exists()
            tyro.cli(ACCELERATOR[line.split()[0]], args=words)


@pytest.mark.slow
def test_jobs_run_side_by_side_until_the_limit(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(accelerator, "HERE", tmp_path)
    (tmp_path / "tool.py").write_text(
        "import sys, time; print(sys.argv[1]); time.sleep(float(sys.argv[1]))"
    )
    jobs = (
        accelerator.Job("twice", ("tool.py 0", "tool.py 0.1"), 2),
        accelerator.Job("long", ("tool.py 60", "tool.py 60")),
        accelerator.Job("without", ("tool.py DATA/tiny",)),
    )
    phases = {"seconds": {"costs": accelerator.Phase(2, jobs)}}
    monkeypatch.setattr(accelerator, "PHASES", phases)
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_COMPILATION_CACHE_DIR", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, "false")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x-cpu.jsonl").touch()
    before = signal.getsignal(signal.SIGTERM)
    try:
        accelerator.main(
            accelerator.Accelerator(
                "seconds",
                ("costs",),
                data_dir=tmp_path,
                runs=tmp_path / "runs",
                out=tmp_path / "out",
                pack=tmp_path / "all.tar.gz",
            )
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capfd.readouterr().out
    assert len(re.findall(r"twice-\d: status 0 after \d s, status 0 after", told)) == 2
    assert told.count("long: status -15") == 1
    assert "without: left out" in told
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"results/x-cpu.jsonl", "runs/twice-0.log"} <= {*archive.getnames()}


def test_results_are_made_again_and_pages_written(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "results"
    monkeypatch.setattr(records, "COMMITTED", folder)
    monkeypatch.setattr(records, "STARTED", time.monotonic())
    monkeypatch.setattr(pages, "main", lambda: print("pages", flush=True))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/tool.py").write_text(
        "import sys; print(sys.argv[1:], flush=True); sys.exit(int(sys.argv[1]))"
    )
    # Two runs, of which the command found one finished, and a row that shows one of them again.
    rows = [{"folder": f"run-{i % 2}", "seconds": 60.0} for i in range(3)]
    for i, name in enumerate(("one", "other", "third")):
        monkeypatch.setattr(sys, "argv", ["experiments/tool.py", str(i // 2)])
        records.write(name, rows, ["bdia_jax/grid.py"], out=folder)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    results.main(results.Results(("one-cpu", "other-cpu")))
    line = "python experiments/tool.py {}  # 2 minutes\n['{}']\npages\n"
    assert capfd.readouterr().out == line.format(0, 0)
    with pytest.raises(SystemExit, match=r"status 1: python experiments/tool\.py 1"):
        results.main(results.Results())
    assert capfd.readouterr().out == line.format(0, 0) + line.format(1, 1)
    with pytest.raises(ValueError, match=r"results are one-cpu, .*; got none"):
        results.main(results.Results(("none",)))


# ---------------------------------------------------------------------------------------------
# Exactness and reliability
# ---------------------------------------------------------------------------------------------


def test_every_pair_of_settings_meets_in_a_case_of_exactness():
    cases = exactness_cases.covering(exactness_cases.FACTORS)
    for (a, in_a), (b, in_b) in itertools.combinations(exactness_cases.FACTORS.items(), 2):
        met = {(case[a], case[b]) for case in cases}
        assert met == set(itertools.product(in_a, in_b))
    assert len(cases) < 40


@pytest.mark.slow
def test_a_case_of_exactness():
    row = exactness_cases.covering(exactness_cases.FACTORS)[0]
    row |= {"block": "attention", "depth": 2, "parts_as_steps": True, "update_in_backward": True}
    row |= {"dtype": "bfloat16", "frac_bits": 9}
    found = exactness.measure(exactness_cases.block_case(row, 30_000, seed=0), jax.random.key(0))
    assert found["compared"] >= 30_000
    assert found["finite"]
    assert found["mismatched"] == found["samples mismatched in the gradient"] == 0
    assert 0 <= found["naive, from its own"] <= found["compared"]
    assert exactness.totals([found, found])["compared"] == 2 * found["compared"]
    assert "| all " in exactness.table([found])


@pytest.mark.slow
def test_a_model_of_exactness():
    tiny = {"width": 16, "heads": 2, "max_length": 8, "encoder_depth": 1, "decoder_depth": 1}
    case = exactness_cases.model_case("encoder-decoder", tiny | {"parts_as_steps": True}, 1000, 0)
    found = exactness.measure(case, jax.random.key(0))
    assert found["compared"] >= 1000
    assert found["mismatched"] == found["samples mismatched in the gradient"] == 0


def test_reliability_counts_cases_and_what_was_skipped_or_failed():
    report = """<testsuites><testsuite>
      <testcase classname="tests.test_a" name="many">
        <properties>
          <property name="cases" value="20"/><property name="mode" value="x"/>
        </properties>
      </testcase>
      <testcase classname="tests.test_a" name="bad"><failure message="no"/></testcase>
      <testcase classname="tests.test_a" name="absent"><skipped message="no torch"/></testcase>
    </testsuite></testsuites>"""
    found = reliability.count(ElementTree.ElementTree(ElementTree.fromstring(report)))
    assert (found["tests"], found["tried"], found["passed"]) == (2, 21, 20)
    assert found["notes"] == ["failed: test_a::bad", "skipped: test_a::absent: no torch"]
    assert found["recorded"] == {"test_a::many": {"mode": "x"}}


@pytest.mark.slow
def test_reliability_audits(tmp_path, monkeypatch, capsys):
    settings = reliability.Reliability(
        only=("precision",), depth=2, width=32, length=4, batch=2, out=tmp_path
    )
    some = [*reliability.cases("precision")]
    some = [some[0], some[-1]]
    monkeypatch.setattr(reliability, "cases", lambda part: iter(some))
    text = reliability.main(settings)
    assert "2           | 2" in text
    # The rest of the table stays.
    assert reliability.main(dataclasses.replace(settings, only=("blocks",))).count("| 2 ") == 4
    (path,) = tmp_path.glob("*.jsonl")
    assert all(row["exact"] for part in records.read(path).rows for row in part["audits"])


# ---------------------------------------------------------------------------------------------
# Ways to train
# ---------------------------------------------------------------------------------------------

TINY = {
    "vit": networks.Network(SMALL, 2),
    "decoder": networks.Network(
        DecoderConfig(vocab_size=31, width=16, depth=4, heads=2, max_length=8, hidden=16), 2, 8
    ),
    "llama": networks.Network(
        llama(vocab_size=31, width=16, depth=2, heads=2, kv_heads=1, max_length=8, hidden=16), 2, 8
    ),
    "stack": networks.Stack(batch=2, length=8, width=32, hidden=32, depth=2),
}


def loss_and_gradient(network, way):
    """Of a way, on random data."""
    make, task, _ = network.prepared(way)
    model = make()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    key = jax.random.key(0)
    batch = task.batch(jax.device_put(task.arrays()), key, jnp.int32(0), network.batch)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return task.loss(nnx.merge(graph, params, rest), batch, key).means()["loss"]

    value, gradient = loss(params)
    return value, optax.tree.norm(gradient)


@pytest.mark.slow
def test_ways_that_keep_less_are_the_same_network():
    """Checkpoints change nothing but costs; RevNet is another network."""
    network = TINY["decoder"]
    possible = all_ways.ways_for(network, gradient=True)
    found = {
        name: loss_and_gradient(network, possible[name])
        for name in (
            "standard",
            "checkpointed parts",
            "checkpointed, chunks",
            "checkpointed, nested",
            "checkpointed, in host memory, chunks",
        )
    }
    for name, some in found.items():
        np.testing.assert_allclose(some, found["standard"], rtol=1e-5, err_msg=name)
    rounded = loss_and_gradient(network, possible["checkpointed, 4 bits"])
    np.testing.assert_allclose(rounded[0], found["standard"][0], rtol=1e-6)
    assert abs(rounded[1] - found["standard"][1]) > 1e-6 * found["standard"][1]
    revnet = loss_and_gradient(network, possible["RevNet"])
    assert abs(revnet[0] - found["standard"][0]) > 1e-4 * found["standard"][0]
    assert np.isfinite(revnet).all()


def test_ways_by_network():
    names = {name: {*all_ways.ways_for(network)} for name, network in TINY.items()}
    assert names["decoder"] == {*all_ways.WAYS}
    assert names["decoder"] - names["llama"] == {"RevNet"}
    assert not any("chunks" in name for name in names["vit"] | names["stack"])
    assert "RevNet" in names["vit"]
    assert ways.WAYS.keys() <= all_ways.WAYS.keys()


@pytest.mark.slow
def test_memory_along_an_axis(tmp_path):
    some = ("standard", "checkpointed", "BDIA, parts")
    given = costs.Costs("activations", ("stack",), some, values=(2, 4), out=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(costs.NETWORKS, "stack", lambda dtype, large: TINY["stack"])
        rows = costs.main(given)["stack"]
    slopes = {row["way"]: row["bytes per element and block"] for row in rows}
    assert slopes["BDIA, parts"] < slopes["checkpointed"] < slopes["standard"]
    (path,) = tmp_path.glob("activations-stack-depth-*.jsonl")
    assert records.read(path).rows == json.loads(json.dumps(rows))
    assert pages.table_of("activations-stack-depth")(rows).count("| BDIA") == 1
    costs_table = tmp_path / "figure.png"
    pages.VIEWS["readme-figure"].draw(rows, costs_table)
    assert is_png(costs_table)


@pytest.mark.slow
def test_time_of_steps(tmp_path, monkeypatch):
    monkeypatch.setitem(costs.NETWORKS, "vit", lambda dtype, large: TINY["vit"])
    some = ("checkpointed, updated in backward", "BDIA, parts")
    given = costs.Costs("steps", ("vit",), some, rounds=2, out=tmp_path)
    rows = costs.main(given)["vit"]
    assert [row["way"] for row in rows] == [*some]
    for row in rows:
        assert row["seconds"] > 0
        assert len(row["rounds"]) == 2
        assert row["peak"] > 0
        assert len(row["over BDIA, parts"]) == 3
    totals = costs.main(dataclasses.replace(given, part="totals", values=(2,)))["vit"]
    assert [row["peaks"] for row in totals] == [[row["peak"]] for row in rows]
    assert len(costs.main(dataclasses.replace(given, part="besides"))["vit"]) == 3


def test_the_longest_text_that_fits():
    """Memory grows a little faster than the line through two lengths: it is made shorter."""

    def need(tokens):
        return types.SimpleNamespace(run=1000 * tokens + tokens**2 // 1000)

    short, long = (need(n).run for n in (4096, 32_768))
    slope = (long - short) / (32_768 - 4096)
    tokens, size = long_texts.fitting(need, (32_768, long), slope, 10**8)
    assert (size, tokens % 128) == (need(tokens).run, 0)
    assert 0.98e8 < size <= 10**8


def test_rounds_go_in_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    found = timing.in_turns(runs, 3, least=0)
    assert "".join(order[6:]) == "abcbcacab"
    assert [len(seconds) for seconds in found.values()] == [3, 3, 3]
    summary = timing.summary({"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 2.0]}, ("b", "c"))
    assert summary["a"]["seconds"] == 2
    assert summary["a"]["over b"] == [0.75, 1.0, 1.25]
    assert timing.ratio(summary["a"]["over b"]) == "1.00 [0.75, 1.25]"


def test_costs_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"ways must be of standard;.*got magic"):
        costs.Costs(ways=("magic",))
    with pytest.raises(ValueError, match="need a value for each of"):
        costs.Costs(models=("gpt2",))


# ---------------------------------------------------------------------------------------------
# What trains
# ---------------------------------------------------------------------------------------------


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MODEL", SMALL)
    monkeypatch.setattr(demo, "DEPTHS", (1, 2))
    monkeypatch.setattr(demo, "COMPARED", demo.TRAINED)
    given = demo.Demo(out=tmp_path, steps=3, batch_size=8, gamma=0.25, signs="sample")
    table = demo.main(given)
    assert (tmp_path / "table.md").read_text().strip() == table
    for way in demo.COMPARED:
        assert f"| {way} " in table
    # Of two blocks of two parts three steps are taken back: 8 samples of 4 patches of 8 features.
    assert f"0 of {3 * 8 * 4 * 8 * 3:,}" in table
    assert "exact: 0 of" in table
    for figure in ("accuracy", "memory"):
        assert is_png(tmp_path / f"{figure}.png")


@pytest.mark.slow
def test_vit_resumes(tmp_path, capsys):
    settings = TrainSettings(steps=4, batch_size=8, stop_at=2, log_every=2)
    experiment = vit.Experiment(out=tmp_path / "run", model=SMALL, train=settings)
    vit.main(experiment)
    settings = dataclasses.replace(settings, stop_at=None)
    accuracy = vit.main(dataclasses.replace(experiment, train=settings, resume=True))
    assert 0 <= accuracy <= 1
    assert "after 4 steps" in capsys.readouterr().out
    # What is refused is no result.
    other = dataclasses.replace(experiment, model=dataclasses.replace(SMALL, method="standard"))
    with pytest.raises(FileExistsError, match="there is a run"):
        vit.main(dataclasses.replace(other, results=tmp_path / "results"))
    assert not (tmp_path / "results").exists()
    assert is_png(tmp_path / "run" / "accuracy.png")


FEW = dataclasses.replace(
    vision_tables.SCALES["digits"],
    vit=SMALL,
    images=64,
    epochs=1,
    evaluations=2,
    seeds=1,
    train=TrainSettings(batch_size=16, optimizer="set-adam"),
)


@pytest.mark.slow
def test_vision_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(vision_tables.SCALES, "digits", FEW)
    cells = vision_tables.table_cells("baselines", FEW)[:2]
    monkeypatch.setattr(vision_tables, "table_cells", lambda *_: cells)
    given = vision_tables.VisionTables(out=tmp_path / "out", work=tmp_path / "work")
    text = vision_tables.main(given)
    assert "| ViT " in text
    assert "| BDIA-ViT " in text
    (path,) = (tmp_path / "out").glob("vision-digits-digits-*.jsonl")
    rows = records.read(path).rows
    assert len(rows) == 2
    assert all(row["error"] is None and row["mismatched"] == 0 for row in rows)
    for row in rows:
        assert [r["split"] for r in row["history"]].count("eval") == 2
    assert not list((tmp_path / "work").glob("*/*/checkpoints"))
    assert pages.table_of("vision-digits-digits")(rows) == text
    capsys.readouterr()

    # What this code has finished with these settings is not run again, what it has not is: results
    # that are written somewhere do not count.
    gone = tmp_path / "work" / rows[0]["folder"] / "found.json"
    gone.unlink()
    assert vision_tables.main(given) == text
    assert capsys.readouterr().out.count("seed=") == 1
    assert vision_tables.main(dataclasses.replace(given, report=True)) == text
    with pytest.raises(FileNotFoundError, match="has finished no run of baselines"):
        vision_tables.main(dataclasses.replace(given, report=True, work=tmp_path / "empty"))
    monkeypatch.setattr(sources, "digest", lambda _: "other code")
    with pytest.raises(FileNotFoundError, match="has finished no run of baselines"):
        vision_tables.main(dataclasses.replace(given, report=True))


def record(accuracy):
    """Of a run that ended so."""
    return {"error": None, "history": [{"split": "eval", "accuracy": accuracy}]}


def test_a_quick_check_trains(tmp_path, monkeypatch):
    """Whatever results are committed: what they say must be computed."""
    trained = []

    def run_all(runs, work, depends, tell, train):
        trained.extend(runs)
        return {run.name: record(0.8 if run.name == bad else 0.95) for run in runs}

    monkeypatch.setattr(vision_tables, "run_all", run_all)
    bad = "nothing"
    given = vision_tables.VisionTables(quick=True, out=tmp_path, work=tmp_path / "work")
    vision_tables.main(given)
    assert len({run.name for run in trained}) == 22
    bad = trained[0].name
    with pytest.raises(RuntimeError, match=r"below 90 %: ViT$"):
        vision_tables.main(given)


def test_runs_are_known_by_their_settings_and_code(tmp_path, monkeypatch):
    trained = []

    def run(**settings):
        return runs.Run("a", settings, lambda folder: trained.append(settings) or {"loss": 1})

    depends = ["bdia_jax/grid.py"]
    first = runs.run_all([run(x=1)], tmp_path, depends)["a"]
    assert first["loss"] == 1
    assert runs.run_all([run(x=1)], tmp_path, depends)["a"] == first
    runs.run_all([run(x=2)], tmp_path, depends)
    runs.run_all([run(x=1)], tmp_path, ["bdia_jax/maps.py"])
    assert trained == [{"x": 1}, {"x": 2}, {"x": 1}]


def test_a_run_that_another_process_has_in_hand_is_left_to_it(tmp_path):
    with runs.claimed(tmp_path / "lock") as mine:
        assert mine
        with runs.claimed(tmp_path / "lock") as again:
            assert not again
    with runs.claimed(tmp_path / "lock") as mine:
        assert mine


def test_a_device_is_had_in_turns(tmp_path):
    """By nobody, as long as somebody gets ready."""
    order, ready = [], [side_by_side.Turn(tmp_path / "turn") for _ in range(2)]

    def take(turn):
        with turn:
            order.append("in")
            order.append("out")

    first = threading.Thread(target=take, args=(ready[0],))
    first.start()
    first.join(0.3)
    assert not order
    take(ready[1])
    first.join()
    assert order == ["in", "out"] * 2
    with side_by_side.Turn(None):
        pass


def test_records_so_far_are_told_after_every_run(tmp_path):
    told = []
    some = [runs.Run(name, {}, lambda folder: {}) for name in "ab"]
    runs.run_all(some, tmp_path, ["bdia_jax/grid.py"], so_far=lambda found: told.append({*found}))
    assert told == [{"a"}, {"a", "b"}]


def test_rows_are_written_and_what_is_missing_is_told(tmp_path, monkeypatch):
    some = [runs.Run(name, {}, lambda folder: {"loss": 1.0}, {"way": name}) for name in "ab"]

    def written():
        rows, path = runs.run_and_write(
            "some",
            some,
            tmp_path / "work",
            ["bdia_jax/grid.py"],
            settings=vision_tables.VisionTables(out=tmp_path),
            first=[{"way": "none"}],
            note="A note.",
        )
        assert records.read(path).rows == rows
        return [row["way"] for row in rows], records.read(path).about["note"]

    # As still.py leaves runs out.
    run_all = runs.run_all
    monkeypatch.setattr(
        runs, "run_all", lambda all_of_it, *rest, **o: run_all(some[:1], *rest, **o)
    )
    assert written() == (["none", "a"], "1 of 2 runs are missing. A note.")
    monkeypatch.undo()
    assert written() == (["none", "a", "b"], "A note.")


@pytest.mark.slow
def test_cases_run_in_processes_and_within_a_time(tmp_path, monkeypatch):
    given = exactness.Exactness(workers=2, within=0, out=tmp_path)
    assert exactness.main(given)
    (path,) = tmp_path.glob("exactness-*.jsonl")
    about, rows = records.read(path)
    assert not rows
    assert "left out for want of time" in about["note"]


def test_tables_show_runs_that_went_wrong():
    common = {"row": "some", "published": None} | record(0.5)
    rows = [
        common | {"system": system, "seed": seed}
        for system in ("ViT", "BDIA-ViT")
        for seed in (0, 1)
    ]
    del rows[-1]["history"]
    table = vision_tables.table(rows)
    assert "50.00 ± 0.00" in table
    assert "not finite" in table


# ---------------------------------------------------------------------------------------------
# Results of code that has changed
# ---------------------------------------------------------------------------------------------

OLD = {
    "bdia_jax/__init__.py": "",
    "bdia_jax/train.py": "def train(model, task, settings):\n    return settings.steps * model\n",
    "experiments/measure/__init__.py": "",
    "experiments/measure/runs.py": """
def run_all(runs):
    return [run.train() for run in runs]
""",
    "experiments/some.py": """
import dataclasses, json, pathlib, sys
from bdia_jax.train import train
from measure.runs import run_all

@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 900
    warmup_steps: int = 100
    log_every: int = 50
    eval_every: int = 50
    checkpoint_every: int = 50

class Run:
    def __init__(self, name):
        self.name = name
    def train(self):
        return {"name": self.name, "loss": train(0.1, None, Settings()), "seconds": 5}

out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
rows = [{}, *run_all([Run("a"), Run("b")])]
(out / "some.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
""",
}


def test_the_same_numbers_with_the_code_of_then_and_now(tmp_path, monkeypatch):
    """Short runs: three steps of the networks that are asked for."""
    for name, text in OLD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "data").mkdir()
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "then"]):
        by = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *by, *words], check=True)
    monkeypatch.setattr(still, "HERE", tmp_path)
    about = {"commit": "HEAD", "command": "python experiments/some.py --out experiments/results"}
    then, now = still.both("some", about, still.Part("--seeds 1", "b"))
    assert then[1:] == now[1:] == [{"name": "b", "loss": 3 * 0.1, "seconds": 5}]
    (tmp_path / "bdia_jax/train.py").write_text(OLD["bdia_jax/train.py"].replace("*", "+"))
    then, now = still.both("some", about, still.Part("", "a|b"))
    assert still.differences(then[1:], now[1:]) == {
        f"[{i}].{name}": share
        for i in range(2)
        for name, share in {"name": 0, "loss": (3.1 - 3 * 0.1) / 3.1}.items()
    }


def test_what_is_the_same():
    row = {"loss": 1.0, "seconds": 2, "folder": "a", "history": [{"loss": math.nan}]}

    def largest(now):
        return max(still.differences([row], now).values())

    assert largest([row | {"seconds": 3, "folder": "b"}]) == 0
    assert 0 < largest([row | {"loss": 1 + 2**-52}]) <= 2**-52
    assert largest([row, row]) == largest([]) == math.inf
    assert largest([row | {"history": [{"loss": math.nan}] * 2}]) == math.inf
    # Fields that are told now, or no more.
    assert largest([row | {"accuracy": 0.5}]) == 0
    assert max(still.differences([row | {"mismatched": 0.0}], [row]).values()) == 0
    assert max(still.differences([row | {"mismatched": 1.0}], [row]).values()) == 1
    assert largest([row | {"loss": math.nan}]) == math.inf
    # Of what is counted there is no share.
    assert still.share(3, 4) == still.share("a", "b") == math.inf


def test_a_result_that_was_shown_to_be_the_same_is_not_stale(tmp_path, monkeypatch):
    path = records.write("some-thing", [{"loss": 1.0}], ["bdia_jax/grid.py"], out=tmp_path)
    about = records.read(path).about
    code = about["code"]
    again = {"commit": "abcdefgh", "code": code, "numbers": 7, "within": 2e-6}
    # A module that it depends on may have been cut in two since.
    again |= {"depends": about["depends"]}
    path.write_text(json.dumps(about | {"depends": ["no.py"], "again": again}) + "\n")
    assert pages.stale(tmp_path) == []
    assert "(abcdefg: the same 7 numbers, to 2e-06, run short)" in pages.caption(
        records.read(path).about
    )


@pytest.mark.slow
def test_odd_files_are_read_or_refused():
    wrong = [row for row in odd_files.tried() if not row["right"]]
    assert wrong == []
