"""Settings as YAML: they come back as they were, and the command line goes on from them."""

import dataclasses
import enum
import importlib.machinery
import pathlib
import sys
from typing import Any, Literal

import pytest
import yaml

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments"))

import translate
import vit
from measure import gpt2_small_data

from bdia_jax import command_line
from bdia_jax.finetuning.settings import LowRank
from bdia_jax.finetuning.text_settings import SOME, FineTune
from bdia_jax.nn import DecoderConfig, LinearScaling, LongScaling, RotaryScaling, YarnScaling
from bdia_jax.train import TrainSettings, command, read_settings, settings_file, to_yaml
from bdia_jax.train.run_folder import make_run_folder

MINE = FineTune(
    model="no",
    data=pathlib.Path("a/ü.jsonl"),
    out=pathlib.Path("runs/1"),
    signs="block",
    gamma=0.25,
    quantize="nf4",
    lora=LowRank(rank=4, alpha=8.0, targets=("q", "up")),
    train=TrainSettings(learning_rate=1e-5, clip_norm=None, patience=3, mesh="data=2", wandb="w"),
)


DEFAULT = TrainSettings()


class Colour(enum.Enum):
    red = 1
    blue = 2


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner one."""

    a: int = 1
    b: str = "b"


@dataclasses.dataclass(frozen=True)
class Everything:
    """A field of every kind."""

    whole: int
    path: pathlib.Path
    real: float = 0.5
    word: str = "no"
    flag: bool = False
    choice: Literal["one", 2] = "one"
    auto: float | Literal["auto"] = "auto"
    maybe: pathlib.Path | None = None
    colour: Colour = Colour.red
    pair: tuple[int, str] = (1, "a")
    many: tuple[float, ...] = ()
    pairs: tuple[tuple[str, str], ...] = (("a", "b"),)
    words: list[str] = dataclasses.field(default_factory=list)
    sizes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    anything: Any = None
    inner: Inner = Inner(a=7)
    other: Inner | None = None
    made: int = dataclasses.field(default=0, init=False)


def written(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text if isinstance(text, str) else to_yaml(text))
    return path


@pytest.mark.parametrize(
    "settings",
    [
        MINE,
        FineTune(model="123", data=pathlib.Path("true"), out=pathlib.Path("~/x")),
        vit.Experiment(out=pathlib.Path("x"), train=TrainSettings(steps=3)),
        translate.Translate(),
        gpt2_small_data.SmallData(
            model=DecoderConfig(positions="rotary", rope_scaling=RotaryScaling(8.0, 1.0, 4.0, 64))
        ),
        # The first has no setting that the other kinds do not have, too.
        DecoderConfig(rope_scaling=LinearScaling(factor=2.0), window=3, windowed=(True, False) * 2),
        DecoderConfig(rope_scaling=YarnScaling(factor=2.0, amplitude=1.5)),
        DecoderConfig(rope_scaling=LongScaling(short=(1.0,) * 16, long=(2.0,) * 16)),
        TrainSettings(stop_at=7),
        Everything(1, pathlib.Path("p")),
        Everything(
            -1,
            pathlib.Path("/p q"),
            real=float("inf"),
            word="1e-3: # null",
            flag=True,
            choice=2,
            auto=0.25,
            maybe=pathlib.Path("null"),
            colour=Colour.blue,
            pair=(2, "3"),
            many=(1.0, 1e-7),
            pairs=(),
            words=["yes", "2024-01-01"],
            sizes={"a": (1, 2), "3": ()},
            anything=[1, "x"],
            inner=Inner(2, "~"),
            other=Inner(),
        ),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_they_come_back_as_they_were(settings, tmp_path):
    path, kind = written(tmp_path, settings), type(settings)
    assert read_settings(path, kind) == settings
    assert settings_file.read_defaults(path, kind, None) == settings


def test_what_is_left_out_has_its_default(tmp_path):
    path = written(tmp_path, "whole: 1\npath: p\ninner: {b: c}\nother: {b: c}\nreal: 1e-3\n")
    expected = Everything(1, pathlib.Path("p"), 1e-3, inner=Inner(7, "c"), other=Inner(1, "c"))
    assert read_settings(str(path), Everything) == expected
    with pytest.raises(ValueError, match=r"settings\.yaml must have whole, path"):
        read_settings(written(tmp_path, ""), Everything)


ALL = ", ".join(field.name for field in dataclasses.fields(Everything) if field.init)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wohle: 1", rf"there is no setting wohle \(did you mean whole\?\); there are {ALL}$"),
        ("xyz: 1", rf"there is no setting xyz; there are {ALL}$"),
        ("made: 1", "there is no setting made"),
        ("inner: {c: 1}", "there is no setting inner.c; there are a, b"),
        ("other: {c: 1}", "there is no setting other.c; there are a, b"),
        ("inner: 3", r"inner must be settings \(a, b\); got 3"),
        ("other: 3", "other must be names with values, or null; got 3"),
        ("whole: 1.5", "whole must be a whole number; got 1.5"),
        ("whole: true", "whole must be a whole number; got True"),
        ("path: 3", "path must be a path; got 3"),
        ("real: much", "real must be a number; got 'much'"),
        ("real: true", "real must be a number; got True"),
        ("word: 3", "word must be a text .*; got 3"),
        ("word: no", "word must be a text .*; got False"),
        ("flag: 1", "flag must be true or false; got 1"),
        ("choice: three", "choice must be one or 2; got 'three'"),
        ("auto: often", "auto must be a number, or auto; got 'often'"),
        ("maybe: 1", "maybe must be a path, or null; got 1"),
        ("colour: green", "colour must be red or blue; got 'green'"),
        ("pair: [1]", "pair must be a list of 2; got"),
        ("pair: [1, 2]", r"pair\[1\] must be a text .*; got 2"),
        ("many: 1", "many must be a list, each a number; got 1"),
        ("many: [1, x]", r"many\[1\] must be a number; got 'x'"),
        ("sizes: {a: [x]}", r"sizes.a\[0\] must be a whole number; got 'x'"),
        ("sizes: 1", "sizes must be names with values; got 1"),
        ("- 1", rf"the file must have settings \({ALL}\); got \[1\]"),
        ("a: [", "is not YAML"),
        ("a: 1\nb: 2\na: 3\n", "is not YAML: 'a' is given twice"),
        ("inner: {a: 1, a: 3}\n", "is not YAML: 'a' is given twice"),
    ],
)
def test_what_is_wrong_is_told(text, message, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message) as told:
        settings_file.read_defaults(path, Everything, None)
    assert str(path) in str(told.value)


def test_other_values_cannot_be_written():
    with pytest.raises(ValueError, match="settings are numbers, texts, paths and the like; got <"):
        to_yaml(Inner(a=object()))
    with pytest.raises(FileNotFoundError, match=r"there is no file none\.yaml"):
        read_settings("none.yaml", Inner)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def test_a_command_line_goes_on_from_a_file(tmp_path):
    path = written(tmp_path, MINE)
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        assert command.read(FineTune, arguments) == MINE
    more = "--resume --train.steps 7 --lora.targets k v --gamma auto --lora.alpha None --out other"
    given = command.read(FineTune, ["--config", str(path), *more.split()])
    assert given == dataclasses.replace(
        MINE,
        resume=True,
        gamma="auto",
        out=pathlib.Path("other"),
        lora=LowRank(rank=4, targets=("k", "v")),
        train=dataclasses.replace(MINE.train, steps=7),
    )
    assert command.read(FineTune, [*more.split(), "--config", str(path)]) == given
    back = written(tmp_path, given)
    assert not command.read(FineTune, ["--config", str(back), "--no-resume"]).resume


def test_a_file_need_not_have_all(tmp_path, capsys):
    # Not a whole by itself: low-rank updates are missing.
    path = written(tmp_path, "quantize: nf4\nmodel: m\ntrain: {steps: 3}\n")
    rest = ["--data", "d", "--lora.rank", "2"]
    given = command.read(FineTune, ["--config", str(path), *rest, "--out", "o"])
    assert given == FineTune(
        model="m",
        data=pathlib.Path("d"),
        out=pathlib.Path("o"),
        quantize="nf4",
        lora=LowRank(rank=2),
        train=dataclasses.replace(SOME, steps=3),
    )
    with pytest.raises(SystemExit):
        command.read(FineTune, ["--config", str(path), *rest])
    told = capsys.readouterr().err
    assert "--out" in told
    assert "--data" not in told
    # What does not fit is told by the settings themselves.
    bad = written(tmp_path, "batch_size: 8\naccumulate: 3\n")
    with pytest.raises(SystemExit):
        command.read(TrainSettings, ["--config", str(bad)])
    assert "accumulate must divide batch_size = 8; got 3" in capsys.readouterr().err
    assert command.read(TrainSettings, ["--config", str(bad), "--accumulate", "4"]).accumulate == 4


@pytest.mark.parametrize(
    "arguments", [["--config"], ["--config", "--out"], ["--config", "a", "--config", "b"]]
)
def test_one_file(arguments):
    with pytest.raises(ValueError, match="--config must be given once, with a file; got"):
        command.read(Inner, arguments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bdia_jax.finetune", "python -m bdia_jax.finetune"), ("some.__main__", "python -m some")],
)
def test_how_a_program_is_called(name, expected, monkeypatch):
    spec = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
    assert command_line.program() == expected


def run_command(monkeypatch, main, kind, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments/mine.py", *map(str, arguments)])
    # As if Python had been started with this script.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    command.run(main, kind, "", told=100)


def test_a_run_of_a_command_keeps_its_settings(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def main(given):
        assert not out.exists()
        for folder in (given.out, given.out / "another"):
            make_run_folder(folder, {"train": {}}, True)

    @dataclasses.dataclass
    class Mine:
        out: pathlib.Path
        train: TrainSettings = DEFAULT

    run_command(monkeypatch, main, Mine, "--out", out, "--train.steps", 3)
    kept = (out / "settings.yaml").read_text()
    assert kept.startswith(
        "# The same run: python experiments/mine.py --config THIS_FILE --out ANOTHER_FOLDER\n"
    )
    assert yaml.safe_load(kept)["train"]["steps"] == 3
    # Of runs in other folders, they are not the settings; and later ones are of no command.
    make_run_folder(tmp_path / "later", {}, True)
    assert not [*out.glob("another/*.yaml"), *tmp_path.glob("later/*.yaml")]
    # Where no run was made, there is nothing.
    run_command(monkeypatch, lambda given: None, Mine, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_command_without_a_folder(monkeypatch):
    given = []
    run_command(monkeypatch, given.append, Inner, "--a", 3)
    assert given == [Inner(a=3)]


def test_a_command_tells_what_is_wrong_with_a_file(tmp_path, monkeypatch):
    path = written(tmp_path, "c: 1")
    with pytest.raises(SystemExit, match=r"ValueError: .*there is no setting c; there are a, b"):
        run_command(monkeypatch, print, Inner, "--config", path)


def test_a_missing_package_is_told_first(monkeypatch):
    @dataclasses.dataclass
    class Mine:
        train: TrainSettings = DEFAULT

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="ImportError: wandb = 'x' needs the package wandb"):
        run_command(monkeypatch, pytest.fail, Mine, "--train.wandb", "x")


def test_help_tells_of_files(capsys):
    with pytest.raises(SystemExit):
        command.read(Inner, ["--help"], "Does this.")
    told = capsys.readouterr().out
    assert "Does this." in told
    assert "--config FILE.yaml" in told
