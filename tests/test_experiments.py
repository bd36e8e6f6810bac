"""The experiments, at a size that takes seconds: what they count, write and draw."""

import dataclasses
import itertools
import json
import pathlib
import sys
from xml.etree import ElementTree

import jax
import numpy as np
import optax
import pytest
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments"))

import benchmark
import demo
import exactness
import memory_and_time
import reliability
import vision_costs
import vision_tables
import vit

from bdia_jax.nn import Decoder, ViTConfig, llama
from bdia_jax.train import TrainSettings

pytestmark = pytest.mark.usefixtures("quick_compiles")

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


def test_every_pair_of_settings_meets_in_a_case_of_exactness():
    cases = exactness.covering(exactness.FACTORS)
    for (a, in_a), (b, in_b) in itertools.combinations(exactness.FACTORS.items(), 2):
        met = {(case[a], case[b]) for case in cases}
        assert met == set(itertools.product(in_a, in_b))
    assert len(cases) < 30


def test_a_case_of_exactness():
    row = {
        "dtype": "bfloat16",
        "dropout": 0.1,
        "m": 1,
        "frac_bits": 9,
        "depth": 2,
        "block": "attention",
    }
    found = exactness.measure(exactness.block_case(row, 10_000, seed=0), jax.random.key(0))
    assert found["compared"] >= 10_000
    assert found["finite"]
    assert found["mismatched"] == found["samples_mismatched_in_gradient"] == 0
    assert 0 <= found["naive_mismatched"] <= found["compared"]
    assert len(exactness.line(found)) >= len(exactness.COLUMNS) - 1
    assert exactness.encoder_decoder("float32", 1000, 0).settings["depth"] == 12


def test_memory_and_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_and_time, "DTYPES", ("float32",))
    settings = memory_and_time.MemoryAndTime(
        depths=(2, 4),
        memory_shape=(2, 8, 32),
        widths=(32,),
        expansions=(1,),
        batch=2,
        length=8,
        blocks=2,
        rounds=2,
        out=tmp_path,
    )
    found = memory_and_time.main(settings)
    slopes = {row["method"]: row["bytes_per_element_and_block"] for row in found["memory"]}
    assert slopes["bdia"] < slopes["bdia-r1"] < slopes["checkpoint"] < slopes["plain"]
    for row in found["time"]:
        assert row["wall_seconds"] > 0
        assert len(row["rounds"]) == 2
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["time"] == found["time"]
    assert is_png(path.with_suffix(".png"))
    assert "checkpointed blocks" in capsys.readouterr().out


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MODEL", SMALL)
    monkeypatch.setattr(demo, "DEPTHS", (2, 3))
    table = demo.main(demo.Demo(out=tmp_path, steps=3, batch_size=8))
    assert (tmp_path / "table.md").read_text().strip() == table
    for label in demo.LABELS.values():
        assert label in table
    # One of the two blocks is taken back: 8 samples of 4 patches of 8 features, 3 steps.
    assert "0 of 768" in table
    assert "exact: 0 of" in table
    for figure in ("accuracy", "memory", "inverse"):
        assert is_png(tmp_path / f"{figure}.png")


def test_vit_resumes(tmp_path, capsys):
    settings = TrainSettings(steps=4, batch_size=8, stop_at=2, log_every=2)
    experiment = vit.Experiment(out=tmp_path / "run", model=SMALL, train=settings)
    vit.main(experiment)
    settings = dataclasses.replace(settings, stop_at=None)
    accuracy = vit.main(dataclasses.replace(experiment, train=settings, resume=True))
    assert 0 <= accuracy <= 1
    assert "after 4 steps" in capsys.readouterr().out
    assert is_png(tmp_path / "run" / "accuracy.png")


TINY = dataclasses.replace(
    vision_tables.SCALES["digits"],
    vit=SMALL,
    images=64,
    epochs=1,
    evaluations=2,
    seeds=2,
    train=TrainSettings(batch_size=16, optimizer="set-adam"),
)


def two_cells(scale):
    """ViT and BDIA-ViT."""
    return vision_tables.baselines(scale)[:2]


def test_vision_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(vision_tables.SCALES, "digits", TINY)
    monkeypatch.setitem(vision_tables.TABLES, "baselines", two_cells)
    given = vision_tables.VisionTables(out=tmp_path / "out", work=tmp_path / "work")
    text = vision_tables.main(given)
    assert "| ViT " in text
    assert "| BDIA-ViT " in text
    paths = sorted((tmp_path / "out/runs").glob("*.json"))
    assert len(paths) == 4
    runs = [json.loads(path.read_text()) for path in paths]
    assert all(run["error"] is None and run["mismatched"] == 0 for run in runs)
    assert [len(run["evaluations"]) for run in runs] == [2] * 4
    assert is_png(tmp_path / "out/accuracy.png")
    assert not list((tmp_path / "work").glob("*/*/checkpoints"))
    capsys.readouterr()

    # What is there is not run again; what is missing is; another setting is not mixed in.
    paths[0].unlink()
    before = {path: path.stat().st_mtime_ns for path in paths[1:]}
    vision_tables.main(given)
    assert capsys.readouterr().out.count("seed=") == 1
    assert {path: path.stat().st_mtime_ns for path in paths[1:]} == before
    assert vision_tables.main(dataclasses.replace(given, report=True)) == text
    with pytest.raises(ValueError, match="other settings"):
        vision_tables.main(dataclasses.replace(given, images=48))


