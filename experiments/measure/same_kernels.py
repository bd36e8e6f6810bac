"""Does a GPU's compiler make the same kernels of a block in both passes? No GPU is needed.

    python experiments/measure/same_kernels.py                     # with jax[cuda]
    python experiments/measure/same_kernels.py --devices h100 --models gpt2

A step is taken back exactly if the backward pass recomputes the block's update to the last bit. On
a device that is there, that is run, and counted (``exactness.py``). Of one that is not, the
compiled program can be read: every kernel of the pinned block in the loop of the forward pass is
looked for in the loop of the backward pass. *Same*: the same instructions on the same shapes and
layouts, with the same settings of the compiler (tiles of matrix products, for instance). Any other
may round otherwise. For comparison, the same where the block is between barriers only, which say
nothing of layouts, and without any.

This is no proof: which kernel a library picks at run time is not in the program.

Writes same-kernels-gpus.jsonl. The exit status is 1 if a kernel of the pinned block is another one,
or nothing could be compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import re
import sys
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax import online, pinning
from bdia_jax.nn import DecoderConfig, ViTConfig, llama
from bdia_jax.planning import targets
from bdia_jax.train import command
from bdia_jax.train import mesh as meshes
from measure import records, sources
from measure.networks import KINDS

DEPENDS = (
    *sources.CORE,
    *sources.MODELS,
    *("bdia_jax/planning/targets.py", "bdia_jax/train/mesh.py"),
    "experiments/measure/same_kernels.py",
)

LLAMA = llama(
    vocab_size=4096,
    max_length=512,
    width=1024,
    depth=6,
    heads=16,
    kv_heads=4,
    hidden=4096,
    tied_head=True,
)
MODELS: dict[str, Any] = {
    "vit": ViTConfig(dropout=0.1),
    "gpt2": DecoderConfig(vocab_size=4096, max_length=512, width=1024, depth=6, heads=16),
    "llama": LLAMA,
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
}
CASES = (
    ("vit", {"dtype": "float32"}),
    ("vit", {"dtype": "bfloat16"}),
    ("vit", {"dtype": "bfloat16", "parts_as_steps": True}),
    ("gpt2", {"dtype": "float32"}),
    ("gpt2", {"dtype": "bfloat16", "attention": "chunked", "dropout": 0.1}),
    ("gpt2", {"dtype": "bfloat16", "attention": "cudnn"}),
    ("llama", {"dtype": "bfloat16", "attention": "cudnn", "ffn_chunk": 128}),
    ("llama", {"dtype": "bfloat16", "attention": "cudnn", "parts_as_steps": True}),
    ("qwen3", {"dtype": "bfloat16", "attention": "chunked"}),
)


@dataclasses.dataclass(frozen=True)
class SameKernels:
    """Does a GPU's compiler make the same kernels of a block in both passes?"""

    devices: tuple[str, ...] = ("h100", "a100-40", "rtx-4090", "h100:8")
    """To compile for; of bdia_jax.planning.targets. On several, weights are fully sharded."""
    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)
    """Which."""
    out: pathlib.Path | None = None
    """Folder for the results; by default runs/results."""


FENCES: dict[str, Callable[[Any], Any]] = {
    "fences": pinning.fence,
    "barriers only": pinning.barrier,
    "nothing": lambda tree: tree,
}
"""What is around the block."""


def main(s: SameKernels) -> None:
    """Compiles everything; the table."""
    rows = []
    for name in s.devices:
        devices = targets.devices(name)
        for model, settings in CASES:
            if model not in s.models:
                continue
            config = dataclasses.replace(MODELS[model], **settings)
            try:
                found = {
                    around: compare(compiled_text(config, devices, fence))
                    for around, fence in FENCES.items()
                }
            except jax.errors.JaxRuntimeError as error:
                # Without a GPU to try tiles on, XLA finds none for some products.
                found = {}
                print(f"{name}, {model} {settings}: not compiled: {str(error)[:100]}", flush=True)
            rows.append({"device": name, "model": model, "settings": settings, "found": found})
            if not found:
                continue
            fenced = found["fences"]
            same = f"{fenced['same']} of {fenced['kernels']} are the same"
            print(f"{name}, {model} {settings}: {same}", flush=True)
            for other in fenced["others"]:
                print(f"  another: {other}", flush=True)
    path = records.write("same-kernels", rows, DEPENDS, settings=s, out=s.out, device="gpus")
    print(f"\n{table(rows)}\n\nSee {path}")
    compiled = [row["found"] for row in rows if row["found"]]
    if not compiled or any(found["fences"]["other"] for found in compiled):
        sys.exit(1)


def compiled_text(config, devices: Sequence[jax.Device], fence=pinning.fence) -> str:
    """The compiled gradient of a network's loss, as text; ``fence`` is around its blocks."""
    mesh = meshes.parse_mesh(f"fsdp={len(devices)}", devices) if len(devices) > 1 else None
    model = nnx.eval_shape(lambda: KINDS[type(config)](config, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, inputs):
        model, key = meshes.merged(mesh, graph, params, rest), jax.random.key(0)
        if isinstance(config, ViTConfig):
            return jnp.sum(model(inputs, key=key) ** 2)
        return model.loss(inputs, inputs, key=key).loss

    batch = 8 * len(devices)
    if isinstance(config, ViTConfig):
        inputs = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, 3), jnp.float32)
    else:
        inputs = jax.ShapeDtypeStruct((batch, config.max_length), jnp.int32)
    weights = data = jax.sharding.SingleDeviceSharding(devices[0])
    others = weights
    if mesh is not None:
        weights, others, data = (
            meshes.state_shardings(mesh, params),
            meshes.replicated(mesh),
            meshes.batch_sharding(mesh),
        )
    gradient = jax.jit(jax.grad(loss), in_shardings=(weights, others, data), out_shardings=weights)
    replaced = functools.partial(unittest.mock.patch.object, attribute="fence", new=fence)
    with replaced(pinning), replaced(online):
        return gradient.lower(params, rest, inputs).compile().as_text()


