"""Faults around the core: γ, training, files, models, plans."""

from _fault import Fault

ACCUMULATION = ("test_accumulation",)
IN_BACKWARD = ("test_in_backward",)
GAP = ("test_gap",)
GAMMA = ("test_gamma",)
CHATS = ("test_chats",)
TOKENIZERS = ("test_tokenizers", "test_text")
FILES = ("test_text_files", "test_text")
MIX = ("test_mix",)
FEED = ("test_feed",)
FOLDERS = ("test_model_folders", "test_hugging_face")
GGUF = ("test_gguf::test_parity", "test_gguf")
PLANS = ("test_planning",)
TRAIN = ("test_train",)
WEIGHTS = ("test_weights",)

FAULTS = [
    # A training step, and sums over micro-batches.
    Fault(
        "means of micro-batches are summed",
        "train/step",
        "t + sums.weight.astype(t.dtype) * g",
        "t + g",
        ACCUMULATION,
    ),
    Fault(
        "gradients are summed in bfloat16",
        "train/step",
        "jnp.promote_types(p.dtype, jnp.float32)",
        "p.dtype",
        ACCUMULATION,
    ),
    Fault(
        "divided by the number of micro-batches",
        "train/step",
        "weight = sums.weight + (sums.weight == 0)",
        "weight = jnp.float32(recipe.settings.accumulate)",
        ACCUMULATION,
    ),
    Fault(
        "0 / 0 without weight",
        "train/step",
        "weight = sums.weight + (sums.weight == 0)",
        "weight = sums.weight",
        ACCUMULATION,
    ),
    Fault(
        "micro-batches share a key",
        "train/step",
        "jax.random.split(jax.random.fold_in(model_key, state.step), settings.accumulate)",
        "jnp.stack([jax.random.fold_in(model_key, state.step)] * settings.accumulate)",
        (*ACCUMULATION, *TRAIN),
    ),
    Fault(
        "every step has the same key",
        "train/step",
        "jax.random.fold_in(model_key, state.step)",
        "jax.random.fold_in(model_key, 0)",
        TRAIN,
    ),
    Fault(
        "a step that went wrong is taken",
        "train/step",
        "jnp.where(fine, new, old)",
        "new",
        (*TRAIN, *WEIGHTS),
    ),
    # Not here: a step that takes an inexact inverse for a right one. By then, the guard has made
    # its gradient NaN, so that nothing changes.
    Fault(
        "warmup does not bend",
        "train/settings",
        "min(self.warmup_steps, self.total_steps // 2)",
        "self.warmup_steps",
        ("test_run_folder",),
    ),
    # The update in the backward pass.
    Fault(
        "no clipping in the backward pass",
        "train/in_backward",
        "scale = jnp.minimum(1.0, clip_norm / norm)",
        "scale = 1.0 + 0 * norm",
        IN_BACKWARD,
    ),
    Fault(
        "the norm leaves out the blocks",
        "train/in_backward",
        "jnp.sqrt(squares + optax.tree.norm(d_others) ** 2)",
        "optax.tree.norm(d_others) + 0 * squares",
        IN_BACKWARD,
    ),
    Fault(
        "a block's gradient is not scaled",
        "train/in_backward",
        "grads = scaled(grads, self.scale)",
        "grads = scaled(grads, 1.0)",
        IN_BACKWARD,
    ),
    Fault(
        "a penalty becomes a weight",
        "train/in_backward",
        "    return same(params)",
        "    return params",
        IN_BACKWARD,
    ),
    Fault(
        "a stack that the loss leaves out becomes zeros",
        "train/in_backward",
        "if missed := slots.keys() - updated:",
        "if missed := set():",
        IN_BACKWARD,
    ),
    Fault(
        "a block takes a step with NaN",
        "train/in_backward",
        "fine = jnp.isfinite(optax.tree.norm(grads))",
        "fine = jnp.bool_(True)",
        IN_BACKWARD,
    ),
    # Low-rank updates.
    Fault(
        "alpha is ignored",
        "nn/lora",
        "self.base, self.scale = base, alpha / rank",
        "self.base, self.scale = base, 1.0",
        ("test_decoder", "test_hugging_face"),
    ),
    Fault(
        "the update does not start as zeros",
        "nn/lora",
        "jnp.zeros((*blocks, rank, outputs))",
        "jnp.ones((*blocks, rank, outputs))",
        ("test_decoder",),
    ),
    Fault(
        "merged without the scale",
        "nn/lora",
        "+ a @ b * self.scale",
        "+ a @ b",
        ("test_decoder",),
    ),
    Fault(
        "the base is trained, too",
        "nn/lora",
        "    freeze(model)\n    for",
        "    for",
        ("test_decoder",),
    ),
    # γ chosen, and what it costs.
    Fault(
        "any rise is within the tolerance",
        "gamma",
        "[t for t in fair if t.rise <= tolerance]",
        "fair",
        GAMMA,
    ),
    Fault(
        "unfair signs are chosen",
        "gamma",
        "fair = [t for t in trials if t.signs in FAIR]",
        "fair = trials",
        GAMMA,
    ),
    Fault("the most bits", "gamma", "(-t.gamma, t.rise)", "(t.gamma, t.rise)", GAMMA),
    Fault(
        "γ of a trial is 1",
        "gamma",
        " * self.magnitude.astype(like.dtype)",
        "",
        GAMMA,
    ),
    Fault(
        "signs of a trial are per block", "gamma", "jnp.stack(kinds)[self.kind]", "kinds[0]", GAMMA
    ),
    Fault(
        "unfair signs end the search",
        "gamma",
        "for t in trials if t.signs in FAIR):",
        "for t in trials):",
        GAMMA,
    ),
    Fault(
        "a network that is not finite does not rise",
        "gamma",
        "else math.inf",
        "else 0.0",
        GAMMA,
    ),
    Fault(
        "the gap is of the same network",
        "train/gap",
        "stack.step.network, Direct()",
        "stack.step, Direct()",
        GAP,
    ),
    Fault("every gap is far", "train/gap", "loss - without > max(", "loss - without > -max(", GAP),
    Fault(
        "the gap of the first micro-batch",
        "train/gap",
        "lambda a: a.sum(axis=0), of_parts",
        "lambda a: a[0], of_parts",
        GAP,
    ),
    # Texts, tokenizers, packing.
    Fault(
        "weights are a token late",
        "data/packing",
        "examples[i].learned[1:]",
        "examples[i].learned[:-1]",
        TOKENIZERS[1:],
    ),
    Fault(
        "positions go on",
        "data/packing",
        "= segment, np.arange(sizes[i])",
        "= segment, start + np.arange(sizes[i])",
        TOKENIZERS[1:],
    ),
    Fault(
        "one segment in a row",
        "data/packing",
        "enumerate(texts, 1)",
        "((1, i) for i in texts)",
        TOKENIZERS[1:],
    ),
    Fault(
        "a translation begins with itself",
        "data/packing",
        "= [end, *target]",
        "= [*target, end]",
        ("test_translation", "test_encoder_decoder"),
    ),
    Fault(
        "the prompt's last token is learned",
        "data/examples",
        "known, tokens = len(given), whole",
        "known, tokens = len(given) - 1, whole",
        TOKENIZERS,
    ),
    Fault(
        "apart, with the space of a beginning",
        "data/examples",
        "tokenizer.continuation(text)",
        "tokenizer.encode(text)",
        TOKENIZERS,
    ),
    Fault(
        "what was before a piece is learned",
        "data/examples",
        "[False] * (len(begin) + 1)",
        "[True] * (len(begin) + 1)",
        (*FILES, "test_tokenizers"),
    ),
    Fault(
        "pieces overlap",
        "data/examples",
        "new = length - len(begin)",
        "new = length - len(begin) - 1",
        (*FILES, "test_tokenizers"),
    ),
    Fault(
        "truncation is left on",
        "data/tokenizers",
        "        self.inner.no_truncation()\n",
        "",
        TOKENIZERS,
    ),
    Fault(
        "padding is left on", "data/tokenizers", "        self.inner.no_padding()\n", "", TOKENIZERS
    ),
    Fault(
        "merges at random", "data/tokenizers", "self.inner.model.dropout = None", "pass", TOKENIZERS
    ),
    Fault(
        "two beginnings",
        "data/tokenizers",
        "return tokens if begin and tokens[: len(begin)] == begin else begin + tokens",
        "return begin + tokens",
        TOKENIZERS,
    ),
    Fault("no beginning is saved", "data/tokenizers", "                **begin,\n", "", TOKENIZERS),
    Fault(
        "the space of a normalizer stays",
        "data/tokenizers",
        ' for each in part if each["type"] != "Prepend"]',
        " for each in part]",
        TOKENIZERS,
    ),
    Fault(
        "lines end at U+2028",
        "data/records",
        'lines = text.split("\\n")',
        "lines = text.splitlines()",
        FILES,
    ),
    Fault(
        "a byte-order mark in the middle",
        "data/records",
        '.removeprefix("\\ufeff")',
        "",
        FILES,
    ),
    Fault(
        "evaluation on the training text",
        "data/text",
        "text[: int(cut * share)], text[cut:]",
        "text[: int(cut * share)], text[:cut]",
        TOKENIZERS[1:],
    ),
    Fault(
        "edited data are the same",
        "train/run_folder",
        "fingerprint(task.arrays())",
        '"same"',
        ("test_run_folder",),
    ),
    Fault(
        "another run is resumed",
        "train/run_folder",
        "    if differences:",
        "    if False:",
        ("test_run_folder",),
    ),
    # Texts that are mixed, and read as a run goes; epochs.
    Fault(
        "an order has some things twice",
        "data/order",
        "found[outside] = encrypted(found[outside])",
        "found[outside] %= np.uint64(count)",
        MIX,
    ),
    Fault(
        "every epoch has the same order",
        "data/mix",
        "permuted(places, s.blocks, (self.seed, source, epoch))",
        "permuted(places, s.blocks, (self.seed, source, 0))",
        MIX,
    ),
    Fault(
        "turns forget the shares", "data/order", "share * n - had if share", "-had if share", MIX
    ),
    Fault(
        "a row is left out",
        "data/mix",
        "Place(given + 1, window, row + 1)",
        "Place(given + 1, window, row + 2)",
        MIX,
    ),
    Fault(
        "other shares are the same",
        "data/mix",
        "self.shares, self.length, self.seed, WINDOW]",
        "self.length, self.seed, WINDOW]",
        MIX,
    ),
    Fault(
        "what is held out is learned",
        "data/sources",
        "== self.every - 1) != held_out",
        "== self.every - 1) < held_out",
        MIX,
    ),
    Fault(
        "every passage ends",
        "data/sources",
        "ends=stop == file.path.stat().st_size",
        "ends=True",
        MIX,
    ),
    Fault(
        "files may change in a run",
        "data/index",
        "if _stamp(path) != self.stamps[file]:",
        "if False:",
        MIX,
    ),
    Fault(
        "texts that are dropped are cut",
        "data/fitting",
        'if self.too_long == "drop":',
        "if False:",
        FILES,
    ),
    Fault(
        "the position is that of what was made ahead",
        "train/feed",
        "                self._put((fed, position))\n",
        "                self._put((fed, position))\n                self.position = position\n",
        FEED,
    ),
    Fault("a resumed run begins its data anew", "train/loop", 'told.get("position")', "None", FEED),
    Fault(
        "an epoch has what it leaves out",
        "train/epochs",
        "task.samples // batch_size",
        "task.samples / batch_size",
        FEED,
    ),
    # Conversations.
    Fault(
        "questions are learned",
        "data/chats",
        "if number % 2 else 0",
        "if not number % 2 else 0",
        CHATS,
    ),
    Fault(
        "what is behind an answer is learned",
        "data/chats",
        "ends[-1] + 1 if ends else len(piece)",
        "len(piece)",
        CHATS,
    ),
    Fault(
        "templates change messages",
        "data/chats",
        "jinja2.sandbox.ImmutableSandboxedEnvironment",
        "jinja2.Environment",
        CHATS,
    ),
    Fault(
        "answers as they are written later",
        "data/chats",
        "consistent &= whole.startswith(until)",
        "consistent &= True",
        CHATS,
    ),
    Fault("tokens have no names", "data/chats", "**dict(self.tokens),", "", CHATS),
    # Folders of models.
    Fault(
        "tied in spite of its head",
        "interop/models",
        "return config if same else dataclasses.replace(config, tied_head=False)",
        "return config",
        FOLDERS,
    ),
    Fault(
        "tensors may be left over",
        "interop/models",
        "if unused := checkpoint.unused():",
        "if unused := []:",
        ("test_hugging_face", "test_model_folders"),
    ),
    Fault(
        "old files of an interrupted save",
        "interop/replacing",
        'removed = Step("remove", name) in steps and Step("put", name) not in steps',
        "removed = False",
        FOLDERS,
    ),
    Fault(
        "links are followed",
        "interop/folder",
        "if (real := leads_out(path, folder)) is not None:",
        "if (real := None) is not None:",
        FOLDERS,
    ),
    Fault("names lead out", "interop/folder", '{"/", "\\\\", "\\0"}', '{"\\0"}', FOLDERS),
    Fault(
        "an index before the whole file",
        "interop/folder",
        "        if (whole := file_in(self.path, WHOLE)).exists():\n            return [whole]\n",
        "",
        FOLDERS,
    ),
    Fault(
        "rope by the first place",
        "interop/families/rotary",
        "agree(kinds)",
        "next(iter(kinds.values()), None)",
        FOLDERS,
    ),
    Fault(
        "queries of llama.cpp's order",
        "interop/families/llama",
        "pairs.swapaxes(1, 2)",
        "pairs",
        GGUF,
    ),
    Fault(
        "windows are ignored",
        "interop/families/llama",
        "length if window is None else min(length, window)",
        "length",
        ("test_hugging_face",),
    ),
    Fault(
        "the gate is the second half",
        "interop/families/llama",
        '{"ffn.gate": hidden, "ffn.up": hidden}',
        '{"ffn.up": hidden, "ffn.gate": hidden}',
        ("test_hugging_face",),
    ),
    Fault(
        "heads as wide as the network",
        "interop/families/llama",
        "or self.usual_head_dim or",
        "or",
        ("test_hugging_face",),
    ),
    # Plans.
    Fault(
        "side bits of blocks only",
        "planning/plan",
        "stack.depth * len(stack.parts or (None,))",
        "stack.depth",
        PLANS,
    ),
    Fault(
        "one bit whatever γ is",
        "planning/plan",
        "bits, checksum = stack.step.bits, 4",
        "bits, checksum = min(stack.step.bits, 1), 4",
        PLANS,
    ),
    Fault(
        "evaluation without the optimizer",
        "planning/plan",
        "evaluation + found.optimizer",
        "evaluation",
        PLANS,
    ),
    Fault(
        "evaluation does not count",
        "planning/plan",
        "return max(self.total, self.evaluation)",
        "return self.total",
        PLANS,
    ),
    Fault(
        "donated results count twice",
        "planning/memory",
        "found.output_size_in_bytes - found.alias_size_in_bytes",
        "found.output_size_in_bytes",
        (*PLANS, *IN_BACKWARD),
    ),
    Fault(
        "the largest that does not fit",
        "planning/memory",
        "    return low\n",
        "    return high\n",
        PLANS,
    ),
    # Runs.
    Fault(
        "narrow weights are trained",
        "train/weights",
        "jnp.finfo(dtype).nmant < 23",
        "jnp.finfo(dtype).nmant < 7",
        WEIGHTS,
    ),
    Fault(
        "large evaluation batches",
        "train/programs",
        "min(task.eval_batch_size, at_a_time)",
        "task.eval_batch_size",
        ("test_run_folder",),
    ),
    Fault(
        "the best is not saved",
        "train/loop",
        "if saves or self._is_best() or",
        "if saves or",
        ("test_feedback",),
    ),
    Fault(
        "an odd evaluation counts for patience",
        "train/result",
        'if record["step"] % every == 0',
        "if True",
        ("test_feedback",),
    ),
    Fault(
        "the worst is the best",
        "train/checkpoints",
        "return metrics[name] if name == metric else -metrics[name]",
        "return metrics[name]",
        WEIGHTS,
    ),
    Fault(
        "no room for the best",
        "train/run_folder",
        "keep_last + 2",
        "keep_last",
        ("test_run_folder",),
    ),
]
