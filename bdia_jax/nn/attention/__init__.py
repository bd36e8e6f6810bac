"""Attention, for all models.

===========  =====================================================================================
kernels      one function, :func:`kernels.attend`, over a table of ways to compute it
chunked      the kernel that never holds the queries × keys matrix
multi_head   modules of vision transformers: one projection, all positions
grouped      the module of language models: caches, fewer heads of keys and values
===========  =====================================================================================
"""

from bdia_jax.nn.attention.chunked import chunked_attention
from bdia_jax.nn.attention.grouped import GroupedQueryAttention
from bdia_jax.nn.attention.kernels import KERNELS, KernelName, attend
from bdia_jax.nn.attention.multi_head import LinearAttention, SelfAttention

__all__ = [
    "KERNELS",
    "GroupedQueryAttention",
    "KernelName",
    "LinearAttention",
    "SelfAttention",
    "attend",
    "chunked_attention",
]
