"""Attention without logits in memory on TPUs: jax's Pallas kernel (arXiv 2205.14135), with what it asks of shapes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unclip_jax.sharding import BLOCK, over_heads, platform

_BLOCKS = (2 * BLOCK, BLOCK)


def suits(query: Float[Array, "b q h d"], mask: Bool[Array, "b #h #q k"] | None) -> bool:
    """Whether `attend_blocks` can take these: bfloat16 on a TPU, blocks of queries, and a mask of keys alone."""
    of_keys = mask is None or mask.shape[1:3] == (1, 1)
    return platform() == "tpu" and query.dtype == jnp.bfloat16 and query.shape[1] % BLOCK == 0 and of_keys


def attend_blocks(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Bool[Array, "b 1 1 k"] | None,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention, softmax in float32; rows and heads stay on their devices of the mesh."""
    visible = jnp.ones(key.shape[:2], bool) if mask is None else mask[:, 0, 0]
    # The kernel's blocks divide its keys: what fills them up is invisible.
    fill = -key.shape[1] % BLOCK
    visible = jnp.pad(visible, ((0, 0), (0, fill)))
    key, value = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (key, value))
    return over_heads(_kernel)(query, key, value, visible)


def _kernel(query: Array, key: Array, value: Array, visible: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    # Queries are of segment 1, and so are the keys that they may see.
    segments = SegmentIds(jnp.ones(query.shape[:2], jnp.int32), visible.astype(jnp.int32))
    q, k = (next(size for size in _BLOCKS if x.shape[1] % size == 0) for x in (query, key))
    blocks = BlockSizes(
        block_q=q, block_k_major=k, block_k=k, block_b=1,
        block_q_major_dkv=q, block_k_major_dkv=k, block_k_dkv=k, block_q_dkv=q,
        block_k_major_dq=k, block_k_dq=k, block_q_dq=q,
    )  # fmt: skip
    heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
    mixed = flash_attention(*heads_first, segment_ids=segments, sm_scale=query.shape[-1] ** -0.5, block_sizes=blocks)
    return jax.lax.convert_element_type(mixed.swapaxes(1, 2), value.dtype)
