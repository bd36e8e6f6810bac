"""Shapes of well-known models, by name."""

from bdia_jax.nn import DecoderConfig, llama

SHAPES: dict[str, DecoderConfig] = {
    "gpt2": DecoderConfig(vocab_size=50257, max_length=1024, width=768, depth=12, heads=12),
    "gpt2-medium": DecoderConfig(vocab_size=50257, max_length=1024, width=1024, depth=24, heads=16),
    "llama-1b": llama(
        vocab_size=128_256,
        max_length=131_072,
        width=2048,
        depth=16,
        heads=32,
        kv_heads=8,
        hidden=8192,
        tied_head=True,
    ),
    "llama-deep": llama(
        vocab_size=128_256,
        max_length=131_072,
        width=2048,
        depth=64,
        heads=32,
        kv_heads=8,
        hidden=8192,
        tied_head=True,
    ),
    "llama-8b": llama(
        vocab_size=128_256,
        max_length=131_072,
        width=4096,
        depth=32,
        heads=32,
        kv_heads=8,
        hidden=14_336,
    ),
}