# ---------------------------------------------------------------------------------------------
# Reading a compiled program
# ---------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    origin: str
    """Where in the traced function it comes from (op_name)."""


Program = dict[str, list[Instruction]]
"""Computations by name."""

PINNED = re.compile(r"/jvp\(\)/while/body/closed_call/jvp\(\)/")
BACKWARD = re.compile(r"transpose\(jvp\(\)\)/while/body/closed_call/")
KERNELS = ("fusion", "custom-call", "dot", "reduce", "sort", "convolution")
CALLED = re.compile(r"(calls|to_apply|body|condition)=%?([\w.\-]+)")
NOISE = re.compile(
    r', metadata=\{[^}]*\}|, control-predecessors=\{[^}]*\}|"(operation_queue_id|'
    r'wait_on_operation_queues|force_earliest_schedule|reification_cost)":(\[.*?\]|"[^"]*"|\w+),?'
)


def parse(text: str) -> Program:
    """The computations of a program in XLA's text form."""
    program: Program = {}
    inside: list[Instruction] | None = None
    for line in text.splitlines():
        if header := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = program.setdefault(header[1], [])
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (match := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            inside.append(_instruction(match[1], line[match.end() :]))
    return program


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opcode = rest[: rest.index("(")]
    end = len(opcode) + _closing(rest[len(opcode) :])
    origin = re.search(r'op_name="([^"]*)"', rest)
    return Instruction(
        name,
        shape,
        opcode,
        re.findall(r"%([\w.\-]+)", rest[len(opcode) : end]),
        rest[len(opcode) : end] * (opcode in ("parameter", "constant")) + rest[end:],
        origin[1] if origin else "",
    )


def _closing(text: str) -> int:
    """Where the first parenthesis ends."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"a parenthesis is open: {text[:80]}")


def reachable(program: Program, name: str) -> Iterator[Instruction]:
    """The instructions of a computation and of the loops in it; those of a fusion are one."""
    for instruction in program[name]:
        yield instruction
        if instruction.opcode == "while":
            yield from reachable(program, _called(instruction)["body"])
        elif instruction.opcode == "call":
            yield from reachable(program, _called(instruction)["to_apply"])


def _called(instruction: Instruction) -> dict[str, str]:
    return dict(CALLED.findall(instruction.attributes))


def canonical(program: Program, name: str) -> str:
    """A computation without the names in it."""
    numbers = {instruction.name: str(i) for i, instruction in enumerate(program[name])}
    return "\n".join(
        kernel(program, name, i) + " " + " ".join(numbers.get(o, o) for o in i.operands)
        for i in program[name]
    )


def kernel(program: Program, inside: str, i: Instruction) -> str:
    """An instruction without names: what is computed, from what shapes and layouts, and how."""
    shapes = {other.name: other.shape for other in program[inside]}
    called = "\n".join(canonical(program, name) for _, name in CALLED.findall(i.attributes))
    attributes = NOISE.sub("", CALLED.sub("", i.attributes))
    given = ",".join(shapes.get(o, "") for o in i.operands)
    return f"{i.shape} {i.opcode}({given}){attributes}\n{called}"


def compare(text: str) -> dict[str, Any]:
    """Of the kernels of the block in the forward pass: how many the backward pass has, too.

    And those that it does not have: their names, shapes, and where they come from.

    Raises:
      ValueError: for a program in which the loops over blocks, or the block, are not found.
    """
    program = parse(text)
    loops = [_called(i)["body"] for name in program for i in program[name] if i.opcode == "while"]

    def share(body: str, pattern: re.Pattern) -> int:
        return sum(pattern.search(i.origin) is not None for i in program[body])

    if not loops:
        raise ValueError("the program has no loops, and none over blocks")
    up = max(loops, key=lambda body: share(body, PINNED) * (share(body, BACKWARD) == 0))
    down = max(loops, key=lambda body: share(body, BACKWARD))
    places = {id(i): name for name, all_of_it in program.items() for i in all_of_it}

    def kernels(body: str, only: re.Pattern | None = None):
        own = {id(i) for i in program[body]}
        for i in reachable(program, body):
            # All that is in loops within the loop is the block's.
            if i.opcode in KERNELS and not (only and id(i) in own and not only.search(i.origin)):
                yield i, kernel(program, places[id(i)], i)

    there = {what for _, what in kernels(down)}
    found = [(i, what in there) for i, what in kernels(up, PINNED)]
    if not found or up == down:
        raise ValueError(
            "the block was not found in the loops of both passes: JAX or XLA names things otherwise"
        )
    others = [f"{i.name}: {i.shape} {i.origin}" for i, same in found if not same]
    same = len(found) - len(others)
    return {"kernels": len(found), "same": same, "other": len(others), "others": others}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per case."""
    counted = ("kernels", "same", "other")
    lines = []
    for row in rows:
        settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
        cells = ["not compiled"] + [""] * (len(counted) + len(FENCES) - 2)
        if row["found"]:
            fenced, *less = row["found"].values()
            cells = [str(fenced[name]) for name in counted]
            cells += [f"{found['other']} of {found['kernels']}" for found in less]
        lines.append([row["device"], row["model"], settings, *cells])
    header = [
        "compiled for",
        "model",
        "settings",
        *counted,
        *(f"other, {around}" for around in list(FENCES)[1:]),
    ]
    return records.markdown(header, lines)


if __name__ == "__main__":
    command.run(main, SameKernels, __doc__, told=logging.WARNING)
