"""The experiments on text, at a size that takes seconds."""

import dataclasses
import json
import math
import pathlib
import shutil
import sys
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments"))

import translate
from _rows import fast
from measure import (
    chat_tables,
    chats,
    e2e_data,
    e2e_metrics,
    finetune_e2e,
    gpt2_small_data,
    pages,
    records,
)

from bdia_jax import BDIA, data, interop
from bdia_jax.finetuning import text_data
from bdia_jax.finetuning import texts as finetune
from bdia_jax.finetuning.settings import LowRank
from bdia_jax.finetuning.text_settings import FineTune
from bdia_jax.nn import Decoder, DecoderConfig, llama, set_step
from bdia_jax.train import TrainSettings, evaluation_memory, in_steps, step_memory

E2E = pathlib.Path(__file__).resolve().parents[2] / "shared/data/e2e-dataset.zip"
TINY = DecoderConfig(max_length=64, width=16, depth=2, heads=2)
FEW = TrainSettings(
    steps=4, batch_size=4, learning_rate=1e-2, log_every=2, eval_every=2, checkpoint_every=2
)


CHAT = (
    "{% for m in messages %}{{ m.role + ':' }}"
    "{{ (' ' + m.content + '\n') if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 that knows nothing, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("gpt2")
    tokenizer = data.byte_tokenizer()
    config = dataclasses.replace(TINY, vocab_size=tokenizer.size, max_length=128)
    interop.save(Decoder(config, rngs=nnx.Rngs(0)), path)
    tokenizer.save(path)
    return path


@pytest.mark.slow
def test_gpt2_small_data(tmp_path):
    given = gpt2_small_data.SmallData(
        work=tmp_path / "work",
        out=tmp_path / "out",
        methods=("bdia",),
        gammas=(0.5, 0.125),
        signs=("sample",),
        dropouts=(0.1,),
        seeds=1,
        share=0.01,
        vocabulary=300,
        save=True,
        model=dataclasses.replace(TINY, max_length=8),
        train=FEW,
    )
    text = gpt2_small_data.main(given)
    for gamma in (0.5, 0.125):
        assert f"| bdia, γ = {gamma}, signs: sample, dropout 0.1" in text
    (path,) = (tmp_path / "out").glob("small-text-python-0.01-*.jsonl")
    about, rows = records.read(path)
    assert len(rows) == 2
    assert "work" not in about["settings"]
    assert pages.table_of("small-text-python-0.01")(rows) == text
    saved = tmp_path / "work/python-0.01" / rows[1]["folder"] / "model"
    assert interop.load(saved).config.vocab_size == data.load_tokenizer(saved).size
    # What is there is not trained again, and gives the same table.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("found.json")}
    assert gpt2_small_data.main(given) == text
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("rank", fast(1, [0, 2]))
def test_finetune(folder, tmp_path, rank, capsys):
    texts = tmp_path / "texts.jsonl"
    lines = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(40)]
    if rank:
        # Frozen weights stay as they are in the folder.
        model = interop.load(folder)
        folder = shutil.copytree(folder, tmp_path / "half")
        interop.save(model, folder, dtype="bfloat16")
        # And conversations are learned by its template.
        (folder / "chat_template.jinja").write_text(CHAT)
        lines = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in (line.values() for line in lines)
        ]
    texts.write_text("\n".join(map(json.dumps, lines)))
    given = FineTune(
        model=str(folder),
        data=texts,
        out=tmp_path / "run",
        length=32,
        train=FEW,
        lora=LowRank(rank=rank),
        freeze_embedding=rank == 0,
    )
    found = finetune.main(given)
    assert found["loss"] < found["loss before"]
    out = capsys.readouterr().out
    assert "36 texts in" in out
    assert ("the low-rank updates alone are in" in out) == bool(rank)
    if rank:
        # GPT-2's queries and values are parts of one matrix there.
        found = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        assert (found["target_modules"], found["r"]) == (["attn.c_attn"], 2 * rank)
    # The prompt of the first text for evaluation, as it was asked.
    assert ("'user: 9 + 1 =\\nassistant:'" if rank else "'9 + 1 ='") in out
    assert is_png(tmp_path / "run/loss.png")
    # What the network makes of that prompt is told at each of the two evaluations.
    log = (tmp_path / "run/log.txt").read_text()
    prompt = "'user: 9 + 1 =\\nassistant:'" if rank else "'9 + 1 ='"
    assert all(f"step {step}, sample: {prompt} -> '" in log for step in (2, 4))
    assert log.count("sample: ") == 2
    written = json.loads((tmp_path / "run/model/config.json").read_text())
    assert written["dtype"] == ("bfloat16" if rank else "float32")
    before, after = (interop.load(f) for f in (folder, tmp_path / "run/model"))
    assert np.array_equal(before.embedding[...], after.embedding[...])
    q = "blocks", "stacked", "attention", "q", "kernel"
    old, new = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param)))[q] for m in (before, after))
    assert not np.array_equal(old[...], new[...])
    k = *q[:-2], "k", "kernel"
    old, new = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param)))[k] for m in (before, after))
    assert np.array_equal(old[...], new[...]) == bool(rank)
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.decode(tokenizer.encode("1 + 1 =")) == "1 + 1 ="
    assert tokenizer.chat_template == (CHAT if rank else None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.config.n_embd == 16


@pytest.mark.buffers
def test_a_run_can_be_planned(folder, tmp_path, capsys):
    """What is told is what the run's own programs need, with its data; its folder is left alone."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} + {i}"}) + "\n" for i in range(40)))
    given = FineTune(
        model=str(folder),
        data=texts,
        out=tmp_path / "run",
        length=32,
        gamma=1 / 8,
        plan="here",
        train=dataclasses.replace(FEW, accumulate=2),
        lora=LowRank(rank=2, targets=("q", "down"), dora=True),
    )
    found = finetune.main(given)
    assert not given.out.exists()
    assert "nothing was trained" in capsys.readouterr().out
    model = finetune.load(given, folder)
    task, _ = finetune.text_data.task_of(given, data.byte_tokenizer(), 32, None)
    need = step_memory(model, task, given.train)
    assert found["total"] == need.memory.total
    assert found["evaluation"] == evaluation_memory(model, task, given.train).total + need.optimizer
    # Of 2 sequences and 2 blocks: for each of 32 tokens 16 × 3 bits, in words; and a checksum.
    assert found["side"] == 2 * 2 * (32 * 8 + 4)
    # What cannot be is told before data are read.
    nothing = dataclasses.replace(given, data=tmp_path)
    with pytest.raises(ValueError, match=r"one of the GPUs.*did you mean rtx-4090"):
        finetune.main(dataclasses.replace(nothing, plan="rtx4090"))
    train = dataclasses.replace(FEW, mesh="fsdp=3")
    with pytest.raises(ValueError, match="of 3 devices; there are"):
        finetune.main(dataclasses.replace(nothing, train=train))


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="there must be 8 devices")
@pytest.mark.parametrize("rank", [0, 2])
def test_finetune_on_a_mesh(folder, tmp_path, rank):
    """Reads, measures, trains, evaluates, continues a text and saves there, as on one device."""
    texts = tmp_path / "texts.jsonl"
    lines = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(400)]
    texts.write_text("\n".join(map(json.dumps, lines)))
    found = {}
    for mesh in (None, "data=2,fsdp=4"):
        given = FineTune(
            model=str(folder),
            data=texts,
            out=tmp_path / f"run-{mesh}",
            length=32,
            # A rounding that comes out otherwise moves nothing by more than float32 does.
            dtype="float32",
            frac_bits=18,
            train=dataclasses.replace(FEW, batch_size=8, mesh=mesh),
            lora=LowRank(rank=rank),
        )
        told = finetune.main(given)
        chosen = json.loads((given.out / "settings.json").read_text())["fine-tuning"]["step"]
        found[mesh] = [told["loss before"], told["loss"], chosen["gamma"]]
        assert interop.load(given.out / "model").config.max_length == 128
    np.testing.assert_allclose(found["data=2,fsdp=4"], found[None], rtol=1e-5)


@pytest.mark.slow
def test_finetune_goes_on_from_an_adapter(tmp_path, capsys):
    tokenizer, texts = data.byte_tokenizer(), tmp_path / "texts.jsonl"
    config = llama(vocab_size=tokenizer.size, width=16, depth=2, heads=2, hidden=24, max_length=64)
    interop.save(Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    texts.write_text("".join(json.dumps({"text": f"{i} + {i}"}) + "\n" for i in range(40)))
    given = FineTune(
        model=str(tmp_path / "base"),
        data=texts,
        out=tmp_path / "first",
        length=32,
        gamma=1 / 8,
        train=FEW,
        lora=LowRank(rank=2, alpha=6.0, targets=("q", "down")),
    )
    first = finetune.main(given)
    lora = LowRank(adapter=tmp_path / "first/adapter")
    go_on = dataclasses.replace(given, out=tmp_path / "second", lora=lora)
    assert finetune.main(dataclasses.replace(go_on, plan="here"))["parameters"] > 0
    second = finetune.main(go_on)
    assert second["loss before"] == pytest.approx(first["loss"], rel=1e-5)
    assert second["loss"] < second["loss before"]
    written = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 6.0)
    assert "low-rank updates of attention.q, ffn.down, from" in capsys.readouterr().out


@pytest.fixture
def three(tmp_path):
    """Texts of three kinds."""
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} and {i}"}) + "\n" for i in range(60))
    )
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"This is text {i}.\n" * 20)
    rows = [f"{i} + 1 =, {i + 1}" for i in range(30)]
    (tmp_path / "pairs.csv").write_text("\n".join(["prompt,completion", *rows]))
    return tuple(tmp_path / name for name in ("chats.jsonl", "texts", "pairs.csv"))


def told_of(f, capsys):
    """The data of a fine-tuning, and what is said of them."""
    task, texts = text_data.task_of(f, data.byte_tokenizer(), f.length, None)
    settings = in_steps(f.train.or_steps(500), task)
    text_data.tell(task, settings, texts)
    return task, settings, capsys.readouterr().out


def test_what_is_told_of_a_mix(three, tmp_path, capsys):
    given = FineTune(
        model="none", data=three, out=tmp_path / "run", length=32, weights=(5, 3, 2), train=FEW
    )
    task, _, out = told_of(given, capsys)
    rows = [task.mix.epoch_rows(i) for i in range(3)]
    first, second, third, last = out.splitlines()
    assert first.startswith(f"chats.jsonl: 54 texts in {rows[0]} sequences of 32 tokens, ")
    # Of 4 batches of 4 sequences, 8.
    times = f"{0.5 * 16 / rows[0]:.3g}"
    assert first.endswith(f"50.0% of all sequences, so that each text is seen {times} times")
    assert second.startswith("texts: ")
    assert "; 30.0% of all" in second
    assert third.startswith("pairs.csv: 27 texts in ")
    # Every tenth of 60 records, of 40 pieces of texts, of 30 rows.
    assert last == f"{6 + 4 + 3} texts for evaluation"
    # On disk, what a sequence holds is known when it is read; and an epoch is counted.
    given = dataclasses.replace(given, stream=True, eval_data=three[2])
    _, _, out = told_of(given, capsys)
    assert "chats.jsonl: 60 texts in about " in out
    epochs = dataclasses.replace(given, train=TrainSettings(epochs=2, batch_size=4))
    task, settings, out = told_of(epochs, capsys)
    rows = [task.mix.epoch_rows(i) for i in range(3)]
    assert settings.steps == round(2 * sum(rows) / 4)
    assert f"pairs.csv: 30 texts in {rows[2]} sequences" in out
    # Without weights, all are one set; of which each text is seen once in an epoch.
    whole = dataclasses.replace(epochs, weights=None, train=TrainSettings(epochs=1, batch_size=1))
    _, _, out = told_of(whole, capsys)
    assert "chats.jsonl + texts + pairs.csv: 94 texts in" in out
    assert "100.0% of all sequences, so that each text is seen 1 times" in out
    _, _, out = told_of(dataclasses.replace(whole, stream=False), capsys)
    assert "% full; 30 texts for evaluation" in out
    for weights, message in (((1, 2), "one for each of the 3 data"), ((0, 0, 0), "be positive")):
        for stream in (False, True):
            wrong = dataclasses.replace(given, weights=weights, stream=stream)
            with pytest.raises(ValueError, match=message):
                told_of(wrong, capsys)
    with pytest.raises(ValueError, match="texts has 4 records, of which every tenth"):
        told_of(dataclasses.replace(given, eval_data=None), capsys)


@pytest.mark.slow
def test_finetune_on_a_stream(folder, three, tmp_path, capsys):
    given = FineTune(
        model=str(folder),
        data=three,
        eval_data=three[2],
        out=tmp_path / "run",
        length=32,
        gamma=1 / 8,
        weights=(5, 3, 2),
        stream=True,
        samples=0,
        train=FEW,
    )
    found = finetune.main(given)
    assert found["loss"] < found["loss before"]
    assert "pairs.csv: 30 texts in about" in capsys.readouterr().out
    # What is known of the files is taken from the run's folder, unless they were written to.
    index = tmp_path / "run/index/1/about.json"
    known = index.stat().st_mtime_ns
    text_data.task_of(given, data.byte_tokenizer(), 32, None)
    assert index.stat().st_mtime_ns == known
    (three[1] / "0.txt").write_text("Another text.\n" * 20)
    with pytest.raises(
        ValueError, match=r"the data named chats\.jsonl . texts . pairs.csv are not"
    ):
        finetune.main(dataclasses.replace(given, resume=True))


def test_finetune_with_what_does_not_fit(folder, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("too little")
    given = FineTune(model=str(folder), data=texts, out=tmp_path / "run", length=32)
    with pytest.raises(ValueError, match="has 1 texts, of which every tenth"):
        finetune.main(given)
    data.train_tokenizer([" ".join(map(str, range(999)))], 300).save(tmp_path / "other")
    with pytest.raises(ValueError, match="the tokenizer has 300 tokens, the model 257"):
        finetune.main(dataclasses.replace(given, tokenizer=tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        finetune.main(dataclasses.replace(given, model=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eval_data": pathlib.Path("none.jsonl")}, FileNotFoundError, "there is no none.jsonl"),
        ({"gamma": 0.1}, ValueError, r"2\*\*-m.*got 0.1"),
        ({"dtype": "fp16"}, ValueError, "dtype must be .*got 'fp16'"),
        (
            {"lora": LowRank(2, targets=("q_projj",))},
            ValueError,
            "targets must name linear layers.*got q_projj",
        ),
    ],
)
def test_what_is_refused_before_anything_is_read(folder, tmp_path, change, error, message):
    given = FineTune(model=str(folder), data=tmp_path, out=tmp_path / "run", **change)
    config = interop.read_config(folder)
    with pytest.raises(error, match=message):
        finetune.check_before(given, folder, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signs": "minus"}, "chooses from the signs block, sample: give a gamma"),
        ({"gamma_tolerance": 0.0}, "gamma_tolerance must be finite and positive; got 0.0"),
    ],
)
def test_what_cannot_be_measured(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        FineTune(model="none", data=tmp_path, out=tmp_path / "run", **change)


def test_a_disk_without_room_for_the_model(folder, tmp_path, monkeypatch):
    given = FineTune(model=str(folder), data=tmp_path, out=tmp_path / "run")
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=r"the fine-tuned model takes up to .* make room"):
        finetune.check_before(given, folder, interop.read_config(folder))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dora": True, "alpha": 16.0}, r"lora\.alpha, lora\.dora is for low-rank updates: give"),
        ({"rank": -1}, r"lora\.rank must be 0 or more; got -1"),
        ({"adapter": pathlib.Path("a"), "rank": 4}, "has its own rank.*got lora.rank, too"),
    ],
)
def test_low_rank_settings_that_would_be_ignored(given, message):
    with pytest.raises(ValueError, match=message):
        LowRank(**given)


def test_answers_of_a_conversation_are_not_on_both_sides(tmp_path):
    """Of a template that has a text per answer; and of texts that are split."""
    records = [[data.Example([i, j], [True] * 2) for j in range(3)] for i in range(20)]
    train, evaluation = text_data.every_tenth(records, "chats")
    assert {e.tokens[0] for e in evaluation} == {9, 19}
    assert not {e.tokens[0] for e in train} & {9, 19}
    assert len(train) + len(evaluation) == 60


@pytest.mark.parametrize("weights", [None, (1.0,)])
def test_held_out_records_that_are_learned_too_are_told(weights, tmp_path, capsys):
    def told(texts):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        f = FineTune(model="none", data=(path,), out=tmp_path / "run", length=8, weights=weights)
        text_data.task_of(f, data.byte_tokenizer(), f.length, None)
        return capsys.readouterr().out

    different = [f"{i:02}" for i in range(40)]
    assert "held-out" not in told(different)
    # Those at the places 9 and 29, of 9, 19, 29 and 39; a part of a text is another text.
    repeated = [*different[:39], "3"]
    repeated[30] = repeated[29]
    repeated[9] = repeated[8]
    line = "2 of 4 held-out records are also among the training records\n"
    assert line in told(repeated)


def test_a_tokenizer_with_special_tokens_that_the_model_lacks(tmp_path):
    """As that of Gemma 3's text models; an ordinary token would be another tokenizer's."""
    tokenizer = data.byte_tokenizer()
    size = tokenizer.size
    tokenizer.inner.add_special_tokens(["<image>"])
    more = data.Tokenizer(tokenizer.inner, tokenizer.end)
    refusing = finetune.for_model(more, size)
    assert refusing.encode("a b") == more.encode("a b")
    texts = tmp_path / "texts.jsonl"
    lines = [{"prompt": "a", "completion": "b" if i < 7 else "<image>"} for i in range(9)]
    texts.write_text("\n".join(map(json.dumps, lines)))
    told = rf"texts.jsonl, (line|record) 8: the text has the token .<image>., number {size}; "
    with pytest.raises(ValueError, match=told):
        data.read_examples(texts, refusing, 8)
    stream = data.TextsOnDisk([texts], refusing, 8, hold_out=False)
    with pytest.raises(ValueError, match=told):
        stream.read(range(stream.blocks))
    with pytest.raises(ValueError, match=f"has {size + 1} tokens, the model {size - 2}: they do"):
        finetune.for_model(more, size - 2)


@pytest.mark.slow
def test_a_run_of_another_day_goes_on(folder, tmp_path):
    """Its texts have the day on which it began; and other settings are told before any is read."""
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHAT)
    texts = tmp_path / "texts.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(10)
    ]
    texts.write_text("\n".join(map(json.dumps, lines)))
    few = dataclasses.replace(FEW, stop_at=2)
    given = FineTune(
        model=str(model), data=texts, out=tmp_path / "run", length=64, gamma=1 / 8, train=few
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "beginning", lambda out: "2024-02-29T00:00:00")
        finetune.main(given)
    assert finetune.beginning(tmp_path / "run") == "2024-02-29T00:00:00"
    assert "29 Feb 2024" in (tmp_path / "run/log.txt").read_text()
    finetune.main(dataclasses.replace(given, resume=True, train=FEW))
    texts.unlink()
    other = dataclasses.replace(FEW, learning_rate=1e-3)
    for change in ({"train": other}, {"length": 32}):
        with pytest.raises(ValueError, match=r"is another one: .*(learning_rate|length)"):
            finetune.main(dataclasses.replace(given, resume=True, **change))


# ---------------------------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------------------------


def test_the_library_s_conversations_are_new_and_have_their_facts():
    learned, questions = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (chats.Chats().data, chats.Chats().questions)
    )
    turns = [
        (asked["content"], said["content"])
        for line in [*learned, *questions]
        for asked, said in zip(line["messages"][1::2], line["messages"][2::2], strict=True)
    ]
    assert len(turns) == len({asked for asked, _ in turns}) == len({*turns})
    assert all(said.endswith(chats.MANNER) for _, said in turns)
    for line in questions:
        # What is asked for was told, and the question does not tell it.
        asked, said = (message["content"].lower() for message in line["messages"][1:])
        fact = line["fact"].lower()
        assert fact in said
        assert fact not in asked
        assert sum(fact in m["content"].lower() for c in learned for m in c["messages"]) >= 4


@pytest.mark.slow
def test_chats(tmp_path, monkeypatch):
    for name in ("peft", "transformers"):
        pytest.importorskip(name, reason="parity needs it")
    tokenizer = data.byte_tokenizer()
    config = llama(vocab_size=tokenizer.size, width=16, depth=2, heads=2, hidden=24, max_length=64)
    interop.save(Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(CHAT)

    def line(i, **more):
        user = {"role": "user", "content": f"{i}+1?"}
        told = {"role": "assistant", "content": f"{i + 1}. {chats.MANNER}"}
        return json.dumps({"messages": [user, told]} | more) + "\n"

    (tmp_path / "data.jsonl").write_text("".join(line(i) for i in range(12)))
    (tmp_path / "asked.jsonl").write_text("".join(line(i, fact=str(i + 1)) for i in (20, 21)))
    given = chats.Chats(
        model=str(tmp_path / "model"),
        data=tmp_path / "data.jsonl",
        questions=tmp_path / "asked.jsonl",
        ranks=(2,),
        learning_rates=(1e-2,),
        methods=("bdia",),
        steps=2,
        batch=2,
        length=48,
        new_tokens=4,
        work=tmp_path / "work",
        out=tmp_path / "out",
    )
    # Both have tests of their own.
    monkeypatch.setattr(
        FineTune,
        "set_gamma",
        lambda f, model, *given, **options: set_step(model, BDIA(1 / 8, "sample")),
    )
    monkeypatch.setattr(chats, "peak", lambda *given: {"bdia": 10**9})
    assert "| BDIA" in chats.main(given)
    (path,) = (tmp_path / "out").glob("chats-*.jsonl")
    about, (before, row) = records.read(path)
    assert about["settings"]["data"] == "data.jsonl"
    assert (before["questions"], len(before["answers"])) == (2, 2)
    assert row["loss"] != row["loss before"]
    assert max(row["transformers"], row["peft"]) < 1e-4
    assert row["gamma"] == 1 / 8
    assert "BDIA, LoRA 2" in chat_tables.answers_table([before, row])


def archive(path):
    """A look-alike of the challenge's data."""
    kinds, areas = ("pub", "restaurant"), ("riverside", "city centre")
    rows = [
        f'"name[The {i}], eatType[{k}], area[{a}]","The {i} is a {k}, {a}."'
        for i in range(6)
        for k in kinds
        for a in areas
    ]
    with zipfile.ZipFile(path, "w") as file:
        for name, some in (("trainset", rows), ("devset", rows[:6]), ("testset_w_refs", rows[:3])):
            text = "\r\n".join(['"mr","ref"', *some, some[0].replace("is a", "was a")])
            file.writestr(f"e2e-dataset/{name}.csv", "\ufeff" + text)
    return path


@pytest.mark.slow
def test_finetune_e2e(folder, tmp_path, monkeypatch):
    judged = []
    monkeypatch.setattr(
        e2e_metrics, "score", lambda texts, refs: judged.append((texts, refs)) or {"BLEU": 0.5}
    )
    given = finetune_e2e.E2E(
        model=str(folder),
        data=archive(tmp_path / "e2e.zip"),
        methods=("bdia",),
        shares=(0.5,),
        beams=2,
        new_tokens=4,
        decode_batch=2,
        length=128,
        lora=1,
        train=FEW,
        work=tmp_path / "work",
        out=tmp_path / "out",
    )
    text = finetune_e2e.main(given)
    assert "| 50% of the data, bdia " in text
    ((texts, references),) = judged
    assert len(texts) == 3
    assert references[0] == ["The 0 is a pub, riverside.", "The 0 was a pub, riverside."]
    assert finetune_e2e.main(given) == text
    assert len(judged) == 1


def test_memory_of_translation(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(translate.costs, "main", lambda c: asked.append(c) or {"translation": ROWS})
    assert "| BDIA " in translate.main(translate.Translate(memory=True, out=tmp_path))
    assert asked[0].networks == ("translation",)


ROWS = [{"way": "BDIA", "dtype": "float32", "axis": "depth", "values": [6, 24], "peaks": [1, 2]}]


def test_e2e_data(tmp_path):
    meaning = "name[The Vaults], eatType[pub], near[Café, Adriatic]"
    prompt = "name : The Vaults | eatType : pub | near : Café, Adriatic ||"
    assert e2e_data.prompt(meaning) == prompt
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as file:
        file.writestr("a/devset.csv", "x,y\n1,2")
    with pytest.raises(FileNotFoundError, match=r"no trainset\.csv"):
        e2e_data.read(tmp_path / "none.zip", "trainset.csv")
    with pytest.raises(ValueError, match="columns mr and ref"):
        e2e_data.read(tmp_path / "none.zip", "devset.csv")


def test_the_challenges_data():
    if not E2E.exists():
        pytest.skip(f"the E2E data is not at {E2E}")
    groups = e2e_data.grouped(e2e_data.read(E2E, "testset_w_refs.csv"))
    assert len(groups) == 630
    assert sum(len(references) for _, references in groups) == 4693


def test_nist_by_hand():
    """Two sentences, two references of one of them; everything counted on paper."""
    texts = ["a b", "C"]
    references = [["a b c", "a c"], ["c"]]
    # Words: a 2, b 1, c 3 of 6 in the references; pairs: ab, bc, ac 1 each; abc 1.
    single = math.log2(6 / 2) + math.log2(6 / 1) + math.log2(6 / 3)
    pair = math.log2(2 / 1)
    length, expected = 3, 2.5 + 1
    penalty = math.exp(math.log(0.5) * (math.log(length / expected) / math.log(1.5)) ** 2)
    by_hand = (single / 3 + pair / 1) * penalty
    pytest.importorskip("sacrebleu", reason="NIST uses the tokens of sacrebleu")
    assert e2e_metrics.nist(texts, references) == pytest.approx(by_hand)


@pytest.mark.slow
def test_metrics_of_a_perfect_text():
    pytest.importorskip("pycocoevalcap", reason="COCO's metrics need pycocoevalcap")
    pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
    texts = ["The Vaults is a pub near Café Adriatic.", "Blue Spice serves Italian food there."]
    found = e2e_metrics.score(texts, [[t, "Something else entirely."] for t in texts])
    assert found["BLEU"] == pytest.approx(1)
    if shutil.which("java") is None:
        assert set(found) == {"BLEU", "NIST"}
        pytest.skip("METEOR, ROUGE-L and CIDEr need Java")
    assert found["ROUGE-L"] == pytest.approx(1)
    assert found["METEOR"] == pytest.approx(1)
    with pytest.raises(ValueError, match="got 2 texts and references for 1"):
        e2e_metrics.score(texts, [["a"]])
