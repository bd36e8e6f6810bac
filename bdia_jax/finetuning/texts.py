"""Fine-tunes a pretrained decoder (GPT-2, Llama, Qwen …) reversibly, on a text of yours.

    python -m bdia_jax.finetune --model gpt2-medium --data mine.jsonl --out runs/mine
    python -m bdia_jax.finetune --model ./Llama-3.2-1B --data mine.txt --out mine --lora.rank 8
    python -m bdia_jax.finetune --model smollm2 --data mine.jsonl --out runs/mine
    python -m bdia_jax.finetune ... --data chats.jsonl texts/ --weights 0.7 0.3     # mixed
    python -m bdia_jax.finetune ... --stream --train.epochs 3              # more than fits memory
    python -m bdia_jax.finetune ... --resume                               # continue
    python -m bdia_jax.finetune --config runs/mine/settings.yaml --out runs/again      # the same

``experiments/finetune.py`` is the same command.

The data is a file of records (``*.jsonl``, ``*.json``, ``*.csv``, ``*.tsv``, ``*.parquet``):
conversations (``messages``), of which the assistant's messages are learned, by the model's own chat
template; a ``prompt`` and a ``completion``, which is learned; an ``instruction``, ``input`` and
``output``; or a ``text``. Or it is any text. Short texts are packed into full sequences, without
attention from one to another. What comes out, ``runs/mine/model``, is a folder that
``transformers`` loads: the network that went in, with the weights of the best evaluation.

Before training, a few forward passes measure the γ that the model tolerates (``--gamma auto``): the
fewest bits per activation with which the loss rises by at most ``--gamma-tolerance``.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax import nnx

from bdia_jax import interop
from bdia_jax.data import Example, Tokenizer, load_tokenizer
from bdia_jax.finetuning import text_data
from bdia_jax.finetuning.run import (
    add_updates,
    check_fits,
    described,
    fine_tune,
    of_run,
    tell_needs,
)
from bdia_jax.finetuning.settings import STEPS
from bdia_jax.finetuning.text_settings import FineTune
from bdia_jax.nn import (
    Decoder,
    DecoderConfig,
    expand_base,
    freeze,
    generate,
    merge_lora,
    quantize_base,
)
from bdia_jax.planning.plan import as_on
from bdia_jax.train import (
    check_batch_size,
    check_run_folder,
    in_steps,
    place_on_mesh,
    placed,
)
from bdia_jax.train.command import run
from bdia_jax.train.run_folder import check_same_settings

log = logging.getLogger("bdia_jax")


def main(f: FineTune) -> dict[str, float]:
    """Runs it; validation loss and accuracy before and after."""
    if f.plan is None:
        f = dataclasses.replace(f, out=check_run_folder(f.out, f.resume))
    path = interop.packaged_model() if f.model == "smollm2" else interop.resolve(f.model)
    config = interop.read_config(path)
    about = described(f, "samples") | {"began": beginning(f.out)}
    if f.plan is None:
        check_same_settings(f.out, f.train, {"fine-tuning": about})
    check_before(f, path, config)
    length = min(f.length, config.max_length)
    if length < f.length:
        print(f"--length {f.length} is more than the model knows: sequences have {length} tokens")
    tokenizer = load_tokenizer(f.tokenizer) if f.tokenizer else tokenizer_of(path)
    tokenizer = for_model(tokenizer, config.vocab_size)
    if (template := interop.load_chat_template(path)) is not None:
        # Some write the day into each text: the run's data are those of the day when it began.
        now = datetime.datetime.fromisoformat(about["began"])
        template = dataclasses.replace(template, now=now)
    task, eval_texts = text_data.task_of(f, tokenizer, length, template)
    check_batch_size(task, f.train.batch_size)
    f = dataclasses.replace(f, train=in_steps(f.train.or_steps(STEPS), task))
    text_data.tell(task, f.train, eval_texts)
    if f.plan is not None:
        return tell_needs(f, lambda: made(f, path, config, length), task, length)
    model = load(f, path)
    tell = teller(tokenizer, eval_texts[: f.samples]) if f.samples else None
    found = fine_tune(f, model, task, about, metric="loss", on_evaluation=tell)
    if f.lora:
        save_adapter(model, f.out / "adapter", path)
        expand_base(model)
        merge_lora(model)
    interop.save(model, f.out / "model", like=path)
    if f.tokenizer is not None:
        tokenizer.save(f.out / "model")
    before, after = found.before, found.after
    print(
        f"{found.told}: validation loss {before['loss']:.4f} -> {after['loss']:.4f}, "
        f"token accuracy {before['accuracy']:.2%} -> {after['accuracy']:.2%}. "
        f"Saved to {f.out / 'model'}"
    )
    for prompt, answer in samples(model, tokenizer, eval_texts[:1]):
        print(f"{prompt}\n  -> {answer}")
    return found.losses


def beginning(out: pathlib.Path) -> str:
    """When the run in a folder began; now, if there is none."""
    now = datetime.datetime.now().isoformat(timespec="seconds")
    # That of another command has no such time; it is refused in a moment.
    return of_run(out).get("began", now)


def check_before(f: FineTune, path: pathlib.Path, config: DecoderConfig) -> None:
    """Refuses what can be refused before data and model are read.

    Raises:
      FileNotFoundError: for data that are not there.
      ValueError: for settings that do not fit the model, and a disk without room for it.
    """
    given = [*text_data.paths_of(f), f.eval_data, f.lora.adapter]
    if missing := [str(p) for p in given if p is not None and not p.expanduser().exists()]:
        raise FileNotFoundError(f"what is given must exist; there is no {', '.join(missing)}")
    check_fits(f, lambda: made(f, path, config, min(f.length, config.max_length)))


def for_model(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """A tokenizer that refuses texts with tokens that a model of ``size`` tokens does not have.

    Raises:
      ValueError: for a tokenizer with ordinary tokens that the model does not have.
    """
    surplus = [number for number in range(size, tokenizer.size) if number not in tokenizer.special]
    if surplus:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, the model {size}: they do not belong "
            "together; give the model's tokenizer"
        )
    return dataclasses.replace(tokenizer, known=size)


def settings_of(f: FineTune, path: pathlib.Path) -> dict[str, Any]:
    """Those of the model that do not come from its folder."""
    half = f.lora and interop.stored_dtype(path) == "bfloat16"
    names = ("ffn_chunk", "keep_in", "narrow_cotangents", "attention")
    own = {name: getattr(f, name) for name in names}
    return (
        f.of_network | own | {"param_dtype": f.param_dtype or ("bfloat16" if half else "float32")}
    )


def made(f: FineTune, path: pathlib.Path, config: DecoderConfig, length: int) -> Decoder:
    """The model with what is trained of it, and any weights; for what its shapes tell."""
    config = dataclasses.replace(config, **settings_of(f, path))
    model = Decoder(as_on(f.plan, config, length, packed=True), rngs=nnx.Rngs(0))
    if f.quantize is not None:
        quantize_base(model, f.quantize)
    return with_updates(f, model, path)


def load(f: FineTune, path: pathlib.Path) -> Decoder:
    """The model, with what is trained of it; on the devices that it is trained on."""
    place = placed(f.train.mesh)
    model = interop.load(path, quantize=f.quantize, place=place, **settings_of(f, path))
    with_updates(f, model, path, print)
    place_on_mesh(model, f.train.mesh)
    return model


def with_updates(
    f: FineTune,
    model: Decoder,
    path: pathlib.Path,
    tell: Callable[[str], None] = lambda told: None,
) -> Decoder:
    """The model, of which low-rank updates are trained, or all weights, or all but some."""
    if not add_updates(f, model, path, tell) and f.freeze_embedding:
        freeze(model, "^(embedding|positions|head)$")
    return model


def save_adapter(model: Decoder, folder: pathlib.Path, like: pathlib.Path) -> None:
    """Keeps the updates beside the merged model, where peft has such updates."""
    try:
        interop.save_adapter(model, folder, like=like)
        print(f"the low-rank updates alone are in {folder}")
    except ValueError as error:
        print(f"no adapter was written: {error}")


def tokenizer_of(path: pathlib.Path) -> Tokenizer:
    """The tokenizer in a model's folder, or in its GGUF file."""
    return interop.gguf.load_tokenizer(path) if path.is_file() else load_tokenizer(path)


