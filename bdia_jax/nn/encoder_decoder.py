"""The encoder-decoder transformer, for translation: two reversible stacks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from bdia_jax.grid import accumulator
from bdia_jax.nn.configs import EncoderDecoderConfig
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.losses import Sums, cross_entropy, logits
from bdia_jax.nn.positions import lookup, sinusoids
from bdia_jax.nn.settings import DTYPES
from bdia_jax.nn.stack import ReversibleStack
from bdia_jax.nn.stacked import placement_of
from bdia_jax.nn.text_blocks import CrossBlock, DecoderBlock, make_norm


class EncoderDecoder(nnx.Module):
    """Sources, and the beginning of their translations, to logits of the next token.

    The encoder is one reversible stack, the decoder another: the encoder's output, its memory, is
    a differentiable constant of all its blocks.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
        c, block = config, config.block
        self.config = c

        def table(rows):
            init = nnx.initializers.normal(c.width**-0.5)
            return nnx.Param(init(rngs.params(), (rows, c.width), DTYPES[c.param_dtype]))

        self.source_embedding = table(c.source_vocab)
        self.embedding = None if c.target_vocab is None else table(c.target_vocab)
        learned = c.positions == "learned"
        self.source_positions = table(c.max_length) if learned else None
        self.positions = table(c.max_length) if learned else None
        self.dropout = Dropout(c.dropout)
        self.encoder = ReversibleStack(
            lambda rngs: DecoderBlock(block, causal=False, rngs=rngs),
            **c.of_stack(c.encoder_depth, DecoderBlock.PARTS),
            rngs=rngs,
        )
        self.encoder_norm = make_norm(block, c.width, rngs)
        self.decoder = ReversibleStack(
            lambda rngs: CrossBlock(block, rngs=rngs),
            **c.of_stack(c.decoder_depth, CrossBlock.PARTS),
            rngs=rngs,
        )
        self.norm = make_norm(block, c.width, rngs)
        self.head = None if c.tied_head else table(c.vocab_size)

    def __call__(
        self,
        sources: Int[Array, "batch source"],
        tokens: Int[Array, "batch length"],
        *,
        source_segments: Int[Array, "batch source"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        source_positions: Int[Array, "batch source"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits in float32.

        Args:
          sources: tokens in [0, source_vocab); others give NaN.
          tokens: of the translations so far.
          source_segments, segments: numbers of the texts that are packed into a sequence; text i
            of the targets looks into text i of the sources. None for one text. (Padding is a
            text of its own, with a number that no other has.)
          source_positions, positions: of the tokens in their texts; None for 0, 1, 2, …
          key: PRNG key for dropout and the signs of γ; None where nothing is drawn.
        """
        x = self.features(
            sources,
            tokens,
            source_segments=source_segments,
            segments=segments,
            source_positions=source_positions,
            positions=positions,
            key=key,
        )
        return self.logits(x)

    def features(
        self,
        sources,
        tokens,
        *,
        source_segments=None,
        segments=None,
        source_positions=None,
        positions=None,
        key=None,
    ):
        """What the logits are computed from: ``[batch, length, width]``, arguments as above."""
        source_key, key = (None, None) if key is None else jax.random.split(key)
        if source_segments is None:
            source_segments = jnp.ones_like(sources)
        if segments is None:
            segments = jnp.ones_like(tokens)
        memory = self.encode(sources, source_segments, source_positions, key=source_key)
        x, key = self._embed(tokens, positions, key, of_source=False)
        return self.norm(self.decoder(x, memory, segments, source_segments, key=key))

    def encode(
        self, sources, source_segments, source_positions=None, *, key=None
    ) -> Float[Array, "batch source width"]:
        """The memory; arguments as above."""
        x, key = self._embed(sources, source_positions, key, of_source=True)
        return self.encoder_norm(self.encoder(x, None, source_segments, key=key))

    def logits(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """In float32 (float64)."""
        return logits(features, self.output_matrix())

    def output_matrix(self) -> Float[Array, "vocab width"]:
        """That of the head, or of the targets' embedding."""
        if self.head is not None:
            return self.head[...]
        return (self.source_embedding if self.embedding is None else self.embedding)[...]

    def loss(
        self,
        sources,
        tokens,
        targets,
        weights=None,
        *,
        label_smoothing: float = 0.0,
        chunk: int | None = None,
        **options,
    ) -> Sums:
        """Cross-entropy of the targets, without the logits of more than ``chunk`` tokens at once.

        Args:
          sources, tokens: as above.
          targets: ``[batch, length]``, the tokens to predict; any where the weight is 0.
          weights: of them; None for 1.
          label_smoothing: share of the target that is spread over the vocabulary.
          chunk: number of tokens; None as in :func:`cross_entropy`.
          **options: segments, positions and key, as above.
        """
        x = self.features(sources, tokens, **options)
        return cross_entropy(
            x,
            self.output_matrix(),
            targets,
            weights,
            label_smoothing=label_smoothing,
            chunk=chunk,
            placement=placement_of(self),
        )

    # What generation asks of a network.

    def context(
        self, sources: Int[Array, "batch source"], present: Int[Array, "batch source"]
    ) -> tuple[Array, Array, Array]:
        """Keys and values of the memory, of all blocks, and where there is something in it.

        The batch is the second axis of each.
        """
        memory = self.encode(sources, present)
        keys_values, params = self.decoder.pure(lambda block, x: block.cross.keys_values(x))
        keys, values = jax.lax.map(lambda params: keys_values(params, None, memory), params)
        return keys, values, present[None]

    def new_cache(self, batch: int, slots: int) -> tuple[Array, Array]:
        """Room for the keys and values of ``slots`` positions, of all blocks."""
        c = self.config
        shape = (c.decoder_depth, batch, slots, c.heads, c.width // c.heads)
        return jnp.zeros(shape, DTYPES[c.dtype]), jnp.zeros(shape, DTYPES[c.dtype])

    def extend(self, tokens, positions, cache, start, present, context):
        """As :meth:`bdia_jax.nn.Decoder.extend`, with the sources' :meth:`context`."""
        x, _ = self._embed(tokens, positions, None, of_source=False)
        *keys_values, memory_present = context

        def extend(block, x, given):
            cache, keys_values = given
            return block.extend(x, cache, start, present, keys_values, memory_present[0])

        x, cache = self.decoder.extend(x, (cache, tuple(keys_values)), extend)
        return self.logits(self.norm(x[:, -1])), cache

    def _embed(self, tokens, positions, key, *, of_source: bool):
        """The input of the first block of a stack; and the key that is left."""
        c = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "tokens must be integers of the shape [batch, length]; got "
                f"{tokens.dtype}{list(tokens.shape)}"
            )
        if tokens.shape[1] > c.max_length:
            raise ValueError(
                f"sequences may have {c.max_length} tokens (max_length); got {tokens.shape[1]}"
            )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        embedding = self.source_embedding
        if not of_source and self.embedding is not None:
            embedding = self.embedding
        # The output matrix wants small entries, the stream large ones.
        x = lookup(embedding[...], tokens) * math.sqrt(c.width)
        table = self.source_positions if of_source else self.positions
        if table is None:
            wide = accumulator(x.dtype)
            x = x.astype(wide) + sinusoids(positions, c.width).astype(wide)
        else:
            x += lookup(table[...], positions) * math.sqrt(c.width)
        dropout_key, key = (None, None) if key is None else jax.random.split(key)
        return self.dropout(x.astype(DTYPES[c.dtype]), rngs=dropout_key), key
