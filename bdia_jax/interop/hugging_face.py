"""Hugging Face folders of GPT-2, Llama, Qwen 2 and Qwen 3: read, and written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.files import write_json
from bdia_jax.nn.decoder import Decoder, DecoderConfig, RotaryScaling, llama
from bdia_jax.nn.lora import Frozen
from bdia_jax.nn.stack import DTYPES, ReversibleSettings, check_dtype

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
SHARD_BYTES = 2 * 2**30
"""Files are written up to this size, one in memory at a time."""


class FolderError(ValueError):
    """A folder of weights is incomplete, or is not what its config.json says."""


def read_config(folder: str | os.PathLike) -> DecoderConfig:
    """The configuration of a Hugging Face folder.

    Raises:
      FileNotFoundError: without config.json.
      FolderError: for another architecture, or settings of one that there is no equivalent of.
    """
    return _config(_read_json(pathlib.Path(folder) / "config.json"))


def load(folder: str | os.PathLike, **settings: Any) -> Decoder:
    """A decoder with the weights of a Hugging Face folder.

    Of the weights there is one copy in memory, and the largest stacked array a second time.

    Args:
      folder: with ``config.json`` and ``*.safetensors``; or a name on the Hugging Face hub, from
        where it is downloaded (to the cache of ``huggingface_hub``).
      **settings: of :class:`bdia_jax.nn.DecoderConfig`, in place of the folder's: ``method``,
        ``dtype``, ``param_dtype``, ``dropout``, …

    Raises:
      FileNotFoundError: for a folder that does not exist, or has no weights.
      FolderError: for a folder that does not fit, with the name of the tensor.
    """
    folder = resolve(folder)
    config = dataclasses.replace(read_config(folder), **settings)
    make = lambda: nnx.split(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param, ...)  # noqa: E731
    graph, abstract, _ = jax.eval_shape(make)
    rest = jax.jit(lambda: make()[2])()
    with _Tensors(folder) as tensors:
        layout = _layout(config, tensors.names())
        state = []
        for path, leaf in nnx.to_flat_state(abstract):
            name = ".".join(map(str, path))
            state.append((path, leaf.replace(_assemble(name, leaf, layout.pop(name), tensors))))
        tensors.check_all_used()
    return nnx.merge(graph, nnx.from_flat_state(state), rest)


def save(
    model: Decoder,
    folder: str | os.PathLike,
    *,
    dtype: str | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes a folder that ``transformers`` loads, files first under other names.

    Args:
      model: without low-rank updates (:func:`bdia_jax.nn.merge_lora`).
      folder: is made; files of the same names are overwritten.
      dtype: float32, bfloat16 or float16; by default that of the parameters.
      config: contents of a config.json that the model was loaded from, to be kept where they do
        not contradict.

    Raises:
      ValueError: for a configuration that no family has, or an unknown dtype.
    """
    from safetensors.numpy import save_file

    written = _config_json(model.config) if config is None else {**config}
    theirs, ours = _config(written), _as_written(model.config)
    if theirs != ours:
        raise ValueError(f"config is of another model: {theirs}; this one is {ours}")
    dtype = dtype or model.config.param_dtype
    check_dtype(dtype)
    written |= {"dtype": dtype, "torch_dtype": dtype}
    weights = nnx.Any(nnx.Param, Frozen)
    flat = {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(model, weights))
    }
    layout = _layout(model.config, None)
    if set(layout) != set(flat):
        raise ValueError(
            f"the model has other parameters than its configuration: "
            f"{', '.join(sorted(set(layout) ^ set(flat)))}; merge low-rank updates before saving"
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[pathlib.Path] = []
    index: dict[str, int] = {}
    total = 0

    def write(shard: dict[str, np.ndarray]) -> None:
        files.append(folder / f"model-{len(files) + 1:05d}.safetensors.tmp")
        save_file(shard, files[-1], metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, len(files)))

    shard: dict[str, np.ndarray] = {}
    for name, tensor in _tensors(flat, layout, DTYPES[dtype]):
        if shard and sum(a.nbytes for a in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write(shard)
            shard = {}
        shard[name] = tensor
        total += tensor.nbytes
    write(shard)
    count = len(files)
    names = {i + 1: f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
    if count == 1:
        names = {1: "model.safetensors"}
        # Of an earlier model in this folder.
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    else:
        write_json(
            folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": total},
                "weight_map": {name: names[i] for name, i in sorted(index.items())},
            },
        )
    for i, file in enumerate(files):
        file.replace(folder / names[i + 1])
    write_json(folder / "config.json", written)


def resolve(folder: str | os.PathLike) -> pathlib.Path:
    """The folder itself, or where a model of the hub was downloaded to."""
    path = pathlib.Path(folder).expanduser()
    if path.is_dir():
        return path
    parts = str(folder).split("/")
    if path.is_absolute() or len(parts) > 2 or not all(parts) or parts[0] in (".", ".."):
        raise FileNotFoundError(f"there is no folder {path}")
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(
            snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", "*.txt"])
        )
    except Exception as error:
        raise FileNotFoundError(
            f"{folder} is no folder, and could not be downloaded from the Hugging Face hub: {error}"
        ) from error


# ---------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------


def _config(c: dict[str, Any]) -> DecoderConfig:
    family = c.get("model_type")
    if family not in FAMILIES:
        raise FolderError(f"model_type must be one of {', '.join(FAMILIES)}; got {family!r}")
    try:
        return _gpt2_config(c) if family == "gpt2" else _llama_config(family, c)
    except KeyError as error:
        raise FolderError(f"config.json of a {family} model lacks {error}") from None


def _gpt2_config(c: dict[str, Any]) -> DecoderConfig:
    _expect(c, "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    _expect(c, "scale_attn_weights", (True,), True)
    _expect(c, "scale_attn_by_inverse_layer_idx", (False,), False)
    _expect(c, "add_cross_attention", (False,), False)
    return DecoderConfig(
        vocab_size=c["vocab_size"],
        max_length=c["n_positions"],
        width=c["n_embd"],
        depth=c["n_layer"],
        heads=c["n_head"],
        hidden=c.get("n_inner") or 4 * c["n_embd"],
        norm_epsilon=c.get("layer_norm_epsilon", 1e-5),
        tied_head=c.get("tie_word_embeddings", True),
    )


def _llama_config(family: str, c: dict[str, Any]) -> DecoderConfig:
    _expect(c, "hidden_act", ("silu",), "silu")
    _expect(c, "use_sliding_window", (False, None), False)
    _expect(c, "pretraining_tp", (1,), 1)
    heads = c["num_attention_heads"]
    qkv_bias = {
        "llama": c.get("attention_bias", False),
        "qwen2": True,
        "qwen3": c.get("attention_bias", False),
    }[family]
    theta, scaling = _rope(c)
    return llama(
        vocab_size=c["vocab_size"],
        max_length=c["max_position_embeddings"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        hidden=c["intermediate_size"],
        norm_epsilon=c.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        out_bias=qkv_bias and family != "qwen2",
        ffn_bias=family == "llama" and c.get("mlp_bias", False),
        qk_norm=family == "qwen3",
        tied_head=c.get("tie_word_embeddings", False),
    )


def _rope(c: dict[str, Any]) -> tuple[float, RotaryScaling | None]:
    """As transformers writes them since version 5, or as before."""
    rope = c.get("rope_parameters") or {
        "rope_theta": c.get("rope_theta", 10_000.0),
        **(c.get("rope_scaling") or {}),
    }
    theta = float(rope.get("rope_theta", c.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise FolderError(f"rope_type must be default or llama3; got {kind!r}")
    return theta, RotaryScaling(
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )


def _expect(c: dict[str, Any], name: str, allowed: tuple, default: Any) -> None:
    if c.get(name, default) not in allowed:
        raise FolderError(
            f"config.json: {name} must be {' or '.join(map(str, allowed))}; got {c[name]!r}"
        )


def _family(c: DecoderConfig) -> str:
    """The family that has such networks."""
    plain = (c.norm, c.positions, c.feed_forward)
    biases = (c.qkv_bias, c.out_bias, c.ffn_bias)
    if plain == ("layer", "learned", "gelu"):
        square = c.num_kv_heads == c.heads and c.heads * c.size_of_head == c.width
        if all(biases) and square and not c.qk_norm:
            return "gpt2"
    if plain == ("rms", "rotary", "swiglu"):
        if c.qk_norm and biases in ((True, True, False), (False, False, False)):
            return "qwen3"
        if not c.qk_norm and biases == (True, False, False):
            return "qwen2"
        if not c.qk_norm and c.qkv_bias == c.out_bias:
            return "llama"
    raise ValueError(f"no family of {', '.join(FAMILIES)} has such networks; got {c}")


def _as_written(c: DecoderConfig) -> DecoderConfig:
    """Of a configuration, what a config.json holds; the rest by default."""
    default = DecoderConfig()
    training = (field.name for field in dataclasses.fields(ReversibleSettings))
    ours = ("dropout", *training, "attention", "ffn_chunk", "dtype", "param_dtype")
    return dataclasses.replace(
        c,
        kv_heads=c.num_kv_heads if c.positions == "rotary" else None,
        head_dim=c.size_of_head if c.positions == "rotary" else None,
        hidden=c.hidden or 4 * c.width,
        **{name: getattr(default, name) for name in ours},
    )


def _config_json(c: DecoderConfig) -> dict[str, Any]:
    family = _family(c)
    hidden = c.hidden or 4 * c.width
    common = {
        "model_type": family,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": c.max_length,
            "n_embd": c.width,
            "n_layer": c.depth,
            "n_head": c.heads,
            "n_inner": hidden,
            "layer_norm_epsilon": c.norm_epsilon,
            "activation_function": "gelu_new",
        }
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": "default"}
    if (s := c.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_length,
        }
    return common | {
        "architectures": [names[family]],
        "max_position_embeddings": c.max_length,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.size_of_head,
        "intermediate_size": hidden,
        "rms_norm_eps": c.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": c.qkv_bias,
        **({"mlp_bias": c.ffn_bias} if family == "llama" else {}),
        # Both ways of saying it: since version 5 of transformers, and before.
        "rope_parameters": rope,
        "rope_theta": c.rope_theta,
        "rope_scaling": None if c.rope_scaling is None else rope,
    }


# ---------------------------------------------------------------------------------------------
# Which tensor is which
# ---------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Where a parameter of ours is found."""

    name: str
    """Of the tensor; with ``{}`` for the number of the block."""
    transposed: bool = False
    part: tuple[int, int] | None = None
    """Third of the last axis: which, of how many."""


def _layout(config: DecoderConfig, names: set[str] | None) -> dict[str, _Source]:
    """Parameter of ours to tensor; ``names`` are those that a folder has, if it is read."""
    layout = _gpt2_layout(names) if _family(config) == "gpt2" else _llama_layout(config)
    if not config.tied_head:
        layout["head"] = _Source("lm_head.weight")
    return layout


def _gpt2_layout(names: set[str] | None) -> dict[str, _Source]:
    # The files of the original models were written by the network without its head.
    prefix = "" if names is not None and "wte.weight" in names else "transformer."
    block, ours = f"{prefix}h.{{}}.", "blocks.stacked."
    layout = {
        "embedding": _Source(f"{prefix}wte.weight"),
        "positions": _Source(f"{prefix}wpe.weight"),
        "norm.scale": _Source(f"{prefix}ln_f.weight"),
        "norm.bias": _Source(f"{prefix}ln_f.bias"),
    }
    for norm, theirs in (("attention_norm", "ln_1"), ("ffn_norm", "ln_2")):
        layout[f"{ours}{norm}.scale"] = _Source(f"{block}{theirs}.weight")
        layout[f"{ours}{norm}.bias"] = _Source(f"{block}{theirs}.bias")
    linear = {"attention.out": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}
    for name, theirs in linear.items():
        layout[f"{ours}{name}.kernel"] = _Source(f"{block}{theirs}.weight")
        layout[f"{ours}{name}.bias"] = _Source(f"{block}{theirs}.bias")
    for i, name in enumerate("qkv"):
        for kind, theirs in (("kernel", "weight"), ("bias", "bias")):
            layout[f"{ours}attention.{name}.{kind}"] = _Source(
                f"{block}attn.c_attn.{theirs}", part=(i, 3)
            )
    return layout


def _llama_layout(config: DecoderConfig) -> dict[str, _Source]:
    block, ours = "model.layers.{}.", "blocks.stacked."
    layout = {
        "embedding": _Source("model.embed_tokens.weight"),
        "norm.scale": _Source("model.norm.weight"),
        f"{ours}attention_norm.scale": _Source(f"{block}input_layernorm.weight"),
        f"{ours}ffn_norm.scale": _Source(f"{block}post_attention_layernorm.weight"),
    }
    linear = {
        "attention.q": ("self_attn.q_proj", config.qkv_bias),
        "attention.k": ("self_attn.k_proj", config.qkv_bias),
        "attention.v": ("self_attn.v_proj", config.qkv_bias),
        "attention.out": ("self_attn.o_proj", config.out_bias),
        "ffn.gate": ("mlp.gate_proj", config.ffn_bias),
        "ffn.up": ("mlp.up_proj", config.ffn_bias),
        "ffn.down": ("mlp.down_proj", config.ffn_bias),
    }
    for name, (theirs, bias) in linear.items():
        layout[f"{ours}{name}.kernel"] = _Source(f"{block}{theirs}.weight", transposed=True)
        if bias:
            layout[f"{ours}{name}.bias"] = _Source(f"{block}{theirs}.bias")
    if config.qk_norm:
        for name in "qk":
            layout[f"{ours}attention.{name}_norm.scale"] = _Source(
                f"{block}self_attn.{name}_norm.weight"
            )
    return layout


class _Tensors:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._files, self._used = folder, contextlib.ExitStack(), set()

    def __enter__(self) -> _Tensors:
        from safetensors import safe_open

        whole = self._folder / "model.safetensors"
        paths = [whole] if whole.exists() else sorted(self._folder.glob("*.safetensors"))
        index = self._folder / "model.safetensors.index.json"
        if index.exists():
            named = sorted(set(_read_json(index)["weight_map"].values()))
            paths = [self._folder / name for name in named]
            if missing := [path.name for path in paths if not path.exists()]:
                raise FolderError(f"{index} names {', '.join(missing)}, which are not there")
        if not paths:
            raise FileNotFoundError(f"there are no *.safetensors in {self._folder}")
        self._where = {}
        for path in paths:
            try:
                file = self._files.enter_context(safe_open(path, framework="flax"))
            except Exception as error:
                raise FolderError(f"{path} is damaged, or no safetensors file: {error}") from error
            self._where |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_) -> None:
        self._files.close()

    def names(self) -> set[str]:
        return set(self._where)

    def get(self, name: str) -> np.ndarray:
        if name not in self._where:
            raise FolderError(f"{self._folder}: the tensor {name} is missing")
        self._used.add(name)
        return np.asarray(self._where[name].get_tensor(name))

    def check_all_used(self) -> None:
        # Masks that old files hold, and a head that repeats the embedding.
        known = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq", "lm_head.weight")
        unknown = [n for n in sorted(self.names() - self._used) if not n.endswith(known)]
        if unknown:
            raise FolderError(
                f"{self._folder}: tensors that no parameter is made from: {', '.join(unknown)}"
            )


def _assemble(name: str, leaf, source: _Source, tensors: _Tensors) -> jax.Array:
    """A parameter of ours, on the device, in its own dtype."""

    def one(theirs: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = tensors.get(theirs)
        if source.transposed:
            tensor = tensor.T
        if source.part is not None:
            which, count = source.part
            size = tensor.shape[-1] // count
            tensor = tensor[..., which * size : (which + 1) * size]
        if tensor.shape != shape:
            raise FolderError(
                f"the tensor {theirs}, for {name}, should give an array of shape {shape}; "
                f"it gives {tensor.shape}"
            )
        return tensor

    if "{}" not in source.name:
        return jnp.asarray(one(source.name, leaf.shape), leaf.dtype)
    stacked = np.empty(leaf.shape, leaf.dtype)
    for i in range(len(stacked)):
        stacked[i] = one(source.name.format(i), leaf.shape[1:])
    return jnp.asarray(stacked)


def _tensors(
    flat: dict[str, jax.Array], layout: dict[str, _Source], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a folder."""
    by_name: dict[str, list[tuple[_Source, str]]] = {}
    for ours, source in layout.items():
        by_name.setdefault(source.name, []).append((source, ours))
    for name, parts in by_name.items():
        parts.sort(key=lambda part: part[0].part or (0, 1))

        def tensor(pick: Callable[[jax.Array], jax.Array], parts=parts) -> np.ndarray:
            arrays = [np.asarray(pick(flat[ours]).astype(dtype)) for _, ours in parts]
            arrays = [a.T if source.transposed else a for a, (source, _) in zip(arrays, parts)]
            return np.ascontiguousarray(np.concatenate(arrays, axis=-1))

        if "{}" not in name:
            yield name, tensor(lambda a: a)
            continue
        for i in range(len(flat[parts[0][1]])):
            yield name.format(i), tensor(lambda a, i=i: a[i])


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except ValueError as error:
        raise FolderError(f"{path} is no JSON: {error}") from error
