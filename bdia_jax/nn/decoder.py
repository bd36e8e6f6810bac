"""Decoder language models: GPT-2 and the Llama family, as settings of one network."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from bdia_jax.nn.caps import soft_cap
from bdia_jax.nn.configs import DecoderConfig
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.losses import Sums, cross_entropy, logits
from bdia_jax.nn.positions import Angles, lookup, rotary_angles
from bdia_jax.nn.settings import DTYPES
from bdia_jax.nn.stack import ReversibleStack
from bdia_jax.nn.stacked import PerBlock, placement_of
from bdia_jax.nn.text_blocks import DecoderBlock, make_norm


class Decoder(nnx.Module):
    """Tokens to logits of the next token."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init, dtype = nnx.initializers.normal(0.02), DTYPES[c.param_dtype]
        self.embedding = nnx.Param(init(rngs.params(), (c.vocab_size, c.width), dtype))
        learned = c.positions == "learned"
        self.positions = (
            nnx.Param(init(rngs.params(), (c.max_length, c.width), dtype)) if learned else None
        )
        self.dropout = Dropout(c.dropout)
        self.blocks = ReversibleStack(
            lambda rngs: DecoderBlock(c, rngs=rngs),
            **c.of_stack(c.depth, None if c.parallel else DecoderBlock.PARTS),
            rngs=rngs,
        )
        fill_in(self.blocks, c)
        self.norm = make_norm(c, c.width, rngs)
        self.head = (
            None if c.tied_head else nnx.Param(init(rngs.params(), (c.vocab_size, c.width), dtype))
        )

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits in float32.

        Args:
          tokens: in [0, vocab_size); others give NaN.
          segments: numbers of the texts that are packed into a sequence; there is no attention
            from one to another. None for one text.
          positions: of the tokens in their texts; None for 0, 1, 2, …
          key: PRNG key for dropout and the signs of γ; None where nothing is drawn.
        """
        return self.logits(self.features(tokens, segments=segments, positions=positions, key=key))

    def features(self, tokens, *, segments=None, positions=None, key=None):
        """What the logits are computed from: ``[batch, length, width]``, arguments as above."""
        self._check(tokens)
        embed_key, block_key = (None, None) if key is None else jax.random.split(key)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.dropout(self._embed(tokens, positions), rngs=embed_key)
        return self.norm(self.blocks(x, self.angles(positions), segments, key=block_key))

    def logits(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """In float32 (float64)."""
        return soft_cap(logits(features, self.output_matrix()), self.config.logit_cap)

    def output_matrix(self) -> Float[Array, "vocab width"]:
        """That of the head, or of the embedding."""
        return (self.embedding if self.head is None else self.head)[...]

    def loss(
        self,
        tokens: Int[Array, "batch length"],
        targets: Int[Array, "batch length"],
        weights: Float[Array, "batch length"] | None = None,
        *,
        segments: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        chunk: int | None = None,
    ) -> Sums:
        """Cross-entropy of the targets, without the logits of more than ``chunk`` tokens at once.

        Args:
          targets: the tokens to predict; any where the weight is 0.
          weights: of the positions; None for 1.
          tokens, segments, positions, key: as above.
          chunk: number of tokens; None as in :func:`cross_entropy`.
        """
        x = self.features(tokens, segments=segments, positions=positions, key=key)
        return cross_entropy(
            x,
            self.output_matrix(),
            targets,
            weights,
            cap=self.config.logit_cap,
            chunk=chunk,
            placement=placement_of(self),
        )

    def new_cache(self, batch: int, slots: int) -> tuple[Array, Array]:
        """Room for the keys and values of ``slots`` positions, of all blocks."""
        c = self.config
        shape = (c.depth, batch, slots, c.num_kv_heads, c.size_of_head)
        return jnp.zeros(shape, DTYPES[c.dtype]), jnp.zeros(shape, DTYPES[c.dtype])

    def extend(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        cache: tuple[Array, Array],
        start: Int[Array, ""] | int,
        present: Int[Array, "batch slot"],
    ) -> tuple[Float[Array, "batch vocab"], tuple[Array, Array]]:
        """Logits after the last of some more tokens, and the longer cache.

        Args:
          tokens: for the slots from ``start`` on.
          positions: of them in their texts.
          cache: of the tokens before.
          start: number of slots that are filled.
          present: 1 for slots with a token, 0 for padding; the new ones included.
        """
        angles = self.angles(positions)

        def extend(block, x, cache):
            return block.extend(x, angles, cache, start, present)

        x, cache = self.blocks.extend(self._embed(tokens, positions), cache, extend)
        return self.logits(self.norm(x[:, -1])), cache

    def _embed(self, tokens, positions):
        x = lookup(self.embedding[...], tokens)
        if self.positions is not None:
            x += lookup(self.positions[...], positions)
        x, scale = x.astype(DTYPES[self.config.dtype]), self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def angles(self, positions: Int[Array, "batch length"]) -> Angles | None:
        """Of rotary positions; all blocks are given them, and pick their kind if there are several.

        Of blocks that do not rotate among others that do, the angles are 0.
        """
        c = self.config
        kinds = dict.fromkeys(c.rotations)
        if [*kinds] == [None]:
            return None
        found = [
            rotary_angles(jnp.zeros_like(positions), c.turned)
            if kind is None
            else rotary_angles(positions, c.turned, longest=c.max_length, **kind._asdict())
            for kind in kinds
        ]
        return found[0] if len(found) == 1 else jax.tree.map(lambda *a: jnp.stack(a), *found)

    def _check(self, tokens):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "tokens must be integers of the shape [batch, length]; got "
                f"{tokens.dtype}{list(tokens.shape)}"
            )
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"sequences may have {self.config.max_length} tokens (max_length); "
                f"got {tokens.shape[1]}"
            )


def fill_in(blocks: ReversibleStack, c: DecoderConfig) -> None:
    """Gives the attention of every block its window and its kind of angles, if these differ."""
    attention = cast(DecoderBlock, blocks.stacked).attention
    kinds = [*dict.fromkeys(c.rotations)]
    for variable, numbers in (
        # No sequence is as long as that.
        (attention.window, [window or c.max_length for window in c.windows]),
        (attention.rotation, [kinds.index(kind) for kind in c.rotations]),
    ):
        if isinstance(variable, PerBlock):
            variable[...] = jnp.asarray(numbers, jnp.int32)