def test_a_run_that_another_process_has_in_hand_is_left_to_it(tmp_path):
    with vision_tables.claimed(tmp_path / "lock") as mine:
        assert mine
        with vision_tables.claimed(tmp_path / "lock") as again:
            assert not again
    with vision_tables.claimed(tmp_path / "lock") as mine:
        assert mine


def test_tables_show_runs_that_went_wrong():
    cells = two_cells(TINY)
    good = {"error": None, "accuracy": 0.5, "train": {"seed": 0}}
    rows = [
        vision_tables.Found(cells[0], [good, good]),
        vision_tables.Found(cells[1], [good, {"error": "NonFiniteError", "train": {"seed": 1}}]),
    ]
    table = vision_tables.table_of(rows, TINY)
    assert "50.00 ± 0.00 (2)" in table
    assert "not finite" in table


def test_vision_costs(tmp_path, monkeypatch):
    systems = ("ViT", "ViT, checkpointed blocks", "BDIA-ViT")
    chosen = {name: vision_costs.SYSTEMS[name] for name in systems}
    monkeypatch.setattr(vision_costs, "SYSTEMS", chosen)
    monkeypatch.setattr(vision_costs, "SMALL", SMALL)
    monkeypatch.setattr(vision_costs, "DTYPES", ("float32",))
    given = vision_costs.VisionCosts(
        parts=("memory", "time"),
        batch_size=2,
        depth=2,
        width=8,
        depths=(2,),
        rounds=2,
        out=tmp_path,
    )
    text = vision_costs.main(given)
    for name in systems:
        assert text.count(f"| {name}") >= 2
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["memory"]["residuals"][0]["bytes"] > 0
    assert is_png(path.with_name(f"{path.stem}-memory.png"))


def test_benchmark(tmp_path, monkeypatch):
    ways = ("plain", "checkpointed blocks", "BDIA")
    monkeypatch.setattr(benchmark, "WAYS", {name: benchmark.WAYS[name] for name in ways})
    small = dataclasses.replace(SMALL, image_size=32, channels=3, patch_size=16)
    monkeypatch.setattr(benchmark, "size", lambda *_: benchmark.Size(small, 2, 1))
    settings = benchmark.Benchmark(
        parts=("steps", "depth", "besides"), shapes=("vit",), rounds=2, depths=(2,), out=tmp_path
    )
    found = benchmark.main(settings)["vit"]
    (steps, depth, besides) = (found[part]["rows"] for part in settings.parts)
    assert [row["way"] for row in steps] == [*ways]
    assert all(row["seconds"] > 0 and len(row["rounds"]) == 2 for row in steps)
    # The same step, of which two thirds are compiled for its memory alone.
    assert [row["memory"] for row in steps] == [row["memory"][0] for row in depth]
    assert len(besides) == 3
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".md").read_text().count("| BDIA") == 2
    assert is_png(path.with_name(f"{path.stem}-vit-depth.png"))


def test_ways_of_the_benchmark_are_the_same_network():
    """Groups of checkpoints, and checkpoints on the host, change nothing but costs."""
    config = llama(
        vocab_size=31,
        max_length=8,
        width=16,
        depth=4,
        heads=2,
        kv_heads=1,
        hidden=16,
        method="standard",
    )
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 31)
    losses = {}
    for wrap in (
        None,
        benchmark.GroupedCheckpoints,
        benchmark.OffloadedCheckpoints,
        lambda stack: benchmark.Coupled(stack, config),
    ):
        model = Decoder(config, rngs=nnx.Rngs(0))
        if wrap is not None:
            model.blocks = wrap(model.blocks)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        @jax.value_and_grad
        def loss(params, graph=graph, rest=rest):
            return nnx.merge(graph, params, rest).loss(tokens, tokens, key=jax.random.key(1)).loss

        value, gradient = loss(params)
        losses[wrap] = value, optax.tree.norm(gradient)
    plain, grouped, offloaded, coupled = losses.values()
    np.testing.assert_allclose(grouped, plain, rtol=1e-5)
    np.testing.assert_allclose(offloaded, plain, rtol=1e-5)
    assert abs(coupled[0] - plain[0]) > 1e-4 * plain[0]
    assert np.isfinite(coupled).all()


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


@pytest.mark.parametrize("part", ["blocks", "precision"])
def test_reliability_audits(part):
    settings = reliability.Reliability(depth=2, width=32, length=4, batch=2)
    case = list(reliability.cases(part))[-1]
    row = reliability.audit(case, settings)
    assert row["exact"]
    assert row["mismatched"] == 0
    found = {"title": "Audits", "tried": 1, "passed": 1, "notes": [], "audits": [row]}
    text = reliability.markdown({"device": "a device", "jax": "0", "parts": {part: found}})
    assert f"| {row['block']} | " in text