def teller(tokenizer: Tokenizer, examples: Sequence[Example]) -> Callable[[nnx.Module, int], None]:
    """What tells, at an evaluation, how the network goes on after some prompts."""

    def tell(model: nnx.Module, step: int) -> None:
        for prompt, answer in samples(model, tokenizer, examples):
            log.info("step %d, sample: %s -> %s", step, prompt, answer)

    return tell


def samples(
    model: Any, tokenizer: Tokenizer, examples: Sequence[Example]
) -> Iterator[tuple[str, str]]:
    """The prompts of some texts, and what the network makes of them, in quotes."""
    # A tokenizer may have special tokens that the model does not know.
    ends = {token for token in tokenizer.ends if token < model.config.vocab_size}
    for example in examples:
        given = [t for t, _ in itertools.takewhile(lambda pair: not pair[1], zip(*example))]
        if len(given) <= len(tokenizer.begin):
            # A text, of which nothing is a prompt: its first half, or some of it.
            given = example.tokens[: max(len(given) + 1, min(8, len(example.tokens) // 2))]
        room = min(60, model.config.max_length - len(given))
        if room < 1:
            log.info("no sample: a prompt of %d tokens leaves no room for more", len(given))
            continue
        (told,) = generate(model, [given], room, end=ends)
        yield repr(tokenizer.decode(given)), repr(tokenizer.decode(told))


def command() -> None:
    """Runs :func:`main` from the command line."""
    run(main, FineTune, __doc__, told=logging.INFO)
